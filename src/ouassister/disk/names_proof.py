"""Is a file system that was read as it lies on the disk what the sleeping kernel knows?

`write` on the host, `prove` in the shadow, where the file system is mounted and its owners are the
guest's. Every name that the kernel has cached is looked up: it leads to the same inode with the
same attributes, or to none where the kernel knows that there is none.

Source: Linux v6.1 ``fs/stat.c`` (``generic_fillattr``), ``fs/xfs/xfs_iops.c`` (``xfs_vn_getattr``).
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ouassister.errors import CorruptGuestError
from ouassister.text import from_text, to_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.kernel.cached_names import CachedName

_TOLD: Final = 3
_HINT: Final = "the disk is not that of this save file, or the guest's file system is damaged"
_WHAT: Final = ("inode", "mode", "owner", "group", "links", "size", "mtime", "ctime")


def write(path: Path, names: Iterable[CachedName], root: bytes) -> int:
    """Write down the names below the part of a file system that a volume is; return how many."""
    top = root.rstrip(b"/")
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for one in names:
            if one.path == root or one.path.startswith(top + b"/"):
                inside = one.path[len(top) :].lstrip(b"/")
                file.write(json.dumps([to_text(inside), *one[1:]]) + "\n")
                count += 1
    path.chmod(0o644)
    return count


def prove(argument: dict[str, Any]) -> dict[str, int]:
    """Compare what is mounted with what was written down.

    Args:
        argument: ``mounted``: a folder; ``names``: what `write` has written.

    Returns:
        ``names``: how many were compared.

    Raises:
        CorruptGuestError: They do not agree; the first few are named.
    """
    wrong: list[str] = []
    count = 0
    folder = os.open(argument["mounted"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with Path(argument["names"]).open(encoding="utf-8") as file:
            for line in file:
                path, *known = json.loads(line)
                told = _difference(folder, from_text(path), known)
                if told:
                    wrong.append(f"/{path}: {told}")
                    if len(wrong) == _TOLD:
                        break
                count += 1
    finally:
        os.close(folder)
    if wrong:
        raise CorruptGuestError(
            f"disk and memory of the guest do not agree: {'; '.join(wrong)}", hint=_HINT
        )
    return {"names": count}


def _difference(folder: int, path: bytes, known: list[int]) -> str:
    try:
        found = os.stat(path or b".", dir_fd=folder, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return f"inode {known[0]} in memory, absent on the disk" if known[0] else ""
    if not known[0]:
        return f"absent in memory, inode {found.st_ino} on the disk"
    ours = [
        found.st_ino, found.st_mode, found.st_uid, found.st_gid, found.st_nlink, found.st_size,
        found.st_mtime_ns, found.st_ctime_ns,
    ]  # fmt: skip
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
        ours[5] = known[5]  # XFS keeps the size of a directory elsewhere (xfs_vn_getattr)
    for what, mine, theirs in zip(_WHAT, ours, known, strict=True):
        if mine != theirs:
            return f"{what} {theirs} in memory, {mine} on the disk"
    return ""
