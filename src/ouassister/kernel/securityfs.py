"""The securityfs of a guest: what AppArmor's programs ask the kernel, and where they load policies.

All of it is held in the dentry cache, and what files say in tables of the kernel. Names are told in
the kernel's order: the name of the parser's cache is a sum over the features, in that order.

Source: Linux v6.1 ``security/inode.c`` (``securityfs_create_dentry``), ``security/security.c``
(``lsm_names``), ``security/apparmor/apparmorfs.c`` (``aa_sfs_seq_show``, ``seq_show_profile``,
``seq_ns_*_fops``), ``security/apparmor/include/apparmorfs.h`` (``struct aa_sfs_entry``),
``security/apparmor/label.c`` (``label_modename``), ``security/apparmor/include/policy.h``.
"""

from __future__ import annotations

import functools
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel import dentries, walk
from ouassister.kernel.fields import Fields, labels, offset, read_string, read_word, variable
from ouassister.kernel.paths import dentry_name, unhashed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drgn import Object

    from ouassister.kernel.program import Kernel

_MAX_NODES: Final = 1 << 14
_MAX_DEPTH: Final = 16
_MAX_PROFILES: Final = 1 << 14
_MAX_TEXT: Final = 4096
_MINOR_BITS: Final = 20
_MINOR: Final = (1 << _MINOR_BITS) - 1
_ENTRY: Final = "struct aa_sfs_entry"
_TABLE, _PROFILES, _MODULES = "aa_sfs_seq_file_ops", "aa_sfs_profiles_fops", "lsm_ops"
# Of who reads it: what updates a system is in the first name space, and in one alone.
_OF_READER: Final = {
    "seq_ns_stacked_fops": b"no\n", "seq_ns_nsstacked_fops": b"no\n",
    "seq_ns_level_fops": b"0\n", "seq_ns_name_fops": b"root\n",
}  # fmt: skip
SYMBOLS: Final = (_TABLE, _PROFILES, _MODULES, *_OF_READER, "root_ns", "lsm_names")


class SecurityFile(NamedTuple):
    """One file.

    Attributes:
        parent: Index of its folder.
        name: Its name there.
        mode: Type and permissions.
        uid: Owner.
        gid: Group.
        links: Number of links.
        number: Number of the inode.
        device: Number of a device (``dev_t`` of user space).
        content: Target of a link, bytes of a file; None where memory does not tell.
    """

    parent: int
    name: bytes
    mode: int
    uid: int
    gid: int
    links: int
    number: int
    device: int
    content: bytes | None


