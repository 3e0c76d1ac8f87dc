"""Is a view what the sleeping kernel knows? Nothing is trusted before this says so.

Called in the sandbox, after `ouassister.disk.coherent`; reads only, so that the view may be in use
meanwhile. Four independent witnesses: every inode that the kernel has cached lies on the disk with
the same attributes; every directory entry that it has cached, or knows to be absent, is so; a
sample of pages that the kernel calls clean is what the files hold; and e2fsck finds nothing.
libext2fs verifies checksums as it reads. The pages tell a disk of an earlier moment, all of whose
later metadata is still in memory.

Source: Linux v6.1 ``include/linux/dcache.h`` (negative dentries); ``fs/ext4/ext4.h``
(``EXT4_FIRST_INO``), ``fs/ext4/xattr.c`` (``ext4_xattr_inode_set_ref``); e2fsck(8).
"""

from __future__ import annotations

import os
import subprocess
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ouassister.disk import raw_inode
from ouassister.disk.handover import HandOver
from ouassister.disk.libext2fs import Ext4
from ouassister.errors import CorruptGuestError, HostNotReadyError
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

_FIRST_USUAL_INODE: Final = 11
_ROOT: Final = 2
_TOLD: Final = 3
_HINT: Final = "resume the VM, run 'sync' in it and save it again"


def prove(argument: dict[str, Any]) -> dict[str, Any]:
    """Compare a view with memory, and let e2fsck look at it.

    Args:
        argument: ``image`` and ``handover``, as for `ouassister.disk.coherent.apply`.

    Returns:
        ``inodes``, ``names`` and ``pages``: how many were compared.

    Raises:
        CorruptGuestError: It is not what memory says, or not sound; the message says where.
    """
    image = Path(argument["image"])
    handover = HandOver(Path(argument["handover"]))
    try:
        with Ext4(image, writable=False) as ext4:
            inodes = _compare_inodes(ext4, handover)
            names = _compare_names(ext4, handover)
            pages = _compare_pages(ext4, handover)
    finally:
        handover.close()
    e2fsck(image, "-fn", good=(0,))
    return {"inodes": inodes, "names": names, "pages": pages}


def is_own(inode: int) -> bool:
    """Tell whether an inode is one of the file system's own, the root directory aside."""
    return inode < _FIRST_USUAL_INODE and inode != _ROOT


def _compare_inodes(ext4: Ext4, handover: HandOver) -> int:
    wrong: list[str] = []
    count = 0
    for inode in sorted(handover.inodes, key=lambda one: one.number):
        if not inode.links or is_own(inode.number):
            continue  # deleted, or the file system's own
        raw = ext4.inode(inode.number)
        if raw_inode.flags(raw) & raw_inode.EA_INODE_FL:
            continue  # its times and links hold other things
        told = raw_inode.difference(raw, inode)
        if told:
            wrong.append(f"inode {inode.number}: {told}")
        count += 1
    refuse(wrong)
    return count


def _compare_names(ext4: Ext4, handover: HandOver) -> int:
    wrong: list[str] = []
    count = 0
    for directory, name, ours, theirs in _names(ext4, handover):
        if ours != theirs:
            known, found = (f"inode {one}" if one else "absent" for one in (ours, theirs))
            wrong.append(
                f"{to_text(name)} in directory {directory}: {known} in memory, {found} in the view"
            )
        count += 1
    refuse(wrong)
    return count


def _compare_pages(ext4: Ext4, handover: HandOver) -> int:
    wrong: list[str] = []
    count = 0
    for number, places in groupby(handover.clean, key=lambda place: place.inode):
        if raw_inode.flags(ext4.inode(number)) & raw_inode.ENCRYPT_FL:
            continue
        pieces = [(place.offset, b"".join(handover.read(place))) for place in places]
        found = ext4.read(number, [(offset, len(data)) for offset, data in pieces])
        for (offset, ours), theirs in zip(pieces, found, strict=True):
            if ours != theirs:
                wrong.append(f"inode {number}: data at {offset:#x}")
                break
        count += len(pieces)
    refuse(wrong)
    return count


def _names(ext4: Ext4, handover: HandOver) -> Iterator[tuple[int, bytes, int, int]]:
    """Yield directory, name, inode in memory and inode in the view of each cached entry."""
    current = 0
    entries: dict[bytes, int] | None = None
    for directory, name, inode in handover.names():
        if directory != current:
            current, entries = directory, _entries(ext4, directory)
        if entries is not None:
            yield directory, name, inode, entries.get(name, 0)


def _entries(ext4: Ext4, directory: int) -> dict[bytes, int] | None:
    """Read a directory; None where names cannot be compared byte by byte."""
    flags = raw_inode.flags(ext4.inode(directory))
    if flags & (raw_inode.ENCRYPT_FL | raw_inode.CASEFOLD_FL):
        return None
    return ext4.entries(directory)


def refuse(wrong: list[str]) -> None:
    """Raise when anything is wrong.

    Raises:
        CorruptGuestError: Something is; the first few are named.
    """
    if wrong:
        more = f" and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise CorruptGuestError(
            f"disk and memory of the guest do not agree: {'; '.join(wrong[:_TOLD])}{more}",
            hint=_HINT,
        )


def e2fsck(image: Path, option: str, *, good: tuple[int, ...]) -> None:
    """Run e2fsck.

    Raises:
        CorruptGuestError: It ended with another status than a good one.
        HostNotReadyError: It is not installed.
    """
    try:
        done = subprocess.run(
            ["e2fsck", option, str(image)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C.UTF-8", "E2FSCK_CONFIG": os.devnull},
            check=False,
        )
    except FileNotFoundError as error:
        raise HostNotReadyError("e2fsck is not installed (package e2fsprogs)") from error
    if done.returncode not in good:
        lines = [line.strip() for line in done.stdout.splitlines()[1:]]
        told = [to_text(line) for line in lines if line and not line.startswith(b"Pass")]
        raise CorruptGuestError(
            f"disk and memory of the guest do not make a sound file system: {'; '.join(told[:4])}",
            hint=_HINT,
        )
