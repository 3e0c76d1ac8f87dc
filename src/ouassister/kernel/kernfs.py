"""The tree of sysfs: names, kinds, modes and links of all that a kernel shows below /sys.

A directory belongs to a kobject, a file to an attribute of it; both are kept as addresses, for
those who know what they are. Children hang in a red-black tree, in the order in which readdir(3)
tells them.

Source: Linux v6.1 ``include/linux/kernfs.h`` (``struct kernfs_node``, ``enum kernfs_node_type``,
``KERNFS_*``), ``fs/kernfs/dir.c`` (``kernfs_active``, ``kernfs_dir_pos``), ``fs/kernfs/inode.c``
(``kernfs_refresh_inode``), ``fs/kernfs/symlink.c`` (``kernfs_get_target_path``),
``fs/sysfs/mount.c`` (``sysfs_root_kn``). The parent is ``__parent`` since 633488947ef6 ("kernfs:
Use RCU to access kernfs_node::parent", v6.15).
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel.fields import Fields, has_member, offset, read_string, read_word, variable
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ouassister.kernel.program import Kernel

MAX_NODES: Final = 1 << 17
_MAX_PATHS: Final = 64 << 20  # bytes of all paths; a small server has half a million
_MAX_LINKS: Final = 0xFFFF_FFFF
_MAX_DEPTH: Final = 64
_NAME_MAX: Final = 255
_DIR, _FILE, _LINK = 1, 2, 4
_KIND: Final = 0x0F
_MODES: Final = {_DIR: stat.S_IFDIR, _FILE: stat.S_IFREG, _LINK: stat.S_IFLNK}
_PERMISSIONS: Final = 0o7777
_SIGN: Final = 1 << 31


class KernfsNode(NamedTuple):
    """One directory, file or link.

    Attributes:
        parent: Index of its directory, which comes before it; the root's is its own.
        name: Its name; the root has none.
        mode: Type and permissions.
        uid: Owner.
        gid: Group.
        links: Number of links.
        number: Number of the inode.
        size: What stat(2) says.
        private: Address of the kobject, or of the attribute.
        target: Index of what a link leads to; None where that is not in the tree.
    """

    parent: int
    name: bytes
    mode: int
    uid: int
    gid: int
    links: int
    number: int
    size: int
    private: int
    target: int | None


class Kernfs:
    """The sysfs of one kernel.

    Args:
        kernel: The kernel.

    Raises:
        UnsupportedGuestError: This kernel lays it out otherwise.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        with guest_reads("reading the layout of sysfs"):
            of = "struct kernfs_node"
            parent = "__parent" if has_member(kernel, of, "__parent") else "parent"
            if offset(kernel, of, "dir.subdirs") != offset(kernel, of, "symlink.target_kn"):
                raise UnsupportedGuestError("a link of sysfs is laid out otherwise")
            # What lies in dir.subdirs is the target in a link.
            self._node = Fields(kernel, of, "active.counter", parent, "name", "rb.rb_right",
                                "rb.rb_left", "ns", "dir.subdirs", "dir.children.rb_node",
                                "attr.size", "priv", "id", "flags", "mode", "iattr")  # fmt: skip
            self._rb = offset(kernel, of, "rb")
            self._owner = Fields(kernel, "struct kernfs_iattrs", "ia_uid.val", "ia_gid.val")
            network = variable(kernel, "init_net")
            tag = offset(kernel, "struct net", "ns")
            self._spaces = (0, network, network + tag)

    def read(self, skip: Callable[[bytes], bool] = lambda _path: False) -> list[KernfsNode]:
        """Read the tree, as the first network namespace sees it.

        Args:
            skip: Tells of the path of a directory (``/kernel/slab``) whether to leave out what is
                in it.

        Raises:
            CorruptGuestError: The tree contains itself, is too deep, or too large.
        """
        with guest_reads("reading the tree of sysfs"):
            return self._read(
                read_word(self._kernel, variable(self._kernel, "sysfs_root_kn")), skip
            )

    def _read(self, root: int, skip: Callable[[bytes], bool]) -> list[KernfsNode]:
        found: list[KernfsNode] = []
        places: dict[int, int] = {}
        targets: dict[int, int] = {}
        named: set[tuple[int, bytes]] = set()
        left = _MAX_PATHS
        waiting = [(root, 0, b"", 0, self._node.read(root))]
        while waiting:
            address, parent, path, depth, values = waiting.pop()
            index = len(found)
            if address in places or depth > _MAX_DEPTH or index >= MAX_NODES:
                raise CorruptGuestError("the tree of sysfs is too deep, too large, or cyclic")
            places[address] = index
            (_, _, name_at, _, _, _, word, children, size, private, number, flags, mode,
             attributes) = values  # fmt: skip
            kind = flags & _KIND
            if kind not in _MODES:
                raise CorruptGuestError(f"a node of sysfs is of kind {kind}")
            name = read_string(self._kernel, name_at, _NAME_MAX) if depth else b""
            if depth and (not name or name in (b".", b"..") or b"/" in name):
                raise CorruptGuestError(f"a node of sysfs is named {name!r}")
            left -= len(path) + len(name) + 1
            if (parent, name) in named or left < 0:
                raise CorruptGuestError(f"too much in sysfs, or twice: {name!r}")
            named.add((parent, name))
            uid, gid = self._owner.read(attributes) if attributes else (0, 0)
            is_folder = kind == _DIR
            found.append(
                KernfsNode(
                    parent,
                    name,
                    _MODES[kind] | mode & _PERMISSIONS,
                    uid,
                    gid,
                    min(word + 2, _MAX_LINKS) if is_folder else 1,
                    number,
                    size if kind == _FILE else 0,
                    private,
                    None,
                )
            )
            if kind == _LINK:
                targets[index] = word
            elif is_folder and children:
                path = path + b"/" + name if depth else b""
                if not skip(path):
                    below = [
                        (node, index, path, depth + 1, read) for node, read in self._below(children)
                    ]
                    waiting.extend(reversed(below))
        for index, address in targets.items():
            if (place := places.get(address)) is not None:
                found[index] = found[index]._replace(target=place)
        return found

    def _below(self, root: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield address and members of the nodes of a red-black tree that can be seen, in order."""
        seen: set[int] = set()
        stack: list[tuple[int, tuple[int, ...]]] = []
        at = root
        while stack or at:
            while at:
                if at in seen or len(seen) >= MAX_NODES:
                    raise CorruptGuestError("a directory of sysfs contains itself")
                seen.add(at)
                values = self._node.read(at - self._rb)
                stack.append((at - self._rb, values))
                at = values[4]
            address, values = stack.pop()
            # A node that is being made or removed is not active.
            if not values[0] & _SIGN and values[5] in self._spaces:
                yield address, values
            at = values[3]


def path_of(nodes: list[KernfsNode], index: int) -> bytes:
    """Return the path of a node from the root of sysfs; the root's is ``b""``."""
    parts = []
    while index:
        parts.append(nodes[index].name)
        index = nodes[index].parent
    return b"".join(b"/" + part for part in reversed(parts))


def link_text(nodes: list[KernfsNode], index: int) -> bytes | None:
    """Return what readlink(2) says of a link; None where its target is not in the tree.

    The way leads up to the first directory that is above the target, not to the target itself.
    """
    target = nodes[index].target
    if target is None:
        return None
    above = {0}
    at = nodes[target].parent
    while at:
        above.add(at)
        at = nodes[at].parent
    base, ups = nodes[index].parent, 0
    while base not in above:
        base, ups = nodes[base].parent, ups + 1
    parts = []
    at = target
    while at != base:
        parts.append(nodes[at].name)
        at = nodes[at].parent
    return b"../" * ups + b"/".join(reversed(parts))
