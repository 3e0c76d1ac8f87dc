"""Make the guest's tmpfs again in the sandbox, once for all programs of a run.

It is done before any program of the guest is there, where files have the guest's owners. Nothing
in the tree acts: at a socket nobody listens (ECONNREFUSED), at a fifo nobody reads, a device leads
nowhere. No link of the guest's is followed; a name that leads out is refused.

Source: ``mknod(2)`` (a user namespace makes no device but character 0:0, which no driver has),
``setxattr(2)``, ``xattr(7)``, ``tmpfs(5)``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ouassister.errors import InternalError
from ouassister.shadow import raw
from ouassister.shadow.tmpfs_handover import TmpfsHandOver, read_places
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.shadow.tmpfs_handover import Record

_PERMISSIONS: Final = 0o7777
_IDS: Final = 65536  # that the user namespace has
_OVERFLOW_ID: Final = 65534  # what stat(2) shows for an owner that it has not
_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_XATTR: Final = (
    errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC, errno.ENODATA, errno.ERANGE,
)  # fmt: skip
_NO_LINK: Final = (errno.ENOENT, errno.ENAMETOOLONG, errno.ENOSPC)  # ENOENT: it is empty
_MAX_NOTES: Final = 20
_MAX_BYTES: Final = 1 << 30
_MAX_INODES: Final = 1 << 20
_SPARE_INODES: Final = 64  # for directories of ours


def fill(argument: dict[str, Any]) -> list[str]:
    """Mount and fill each tmpfs that was handed over; called in the sandbox.

    Args:
        argument: ``folder``: where the hand-over is. ``mounts``: an empty folder for them.

    Returns:
        What of it this host cannot make, for the user.

    Raises:
        InternalError: The hand-over is not one.
    """
    folder, mounts = Path(argument["folder"]), Path(argument["mounts"])
    places = read_places(folder) or ()
    notes: list[str] = []
    for number in sorted({place.number for place in places}):
        where = next(place.target for place in places if place.number == number)
        target = mounts / str(number)
        target.mkdir()
        handover = TmpfsHandOver(folder / str(number))
        try:
            raw.mount("tmpfs", str(target), "tmpfs", raw.MS_NOSUID | raw.MS_NODEV, limits(handover))
            notes += fill_folder(target, handover, where)
        finally:
            handover.close()
    return notes


def limits(handover: TmpfsHandOver) -> str:
    """The guest's limits as mount options, within ours."""
    size = min(handover.size_bytes or _MAX_BYTES, _MAX_BYTES)
    inodes = min(handover.inodes or _MAX_INODES, _MAX_INODES)
    return f"size={size},nr_inodes={max(inodes, handover.count + _SPARE_INODES)}"


def fill_folder(folder: Path, handover: TmpfsHandOver, where: bytes) -> list[str]:
    """Make what was handed over in an empty folder; ``where`` is the guest's name for it."""
    filling = _Filling(os.open(folder, _FOLDER_FLAGS), where)
    try:
        for number, record in enumerate(handover.records()):
            filling.add(number, record)
        filling.finish()
    finally:
        filling.close()
    return filling.notes()


