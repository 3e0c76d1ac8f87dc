"""The shadow's /sys as a file system: what stands in the snapshot, and nothing else.

A file whose content memory does not tell is there, with its mode and size: a script that asks for
its existence is answered. To open it for reading is an I/O error, which is told to the report.
What a program writes to an attribute is told, too, and changes nothing.

Source: Linux v6.1 ``fs/kernfs/file.c`` (``kernfs_fop_open``, ``kernfs_fop_write_iter``),
``fs/kernfs/dir.c`` (``kernfs_dir_iops``); libfuse 3 ``include/fuse.h``; mfusepy 3.1
(``Operations``).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ouassister.shadow.served.snapshot import Node

Entry: TypeAlias = tuple[str, dict[str, int], int]

_WRITES: Final = 0o222
_READS: Final = 0o444
_MAX_VALUE: Final = 4096  # a page: sysfs takes no more at once
POLICY: Final = frozenset(f"/kernel/security/apparmor/{name}" for name in (".load", ".replace"))
"""Where policies of AppArmor are loaded, of any size."""


class SysFiles:
    """The operations; names are the ones that mfusepy calls.

    Args:
        first: The root, and perhaps more of the snapshot: of a folder all that is in it, or
            nothing.
        load: Gives the snapshot; called when the first program looks for what that does not tell.
        wrote: Called with path and value when a program writes to an attribute.
        untold: Called once with the path of each file that a program read in vain.
    """

    use_ns = True

    def __init__(
        self,
        first: Sequence[Node],
        load: Callable[[], Sequence[Node]],
        wrote: Callable[[str, bytes], None],
        untold: Callable[[str], None],
    ) -> None:
        self._wrote = wrote
        self._untold = untold
        self._told: set[str] = set()
        self._load = load
        self._loaded = False
        self._nodes: dict[str, Node] = {}
        self._whole: set[str] = set()  # folders of which all names are known
        for path, above, node in _placed(first):
            self._nodes[path] = node
            if path != "/":
                self._whole.add(above)
        self._below: dict[str, list[Entry]] = {}

    def _look(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for path, above, node in _placed(self._load()):
            if path != "/":
                self._below[above].append(_entry(os.fsdecode(node.name), node))
            self._nodes[path] = node
            if stat.S_ISDIR(node.mode):
                self._below[path] = [_entry(".", node), _entry("..", node)]

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Tell type, mode, owner, size and number."""
        del fh
        return _attributes(self._node(path))

    def readlink(self, path: str) -> str:
        """Tell where a link leads to."""
        node = self._node(path)
        if not stat.S_ISLNK(node.mode):
            raise OSError(errno.EINVAL, path)
        return os.fsdecode(node.content or b"")

    def readdir(self, path: str, fh: int) -> list[Entry]:
        """List a folder, in the kernel's order."""
        del fh
        self._look()
        below = self._below.get(path)
        if below is None:
            raise OSError(errno.ENOTDIR, path)
        return below

    def open(self, path: str, flags: int) -> int:
        """Refuse what no attribute allows, whoever asks: mode bits bind root, too."""
        mode = self._node(path).mode
        access = flags & os.O_ACCMODE
        if access != os.O_RDONLY and not mode & _WRITES:
            raise OSError(errno.EACCES, path)
        if access != os.O_WRONLY and not mode & _READS:
            raise OSError(errno.EACCES, path)
        if access == os.O_RDONLY:
            self._content(path)  # programs take a file that cannot be opened for one that is absent
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read a piece of a file."""
        del fh
        return self._content(path)[offset : offset + size]

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """Take a value, as if something happened."""
        del offset, fh
        if len(data) > _MAX_VALUE and path not in POLICY:
            data = data[:_MAX_VALUE]
        self._wrote(path, data[:_MAX_VALUE].partition(b"\0")[0].rstrip(b"\n"))
        return len(data)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Do nothing, as a sysfs: what matters is the next write."""
        del length, fh
        if not self._node(path).mode & _WRITES:
            raise OSError(errno.EACCES, path)
        return 0

    # A sysfs has no operation to make or remove a file; the kernel's own answers.

    def mkdir(self, path: str, mode: int) -> int:
        """Refuse."""
        raise OSError(errno.EPERM, path, mode)

    def create(self, path: str, mode: int) -> int:
        """Refuse."""
        raise OSError(errno.EACCES, path, mode)

    def mknod(self, path: str, mode: int, dev: int) -> int:
        """Refuse."""
        raise OSError(errno.EPERM, path, (mode, dev))

    def unlink(self, path: str) -> int:
        """Refuse."""
        raise OSError(errno.EPERM, path)

    def rmdir(self, path: str) -> int:
        """Refuse."""
        raise OSError(errno.EPERM, path)

    def symlink(self, target: str, source: str) -> int:
        """Refuse."""
        raise OSError(errno.EPERM, target, source)

    def link(self, target: str, source: str) -> int:
        """Refuse."""
        raise OSError(errno.EPERM, target, source)

    def rename(self, old: str, new: str) -> int:
        """Refuse."""
        raise OSError(errno.EPERM, old, new)

    def chmod(self, path: str, mode: int) -> int:
        """Refuse: the guest's own would take it, and nothing would come of it here."""
        raise OSError(errno.EROFS, path, mode)

    def chown(self, path: str, uid: int, gid: int) -> int:
        """Refuse, as `chmod`."""
        raise OSError(errno.EROFS, path, (uid, gid))

    def statfs(self, path: str) -> dict[str, int]:
        """Tell what a sysfs tells: sizes of nothing."""
        del path
        return {"f_bsize": 4096, "f_frsize": 4096, "f_namemax": 255}

    def _content(self, path: str) -> bytes:
        content = self._node(path).content
        if content is None:
            if path not in self._told:
                self._told.add(path)
                self._untold(path)
            raise OSError(errno.EIO, path)
        return content

    def _node(self, path: str) -> Node:
        node = self._nodes.get(path)
        if node is not None and (self._loaded or stat.S_ISDIR(node.mode)):
            return node
        if node is not None or (path.rpartition("/")[0] or "/") not in self._whole:
            self._look()
            node = self._nodes.get(path)
        if node is None:
            raise OSError(errno.ENOENT, path)
        return node


def _placed(nodes: Sequence[Node]) -> Iterator[tuple[str, str, Node]]:
    """Each node with its path and that of its folder; the root is "/"."""
    paths: list[str] = []
    for node in nodes:
        above = paths[node.parent] if paths else ""
        path = f"{above}/{os.fsdecode(node.name)}" if paths else ""
        paths.append(path)
        yield path or "/", above or "/", node


def _attributes(node: Node) -> dict[str, Any]:
    return {
        "st_mode": node.mode,
        "st_uid": node.uid,
        "st_gid": node.gid,
        "st_nlink": node.links,
        "st_ino": node.number,
        "st_size": node.size,
        "st_rdev": node.device,
        "st_blksize": 4096,
        "st_mtime": node.mtime_ns,
        "st_atime": node.mtime_ns,
        "st_ctime": node.mtime_ns,
    }


def _entry(name: str, node: Node) -> Entry:
    return name, {"st_mode": node.mode, "st_ino": node.number}, 0
