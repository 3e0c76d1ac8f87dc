"""The shadow's /proc as a file system: the guest's part from a snapshot, own processes by links.

What is read of the guest is what was rendered. A folder of an own process holds links into the
kernel's own procfs of the shadow's pid namespace, which is mounted at a folder of this file system
that no listing shows: everything in there is the real thing, magic links included. `exe`, `cwd` and
`root` are links as the kernel shows them, since programs read their text; the mounts are the
guest's.

Source: libfuse 3 ``include/fuse.h``; mfusepy 3.1 (``Operations``).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ouassister.shadow.procfs.snapshot import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Entry: TypeAlias = tuple[str, dict[str, int], int]

OWN: Final = ".own"  # where the real procfs is mounted
CALLERS: Final = ("self", "thread-self")  # the real procfs's, mounted one by one over these
_TEXTS: Final = frozenset(("exe", "cwd", "root"))
_GUESTS: Final = ("mounts", "mountinfo")  # of its first process, for all
_FIRST: Final = "1"
_DELETED: Final = " (deleted)"
_MAX_VALUE: Final = 65536  # fs/proc/proc_sysctl.c, proc_sys_call_handler: KMALLOC_MAX_SIZE
_OWN_FOLDER: Final = Node(stat.S_IFDIR | 0o555, 0, 0)
_NAMELESS: Final = re.compile(rb"([a-z_]+):\[(?:([0-9]{1,19})|[^/]*)\]")
_HOLDERS: Final = re.compile(r"/[0-9]+/(?:ns|fd)")
_KINDS: Final = {b"socket": stat.S_IFSOCK, b"pipe": stat.S_IFIFO}
_LINK: Final = stat.S_IFLNK | 0o777


class ProcFiles:
    """The operations; names are the ones that mfusepy calls.

    Args:
        nodes: The snapshot.
        real: Descriptor of the root of the real procfs.
        wrote: Called with name and value when a program writes a value below ``sys``.
    """

    use_ns = True

    def __init__(
        self, nodes: Mapping[bytes, Node], real: int, wrote: Callable[[str, bytes], None]
    ) -> None:
        self._nodes = {f"/{os.fsdecode(path)}": node for path, node in nodes.items()}
        self._nodes["/"] = _OWN_FOLDER
        self._nodes[f"/{OWN}"] = _OWN_FOLDER
        self._real = real
        self._wrote = wrote
        self._numbers: dict[str, int] = {}
        self._below: dict[str, list[str]] = {"/": [], f"/{OWN}": []}
        for name in CALLERS:
            self._nodes[f"/{name}"] = Node(_LINK, 0, 0, b".")
        self._targets: dict[str, dict[str, Any]] = {}
        for path, node in self._nodes.items():
            above, _, name = path.rpartition("/")
            if stat.S_ISLNK(node.mode) and (found := _target(above, node)) is not None:
                self._targets.setdefault(*found)
            if name and name != OWN:
                self._below.setdefault(above or "/", []).append(name)
            if stat.S_ISDIR(node.mode):
                self._below.setdefault(path, [])
            self._numbers[path] = len(self._numbers) + 1

    # --- what there is ---

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Tell type, mode and owner; every size is 0, as in a procfs."""
        del fh
        node = self._nodes.get(path)
        if node is None:
            return self._targets.get(path) or self._own_attributes(path)
        return {
            "st_mode": node.mode,
            "st_uid": node.uid,
            "st_gid": node.gid,
            "st_nlink": 2 if stat.S_ISDIR(node.mode) else 1,
            "st_ino": self._numbers[path],
            "st_size": len(node.content) if stat.S_ISLNK(node.mode) else 0,
        }

    def _own_attributes(self, path: str) -> dict[str, Any]:
        pid, name = self._own(path)
        try:
            if not name:
                found = os.stat(pid, dir_fd=self._real)
                mode, links = found.st_mode, found.st_nlink
            else:
                found = os.stat(f"{pid}/{name}", dir_fd=self._real, follow_symlinks=False)
                mode, links = (stat.S_IFREG | 0o444 if name in _GUESTS else _LINK), 1
        except OSError as error:
            raise OSError(_gone(error), path) from error
        return {
            "st_mode": mode,
            "st_uid": found.st_uid,
            "st_gid": found.st_gid,
            "st_nlink": links,
            "st_ino": found.st_ino | 1 << 40,
            "st_size": 0,
        }

    def readlink(self, path: str) -> str:
        """Tell where a link leads to."""
        node = self._nodes.get(path)
        if node is not None:
            if not stat.S_ISLNK(node.mode):
                raise OSError(errno.EINVAL, path)
            return os.fsdecode(node.content)
        pid, name = self._own(path)
        if name == "net":
            return f"../{_FIRST}/net"
        if name in _TEXTS:
            try:
                text = os.readlink(f"{pid}/{name}", dir_fd=self._real)
            except OSError as error:
                raise OSError(_gone(error), path) from error
            if not text.endswith(_DELETED):
                return text
        return f"../{OWN}/{pid}/{name}"  # what has no name is still there to be opened

    def readdir(self, path: str, fh: int) -> list[Entry]:
        """List a folder, with types."""
        del fh
        below = self._below.get(path)
        if below is None:
            return self._own_folder(path)
        base = "" if path == "/" else path
        found = []
        for name in below:
            inside = f"{base}/{name}"
            found.append(_entry(name, self._nodes[inside].mode, self._numbers[inside]))
        if path == "/":
            found += [
                _entry(name, stat.S_IFDIR)
                for name in os.listdir(self._real)  # noqa: PTH208 - a descriptor
                if name.isdecimal() and f"/{name}" not in self._nodes
            ]
        return [_entry(".", stat.S_IFDIR), _entry("..", stat.S_IFDIR), *found]

    def _own_folder(self, path: str) -> list[Entry]:
        pid, name = self._own(path)
        if name:
            raise OSError(errno.ENOTDIR, path)
        try:
            folder = os.open(pid, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._real)
        except OSError as error:
            raise OSError(_gone(error), path) from error
        try:
            names = os.listdir(folder)  # noqa: PTH208 - a descriptor
        except OSError as error:
            raise OSError(_gone(error), path) from error
        finally:
            os.close(folder)
        kinds = ((name, stat.S_IFREG if name in _GUESTS else stat.S_IFLNK) for name in names)
        return [_entry(name, kind) for name, kind in kinds]

    def _own(self, path: str) -> tuple[str, str]:
        """Split a path into an own process's pid and what is asked of it.

        Raises:
            OSError: It is no such path. A pid of the guest hides the shadow's process of that
                number, which is the first one alone.
        """
        _, pid, *rest = path.split("/")
        if not pid.isdecimal() or len(rest) > 1 or f"/{pid}" in self._nodes:
            raise OSError(errno.ENOENT, path)
        return pid, rest[0] if rest else ""

    # --- contents ---

    def open(self, path: str, flags: int) -> int:
        """Let a file be read, and a value below ``sys`` be written."""
        if path in self._targets:
            raise OSError(errno.EACCES, path)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes and not path.startswith("/sys/"):
            raise OSError(errno.EACCES, path)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read a piece of a file."""
        del fh
        node = self._nodes.get(path)
        if node is None:
            _, name = self._own(path)
            node = self._nodes.get(f"/{_FIRST}/{name}")
            if node is None:
                raise OSError(errno.ENOENT, path)
        return node.content[offset : offset + size]

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """Take a value, as if it were set; the host's stays as it is.

        A sysctl ignores writes behind the first byte, strictly (``sysctl_writes_strict``).
        """
        del fh
        node = self._nodes[path]
        if offset:
            return len(data)
        if len(data) > _MAX_VALUE:
            raise OSError(errno.EINVAL, path)
        value = data.partition(b"\0")[0].rstrip(b"\n")
        self._wrote(path.removeprefix("/sys/"), value)
        self._nodes[path] = Node(node.mode, node.uid, node.gid, value + b"\n")
        return len(data)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Do nothing, as a procfs: what matters is the next write."""
        del length, fh
        if not path.startswith("/sys/"):
            raise OSError(errno.EACCES, path)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        """Tell what a procfs tells: sizes of nothing."""
        del path
        return {"f_bsize": 4096, "f_frsize": 4096, "f_namemax": 255}