class _Filling:
    """One tree that grows. Open are the directories on the way to the newest file."""

    def __init__(self, top: int, where: bytes) -> None:
        self._where = where.rstrip(b"/")
        self._top = top
        self._open: list[tuple[int, int, Record | None]] = [(0, top, None)]
        self._names: dict[int, tuple[int, bytes]] = {0: (0, b"")}  # parent and name
        self._lost: Counter[str] = Counter()
        self._example: dict[str, bytes] = {}

    def add(self, number: int, record: Record) -> None:
        """Make one node; its parent is made already.

        Raises:
            InternalError: The records are no tree.
        """
        if number == 0:
            self._open[0] = (0, self._top, record)
            return
        while self._open[-1][0] != record.parent:
            self._leave()
            if not self._open:
                raise InternalError("the hand-over of a tmpfs is no tree")
        parent = self._open[-1][1]
        self._names[number] = (record.parent, record.name)
        if stat.S_ISDIR(record.mode):
            os.mkdir(record.name, 0o700, dir_fd=parent)
            below = os.open(record.name, _FOLDER_FLAGS, dir_fd=parent)
            self._open.append((number, below, record))
        elif record.same is not None:
            self._link(parent, record.name, record.same)
        elif stat.S_ISREG(record.mode):
            self._regular(number, parent, record)
        elif self._create(number, parent, record):
            self._set(number, record, parent)

    def finish(self) -> None:
        """Give the directories that are open what they shall have."""
        while self._open:
            self._leave()

    def close(self) -> None:
        """Close what is open."""
        for _, descriptor, _ in self._open:
            os.close(descriptor)
        self._open.clear()

    def notes(self) -> list[str]:
        """What could not be made."""
        told = []
        for what, count in self._lost.items():
            first = to_text(self._example[what])
            told.append(f"{first}{f' and {count - 1} more' * (count > 1)}: {what}")
        more = len(told) - _MAX_NOTES
        return told if more <= 0 else [*told[:_MAX_NOTES], f"and {more} more of this kind"]

    def _leave(self) -> None:
        """Finish the innermost directory; its times change with each new entry until then."""
        number, descriptor, record = self._open.pop()
        try:
            if record is not None:
                self._set_open(number, record, descriptor)
        finally:
            os.close(descriptor)

    def _create(self, number: int, parent: int, record: Record) -> bool:
        name, mode = record.name, record.mode
        if stat.S_ISLNK(mode):
            try:
                os.symlink(record.target, name, dir_fd=parent)
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                self._lose(number, f"left out of the view: {error.strerror}")
                return False
        elif stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            os.mknod(name, stat.S_IFMT(mode) | 0o600, dir_fd=parent)
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            if record.device:
                self._lose(number, "a device, which leads nowhere in the view")
            os.mknod(name, stat.S_IFCHR | 0o600, device=0, dir_fd=parent)
        else:
            self._lose(number, f"of unknown type {stat.S_IFMT(mode):o}, left out of the view")
            return False
        return True

    def _regular(self, number: int, parent: int, record: Record) -> None:
        file = os.open(record.name, _NEW_FILE, 0o600, dir_fd=parent)
        try:
            os.ftruncate(file, record.size)
            for position, data in record.runs:
                done = 0
                while done < len(data):  # what is full takes a part, and refuses the rest
                    done += os.pwrite(file, data[done:], position + done)
        except OSError as error:
            if error.errno not in (errno.EFBIG, errno.EINVAL, errno.ENOSPC):
                raise
            os.unlink(record.name, dir_fd=parent)
            self._lose(number, f"left out of the view: {error.strerror}")
        else:
            self._set_open(number, record, file)
        finally:
            os.close(file)

    def _link(self, parent: int, name: bytes, same: int) -> None:
        # A first name that is not there was left out, and named.
        with self._folder_of(same) as (folder, old), contextlib.suppress(FileNotFoundError):
            os.link(old, name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)

    @contextlib.contextmanager
    def _folder_of(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Open the directory that a node lies in, step by step."""
        parent, name = self._names[number]
        steps = []
        while parent:
            parent, step = self._names[parent]
            steps.append(step)
        folder = os.dup(self._top)
        try:
            for step in reversed(steps):
                below = os.open(step, _FOLDER_FLAGS, dir_fd=folder)
                os.close(folder)
                folder = below
            yield folder, name
        finally:
            os.close(folder)

    def _set_open(self, number: int, record: Record, file: int) -> None:
        """Set owner, attributes, mode and times, in the order in which none undoes another."""
        os.fchown(file, *self._owner(number, record))
        for key, value in record.xattrs:
            with self._may_lose(number, key):
                os.setxattr(file, key, value)
        os.fchmod(file, record.mode & _PERMISSIONS)
        os.utime(file, ns=(record.atime_ns, record.mtime_ns))

    def _set(self, number: int, record: Record, parent: int) -> None:
        """The same for what cannot be opened; what is there was made a moment ago."""
        name = record.name
        os.chown(name, *self._owner(number, record), dir_fd=parent, follow_symlinks=False)
        for key, value in record.xattrs:
            with self._may_lose(number, key):
                path = f"/proc/self/fd/{parent}/".encode() + name
                os.setxattr(path, key, value, follow_symlinks=False)
        if not stat.S_ISLNK(record.mode):
            os.chmod(name, record.mode & _PERMISSIONS, dir_fd=parent)
        times = (record.atime_ns, record.mtime_ns)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _owner(self, number: int, record: Record) -> tuple[int, int]:
        owner = (record.uid, record.gid)
        if max(owner) < _IDS:
            return owner
        self._lose(number, f"its owner is above {_IDS - 1}, and another in the view")
        uid, gid = (one if one < _IDS else _OVERFLOW_ID for one in owner)
        return uid, gid

    @contextlib.contextmanager
    def _may_lose(self, number: int, key: bytes) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_XATTR:
                raise
            self._lose(number, f"attribute {to_text(key)} is not in the view")

    def _lose(self, number: int, what: str) -> None:
        self._lost[what] += 1
        if what not in self._example:
            parts = []
            while number:
                number, name = self._names[number]
                parts.append(name)
            self._example[what] = b"/".join((self._where, *reversed(parts)))
