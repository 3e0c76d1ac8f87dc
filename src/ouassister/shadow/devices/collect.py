"""Makes the snapshot of /dev from a guest's memory: its devtmpfs, which is in memory alone.

Source: Linux v6.1 ``drivers/base/devtmpfs.c`` (a shmem file system, or a ramfs without
CONFIG_TMPFS); Documentation/admin-guide/devices.txt (what numbers mean).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any, Final

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.kernel.fields import read_string
from ouassister.kernel.tmpfs import TmpfsReader
from ouassister.shadow.served.snapshot import KINDS, MAX_NAME, MAX_NODES, Node
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ouassister.kernel import GuestReader

NODES: Final = {  # what programs cannot do without, and what reaches nothing
    b"null": (1, 3), b"zero": (1, 5), b"full": (1, 7), b"random": (1, 8), b"urandom": (1, 9),
    b"tty": (5, 0), b"ptmx": (5, 2),
}  # fmt: skip
FOLDERS: Final = {b"pts": 0o755, b"shm": 0o1777}
_TARGET: Final = b"/dev"
_KIND: Final = b"devtmpfs"
_MAX_FILE: Final = 1 << 20
_MAX_BYTES: Final = 16 << 20  # of all names and files
_MAX_NS: Final = 1 << 62
_MAX_IDS: Final = 65536  # that the user namespace has
_OVERFLOW_ID: Final = 65534
_STANDARD_NODE: Final = stat.S_IFCHR | 0o666
_PROBLEMS: Final = (UnsupportedGuestError, CorruptGuestError, PageAbsentError)


def collect(reader: GuestReader) -> tuple[list[Node], list[str]]:
    """Describe everything in the guest's devtmpfs.

    Args:
        reader: The guest's kernel.

    Returns:
        The tree, and what of it is not there or otherwise than in the guest.

    Raises:
        UnsupportedGuestError: The guest has no devtmpfs at /dev.
        CorruptGuestError: It is no tree.
        PageAbsentError: A part of the tree was never saved.
    """
    kernel = reader.kernel
    for target, sb in reader.tmpfs_mounts():
        if target == _TARGET and read_string(kernel, sb.s_type.name.value_(), 64) == _KIND:
            break
    else:
        raise UnsupportedGuestError("no devtmpfs is mounted at /dev in the guest")
    tmpfs = TmpfsReader(kernel)
    attributes = not tmpfs.is_ramfs(sb)
    left_out: list[str] = []
    tree = _Tree()
    found = sorted(tmpfs.inodes(tmpfs.root(sb)), key=lambda one: one[0].split(b"/"))
    for path, inode in found:
        try:
            one = tmpfs.describe(path, inode, left_out, attributes=attributes, counted=False)
            content = one.target
            if stat.S_ISREG(one.mode) and one.size:
                content = _content(tmpfs, inode, one.size)
        except _PROBLEMS as error:
            left_out.append(f"/dev{to_text(path)}: {error.message}")
            continue
        uid, gid = (owner if owner < _MAX_IDS else _OVERFLOW_ID for owner in (one.uid, one.gid))
        if not tree.add(
            path,
            Node(0, b"", one.mode, uid, gid, one.links, one.inode, max(one.size, 0),
                 os.makedev(one.major, one.minor), _bounded(one.mtime_ns), content),
        ):  # fmt: skip
            left_out.append(f"/dev{to_text(path)}: it has no place, or leads nowhere")
    left_out += tree.complete()
    return tree.nodes, left_out


def names_of(nodes: Sequence[Node]) -> dict[tuple[bool, int, int], bytes]:
    """Return what devices are called below /dev: by being a block device, and number.

    One that has two names has none here.
    """
    found: dict[tuple[bool, int, int], bytes | None] = {}
    paths: list[bytes] = []
    for node in nodes:
        path = (paths[node.parent] + b"/" + node.name) if paths else b""
        paths.append(path)
        if stat.S_ISBLK(node.mode) or stat.S_ISCHR(node.mode):
            key = (stat.S_ISBLK(node.mode), os.major(node.device), os.minor(node.device))
            found[key] = None if key in found else path[1:]
    return {key: name for key, name in found.items() if name is not None}


class _Tree:
    """Nodes with their places."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._places: dict[bytes, int] = {}
        self._most = 0
        self._left = _MAX_BYTES

    def add(self, path: bytes, node: Node) -> bool:
        """Add a node whose folder is there; tell whether it could be."""
        above, _, name = path.rpartition(b"/")
        if path == b"/":
            above, name = b"", b""
        parent = self._places.get(above or b"/")
        if self.nodes and (parent is None or not name or not stat.S_ISDIR(self.nodes[parent].mode)):
            return False
        if len(self.nodes) >= MAX_NODES or (stat.S_ISLNK(node.mode) and not node.content):
            return False
        self._left -= len(name) + len(node.content or b"")
        odd = stat.S_IFMT(node.mode) not in KINDS or len(name) > MAX_NAME
        if path in self._places or odd or self._left < 0:
            return False
        self._places[path] = len(self.nodes)
        self._most = max(self._most, node.number)
        self.nodes.append(node._replace(parent=parent or 0, name=name))
        return True

    def complete(self) -> list[str]:
        """Make sure of what the shadow itself needs; tell what the guest has otherwise."""
        changed = []
        if not self.nodes:
            raise CorruptGuestError("the guest's devtmpfs has no root")
        for name, (major, minor) in NODES.items():
            device = os.makedev(major, minor)
            if self._ensure(Node(0, name, _STANDARD_NODE, device=device)):
                changed.append(f"/dev/{to_text(name)}: the guest has none, or another")
        for name, mode in FOLDERS.items():
            if self._ensure(Node(0, name, stat.S_IFDIR | mode, links=2)):
                changed.append(f"/dev/{to_text(name)}: the guest has none, or another")
        return changed

    def _ensure(self, wanted: Node) -> bool:
        path = b"/" + wanted.name
        place = self._places.get(path)
        if place is None:
            self._most += 1
            return self.add(path, wanted._replace(number=self._most))
        has = self.nodes[place]
        is_same = stat.S_IFMT(has.mode) == stat.S_IFMT(wanted.mode)
        if is_same and (stat.S_ISDIR(has.mode) or has.device == wanted.device):
            return False
        below = any(node.parent == place for node in self.nodes[1:])
        if below:  # a folder where a device should be
            raise UnsupportedGuestError(f"{to_text(_TARGET + path)} is a folder in the guest")
        self.nodes[place] = wanted._replace(number=has.number)
        return True


def _bounded(time_ns: int) -> int:
    return time_ns if abs(time_ns) < _MAX_NS else 0


def _content(tmpfs: TmpfsReader, inode: Any, size: int) -> bytes:  # noqa: ANN401 - of drgn
    """Read a small file; there is none in a /dev that nobody put one into."""
    if size > _MAX_FILE:
        raise UnsupportedGuestError(f"a file of {size} bytes")
    content = bytearray(size)
    for extent in tmpfs.content(inode):
        if not isinstance(extent.data, bytes):
            raise UnsupportedGuestError(f"a page is {extent.data}")
        content[extent.position : extent.position + len(extent.data)] = extent.data
    return bytes(content)