def _target(folder: str, node: Node) -> tuple[str, dict[str, Any]] | None:
    """Make what a link such as ``socket:[7]`` leads to; none leads to it but that link.

    stat(2) through the link of a real procfs tells type and number of what is open, or of the
    namespace; ps(1), lsns(8), lsof(8) and fuser(1) compare them.
    """
    match = _NAMELESS.fullmatch(node.content)
    if match is None or not _HOLDERS.fullmatch(folder):
        return None
    kind = _KINDS.get(match[1], stat.S_IFREG)
    attributes = {
        "st_mode": kind | (0o777 if kind == stat.S_IFSOCK else 0o444),
        "st_uid": node.uid,
        "st_gid": node.gid,
        "st_nlink": 1,
        "st_ino": int(match[2] or 1),
        "st_size": 0,
    }
    return f"{folder}/{os.fsdecode(node.content)}", attributes


def _entry(name: str, mode: int, number: int = 1) -> Entry:
    """Make what a listing holds; readdir(3) leaves out what has no number."""
    return name, {"st_mode": mode, "st_ino": number}, 0


def _gone(error: OSError) -> int:
    """What to answer when the real procfs refuses: a process that ended is not there."""
    return errno.ENOENT if error.errno in (errno.ESRCH, errno.ENOENT) else errno.EACCES