class Security:
    """Describes the files of a securityfs.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._inode = Fields(kernel, "struct inode", "i_mode", "i_ino", "i_uid.val", "i_gid.val",
                             "i_nlink", "i_rdev", "i_fop", "i_private", "i_link")  # fmt: skip
        self._rendered: dict[int, Callable[[int], bytes]] = {}
        for name, render in (
            (_TABLE, self._entry),
            (_PROFILES, lambda _private: self._profiles()),
            (_MODULES, lambda _private: self._modules()),
            *((name, lambda _private, told=told: told) for name, told in _OF_READER.items()),
        ):
            if (address := kernel.symbols.address(name)) is not None:
                self._rendered[address] = render

    def read(self, root: Object, parent: int, first: int) -> Iterator[SecurityFile]:
        """Yield what is below the root.

        Args:
            root: ``struct dentry *``.
            parent: Index of the folder that it is mounted on.
            first: Index of what comes first.

        Raises:
            CorruptGuestError: It is too deep, too large, or contains itself.
        """
        seen: set[int] = set()
        folders = [(root, parent, 0)]
        index = first
        while folders:
            folder, above, depth = folders.pop(0)
            for child in dentries.children(self._kernel, folder):
                inode = child.d_inode.value_()
                if unhashed(child) or not inode:
                    continue
                if depth > _MAX_DEPTH or len(seen) > _MAX_NODES or child.address_ in seen:
                    raise CorruptGuestError("securityfs is too deep, too large, or cyclic")
                seen.add(child.address_)
                node = self._node(above, dentry_name(child), inode)
                if stat.S_ISDIR(node.mode):
                    folders.append((child.address_of_(), index, depth + 1))
                yield node
                index += 1

    def _node(self, parent: int, name: bytes, inode: int) -> SecurityFile:
        (mode, number, uid, gid, links, device, operations, private,
         link) = self._inode.read(inode)  # fmt: skip
        content: bytes | None = None
        if stat.S_ISLNK(mode):
            # One without a text jumps to a file system that is mounted nowhere.
            content = read_string(self._kernel, link, _MAX_TEXT) if link else None
        elif stat.S_ISREG(mode) and operations in self._rendered:
            content = self._rendered[operations](private)
        device = os.makedev(device >> _MINOR_BITS, device & _MINOR)
        return SecurityFile(parent, name, mode, uid, gid, links, number, device, content)

    def _entry(self, private: int) -> bytes:
        """A value of AppArmor's table."""
        kinds, kind_at, boolean, number, text = self._layout
        (kind,) = kind_at.read(private)
        if kind == kinds["AA_SFS_TYPE_BOOLEAN"]:
            return b"yes\n" if boolean.read(private)[0] else b"no\n"
        if kind == kinds["AA_SFS_TYPE_U64"]:
            (value,) = number.read(private)
            return b"%#08x\n" % value if value else b"00000000\n"
        if kind == kinds["AA_SFS_TYPE_STRING"]:
            return read_string(self._kernel, text.read(private)[0], _MAX_TEXT) + b"\n"
        raise UnsupportedGuestError(f"a value of AppArmor's is of kind {kind}")

    @functools.cached_property
    def _layout(self) -> tuple[dict[str, int], Fields, Fields, Fields, Fields]:
        kernel = self._kernel
        return (
            labels(kernel.type("enum aa_sfs_type")),
            Fields(kernel, _ENTRY, "v_type"),
            Fields(kernel, _ENTRY, "v.boolean"),
            Fields(kernel, _ENTRY, "v.u64"),
            Fields(kernel, _ENTRY, "v.string"),
        )

    def _modules(self) -> bytes:
        return read_string(
            self._kernel, read_word(self._kernel, variable(self._kernel, "lsm_names")), _MAX_TEXT
        )

    def _profiles(self) -> bytes:
        """The profiles that are loaded, each followed by those in it."""
        kernel = self._kernel
        below = offset(kernel, "struct aa_policy", "profiles")
        hangs = offset(kernel, "struct aa_policy", "list")
        space = read_word(kernel, variable(kernel, "root_ns"))
        base = offset(kernel, "struct aa_profile", "base")
        profile = Fields(kernel, "struct aa_profile", "base.hname", "mode")
        modes = {
            value: name.removeprefix("APPARMOR_").lower().encode()
            for name, value in labels(kernel.type("enum profile_mode")).items()
        }
        lines: list[bytes] = []
        stack = [iter(walk.list_nodes(kernel, space + offset(kernel, "struct aa_ns", "base")
                                      + below, _MAX_PROFILES))]  # fmt: skip
        while stack:
            node = next(stack[-1], None)
            if node is None:
                stack.pop()
                continue
            if len(lines) >= _MAX_PROFILES or len(stack) > _MAX_DEPTH:
                raise CorruptGuestError("AppArmor has too many profiles, or too deep ones")
            name, mode = profile.read(node - hangs - base)
            lines.append(b"%s (%s)\n" % (read_string(kernel, name, _MAX_TEXT),
                                         modes.get(mode, b"-")))  # fmt: skip
            stack.append(iter(walk.list_nodes(kernel, node - hangs + below, _MAX_PROFILES)))
        return b"".join(lines)
