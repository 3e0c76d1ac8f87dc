"""The shadow's /dev as a file system: the guest's nodes, and what programs make beside them.

A node shows type, number and mode of the guest's device. It cannot be opened: the mount belongs to
a user namespace, and there the kernel opens no device. Files, folders and links can be made and
removed as in a devtmpfs; they are kept in memory, within a bound, and end with the run.

Source: Linux v6.1 ``fs/namei.c`` (``may_open_dev``), ``fs/super.c`` (``alloc_super``:
``SB_I_NODEV``); libfuse 3 ``include/fuse.h``; mfusepy 3.1 (``Operations``).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ouassister.shadow.served.snapshot import Node

Entry: TypeAlias = tuple[str, dict[str, int], int]

MAX_BYTES: Final = 16 << 20
MAX_FILES: Final = 1 << 16
_PERMISSIONS: Final = 0o7777
_NAME_MAX: Final = 255
_NOW, _OMIT = (1 << 30) - 1, (1 << 30) - 2  # UTIME_NOW, UTIME_OMIT: no nanoseconds
_ATTRIBUTES: Final = "user."  # the others are the kernel's, as in a tmpfs of a user namespace
_MAX_ATTRIBUTES: Final = 65536


class _File:
    """One inode."""

    __slots__ = ("attributes", "below", "data", "device", "gid", "links", "mode", "mtime_ns",
                 "number", "uid")  # fmt: skip

    def __init__(self, mode: int, uid: int, gid: int, number: int, device: int = 0) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.number = number
        self.device = device
        self.links = 2 if stat.S_ISDIR(mode) else 1
        self.mtime_ns = time.time_ns()
        self.data = b""  # of a file, or where a link leads to
        self.below: dict[str, _File] = {}
        self.attributes: dict[str, bytes] = {}


class DevFiles:
    """The operations; names are the ones that mfusepy calls.

    Args:
        nodes: The snapshot.
        caller: Tells who asks: user and group.
    """

    use_ns = True

    def __init__(self, nodes: Sequence[Node], caller: Callable[[], tuple[int, int]]) -> None:
        self._caller = caller
        self._bytes = 0
        self._count = len(nodes)
        files: list[_File] = []
        names: dict[int, _File] = {}  # files with several names are one
        for node in nodes:
            file = names.get(node.number) if not stat.S_ISDIR(node.mode) else None
            if file is None or file.mode != node.mode or not node.number:
                file = _File(node.mode, node.uid, node.gid, node.number, node.device)
                file.links, file.mtime_ns = node.links, node.mtime_ns
                file.data = node.content or b""
                names[node.number] = file
            if files:
                files[node.parent].below[os.fsdecode(node.name)] = file
            files.append(file)
        self._root = files[0]
        self._next = max(node.number for node in nodes) + 1

    # --- what there is ---

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Tell type, number, mode, owner, size and time."""
        del fh
        file = self._find(path)
        size = 20 * (2 + len(file.below)) if stat.S_ISDIR(file.mode) else len(file.data)
        return {
            "st_mode": file.mode,
            "st_uid": file.uid,
            "st_gid": file.gid,
            "st_nlink": file.links,
            "st_ino": file.number,
            "st_rdev": file.device,
            "st_size": size,
            "st_blocks": 8 * -(-len(file.data) // 4096) if stat.S_ISREG(file.mode) else 0,
            "st_mtime": file.mtime_ns,
            "st_atime": file.mtime_ns,
            "st_ctime": file.mtime_ns,
        }

    def readlink(self, path: str) -> str:
        """Tell where a link leads to."""
        return os.fsdecode(self._find(path).data)

    def readdir(self, path: str, fh: int) -> list[Entry]:
        """List a folder."""
        del fh
        folder = self._folder(path)
        own = {"st_mode": folder.mode, "st_ino": folder.number}
        found: list[Entry] = [(".", own, 0), ("..", own, 0)]
        found += [
            (name, {"st_mode": file.mode, "st_ino": file.number}, 0)
            for name, file in folder.below.items()
        ]
        return found

    def open(self, path: str, flags: int) -> int:
        """Open a file; the kernel opens nothing else here."""
        file = self._find(path)
        if not stat.S_ISREG(file.mode):
            raise OSError(errno.ENXIO, path)
        if flags & os.O_TRUNC:
            self._resize(file, 0)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read a piece of a file."""
        del fh
        return self._find(path).data[offset : offset + size]

    def statfs(self, path: str) -> dict[str, int]:
        """Tell how much more it takes."""
        del path
        free = (MAX_BYTES - self._bytes) // 4096
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": MAX_BYTES // 4096, "f_bfree": free,
                "f_bavail": free, "f_files": MAX_FILES, "f_ffree": MAX_FILES - self._count,
                "f_favail": MAX_FILES - self._count, "f_namemax": _NAME_MAX}  # fmt: skip

    # --- what programs make ---

    def create(self, path: str, mode: int) -> int:
        """Make a file."""
        self._make(path, stat.S_IFREG | mode & _PERMISSIONS)
        return 0

    def mknod(self, path: str, mode: int, dev: int) -> int:
        """Make a file, a socket or a pipe; the kernel lets nobody here make a device."""
        if stat.S_IFMT(mode) not in (stat.S_IFREG, stat.S_IFSOCK, stat.S_IFIFO):
            raise OSError(errno.EPERM, path, dev)
        self._make(path, mode)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        """Make a folder."""
        folder = self._make(path, stat.S_IFDIR | mode & _PERMISSIONS)
        folder.links = 2
        self._parent(path)[0].links += 1
        return 0

    def symlink(self, target: str, source: str) -> int:
        """Make a link at ``target`` that leads to ``source``."""
        data = os.fsencode(source)
        self._take(len(data))
        self._make(target, stat.S_IFLNK | 0o777).data = data
        return 0

    def link(self, target: str, source: str) -> int:
        """Give what is at ``source`` another name."""
        file = self._find(source)
        folder, name = self._parent(target)
        if name in folder.below:
            raise OSError(errno.EEXIST, target)
        folder.below[name] = file
        file.links += 1
        self._touch(folder)
        return 0

    def unlink(self, path: str) -> int:
        """Remove a name."""
        folder, name = self._parent(path)
        file = self._find(path)
        if stat.S_ISDIR(file.mode):
            raise OSError(errno.EISDIR, path)
        self._drop(folder, name, file)
        return 0

    def rmdir(self, path: str) -> int:
        """Remove an empty folder."""
        folder, name = self._parent(path)
        gone = self._folder(path)
        if gone.below:
            raise OSError(errno.ENOTEMPTY, path)
        self._drop(folder, name, gone)
        folder.links -= 1
        return 0

    def rename(self, old: str, new: str) -> int:
        """Move a name, over another one where there is one."""
        before, old_name = self._parent(old)
        after, new_name = self._parent(new)
        file = self._find(old)
        over = after.below.get(new_name)
        if over is file:
            return 0
        is_folder = stat.S_ISDIR(file.mode)
        if over is not None:
            if stat.S_ISDIR(over.mode) != is_folder:
                raise OSError(errno.ENOTDIR if is_folder else errno.EISDIR, new)
            if over.below:
                raise OSError(errno.ENOTEMPTY, new)
            self._drop(after, new_name, over)
            after.links -= is_folder
        del before.below[old_name]
        after.below[new_name] = file
        before.links -= is_folder
        after.links += is_folder
        self._touch(before, after)
        return 0

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """Write to a file."""
        del fh
        file = self._find(path)
        if offset + len(data) > len(file.data):
            self._resize(file, offset + len(data))
        file.data = file.data[:offset] + data + file.data[offset + len(data) :]
        self._touch(file)
        return len(data)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Cut a file, or make it longer with zeros."""
        del fh
        file = self._find(path)
        if not stat.S_ISREG(file.mode):
            raise OSError(errno.EINVAL, path)
        self._resize(file, length)
        self._touch(file)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        """Set permissions; of a node, too."""
        file = self._find(path)
        file.mode = stat.S_IFMT(file.mode) | mode & _PERMISSIONS
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        """Set owner and group, where they are not -1."""
        file = self._find(path)
        file.uid = uid if uid >= 0 else file.uid
        file.gid = gid if gid >= 0 else file.gid
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        """Set the time of the last change."""
        value = _NOW if times is None else int(times[1])
        if value != _OMIT:
            self._find(path).mtime_ns = time.time_ns() if value == _NOW else value
        return 0

    # --- extended attributes ---

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
        """Set an attribute of the kind that users set."""
        del options, position
        if not name.startswith(_ATTRIBUTES):
            raise OSError(errno.EOPNOTSUPP, path)
        file = self._find(path)
        self._take(len(name) + len(value))
        if sum(map(len, file.attributes.values())) + len(value) > _MAX_ATTRIBUTES:
            raise OSError(errno.ENOSPC, path)
        file.attributes[name] = bytes(value)
        return 0

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        """Tell an attribute."""
        del position
        value = self._find(path).attributes.get(name)
        if value is None:
            raise OSError(errno.ENODATA, path)
        return value

    def listxattr(self, path: str) -> Iterable[str]:
        """List attributes."""
        return list(self._find(path).attributes)

    def removexattr(self, path: str, name: str) -> int:
        """Remove an attribute."""
        if self._find(path).attributes.pop(name, None) is None:
            raise OSError(errno.ENODATA, path)
        return 0

    # --- inside ---

    def _find(self, path: str) -> _File:
        at = self._root
        for name in path.split("/"):
            if name:
                found = at.below.get(name)
                if found is None:
                    raise OSError(errno.ENOENT, path)
                at = found
        return at

    def _folder(self, path: str) -> _File:
        file = self._find(path)
        if not stat.S_ISDIR(file.mode):
            raise OSError(errno.ENOTDIR, path)
        return file

    def _parent(self, path: str) -> tuple[_File, str]:
        above, _, name = path.rpartition("/")
        return self._folder(above), name

    def _make(self, path: str, mode: int) -> _File:
        folder, name = self._parent(path)
        if name in folder.below:
            raise OSError(errno.EEXIST, path)
        if len(os.fsencode(name)) > _NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, path)
        if self._count >= MAX_FILES:
            raise OSError(errno.ENOSPC, path)
        uid, gid = self._caller()
        if folder.mode & stat.S_ISGID:
            gid = folder.gid
            mode |= stat.S_ISGID if stat.S_ISDIR(mode) else 0
        self._count += 1
        file = _File(mode, uid, gid, self._next)
        self._next += 1
        folder.below[name] = file
        self._touch(folder)
        return file

    def _drop(self, folder: _File, name: str, file: _File) -> None:
        del folder.below[name]
        file.links -= 1
        if file.links <= (1 if stat.S_ISDIR(file.mode) else 0):
            self._count -= 1
            self._bytes -= len(file.data)
        self._touch(folder)

    def _resize(self, file: _File, length: int) -> None:
        self._take(length - len(file.data))
        file.data = file.data[:length].ljust(length, b"\0")

    def _take(self, size: int) -> None:
        if self._bytes + size > MAX_BYTES:
            raise OSError(errno.ENOSPC, "all that /dev takes")
        self._bytes += size

    @staticmethod
    def _touch(*files: _File) -> None:
        for file in files:
            file.mtime_ns = time.time_ns()
