"""The fence: what every file of a suspended VM looked like, so that a change is noticed.

A stamp costs 64 small reads, whatever the size of the file. It tells apart another file in the
same place (device, inode), a write (size, times) and a write whose times were put back, when it
hit one of the sampled blocks; the change time cannot be put back without changing the clock.

Source: Linux ``stat(2)``, ``inode(7)``: any write or change of attributes sets the change time.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import fields
from typing import TYPE_CHECKING, Final

from ouassister.errors import NotSuspendedError, StaleError, StateError
from ouassister.model import Fence, FileStamp

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_SAMPLES: Final = 64
_BLOCK: Final = 4096
_WORDS: Final = {
    "device": "lies on another device",
    "inode": "is another file in the same place",
    "size": "has another size",
    "mtime_ns": "was written to",
    "ctime_ns": "was written to, or its attributes were changed",
    "sample_sha256": "has other contents",
}


def stamp(path: Path) -> FileStamp:
    """Look at one file.

    Raises:
        FileNotFoundError: It does not exist.
        StateError: It is no regular file.
    """
    return _stamp(os.fspath(path.absolute()))


def fence(save: Path, disks: Iterable[Path]) -> Fence:
    """Stamp a save file and the disks (with their backing files) of one suspended VM.

    Raises:
        NotSuspendedError: The save file does not exist.
        StateError: A disk does not exist, or a file is no regular file.
    """
    try:
        saved = stamp(save)
    except FileNotFoundError as error:
        raise NotSuspendedError(f"there is no save file {save}") from error
    stamps = []
    for disk in disks:
        try:
            stamps.append(stamp(disk))
        except FileNotFoundError as error:
            raise StateError(
                f"disk {disk} does not exist", hint="correct the path of the disk, or bring it back"
            ) from error
    return Fence(saved, tuple(stamps))


def check_fence(fence: Fence) -> None:
    """Compare every file with its stamp.

    Raises:
        StaleError: A file changed or vanished; the message names it and what differs.
    """
    for one in (fence.save, *fence.disks):
        try:
            now = _stamp(one.path)
        except FileNotFoundError as error:
            raise StaleError(f"{one.path} is gone: the VM was resumed or moved") from error
        except StateError as error:
            raise StaleError(f"{one.path} is no regular file any more") from error
        if now != one:
            raise StaleError(f"{one.path} {_difference(one, now)} since it was looked at")


def refuse_other(fence: Fence, save: Path, disks: Iterable[Path]) -> None:
    """Compare whose files were stamped; the files themselves are for `check_fence`.

    Raises:
        StaleError: It is the fence of other files, though those may be unchanged.
    """
    stamped = {one.path for one in fence.disks}
    pairs = [(save, {fence.save.path}), *((disk, stamped) for disk in disks)]
    for path, known in pairs:
        if os.fspath(path.absolute()) not in known:
            raise StaleError(f"it was made for other files than {path}")


def _difference(then: FileStamp, now: FileStamp) -> str:
    names = [one.name for one in fields(FileStamp) if one.name != "path"]
    changed = [name for name in names if getattr(then, name) != getattr(now, name)]
    first = changed[0]
    return f"{_WORDS[first]} ({', '.join(changed)} differ)"


def _stamp(path: str) -> FileStamp:
    # O_NONBLOCK: the open of a FIFO must not wait for a writer
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StateError(f"{path} is no regular file", hint="only disk image files are stamped")
        return FileStamp(
            path=path,
            device=status.st_dev,
            inode=status.st_ino,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
            sample_sha256=_sample(descriptor, status.st_size),
        )
    finally:
        os.close(descriptor)


def _sample(descriptor: int, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    step = max((size - _BLOCK) // (_SAMPLES - 1), 1)
    for offset in dict.fromkeys(min(i * step, max(size - _BLOCK, 0)) for i in range(_SAMPLES)):
        digest.update(os.pread(descriptor, _BLOCK, offset))
    return digest.hexdigest()
