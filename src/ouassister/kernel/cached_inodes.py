"""All inodes and directory entries that are cached of a file system on a block device.

Inodes come from the super block's own list: it holds those that no cached entry leads to, too
(deleted and still open, O_TMPFILE, entry dropped under memory pressure). A guest has tens of
thousands of them, so each is one read and one ``struct.unpack``.

Source: Linux v6.1 ``fs/super.c`` (``super_blocks``), ``fs/inode.c`` (``inode_sb_list_add``),
``include/linux/{fs,dcache,blk_types}.h``. A block device's mapping is its member since
224941e8379a ("use ->bd_mapping instead of ->bd_inode->i_mapping", v6.11), and its inode's
before. Children of a dentry are in a hash list since da549bdd15c2 (v6.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from drgn import TypeKind, sizeof

from ouassister.errors import CorruptGuestError
from ouassister.kernel import walk
from ouassister.kernel.fields import Fields, has_member, labels, offset, read_word, variable
from ouassister.kernel.program import guest_reads
from ouassister.model import VirtAddr
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drgn import Type

    from ouassister.kernel.program import Kernel

_SECOND: Final = 1_000_000_000
# The highest bit of a change time says that somebody has asked for it (I_CTIME_QUERIED), since
# "fs: add infrastructure for multigrain timestamps" (v6.13).
_NANOSECONDS: Final = (1 << 31) - 1
_MINOR_BITS: Final = 20  # include/linux/kdev_t.h
_MAX_SUPER_BLOCKS: Final = 1 << 15
_SWAPFILE: Final = 1 << 8  # S_SWAPFILE, include/linux/fs.h
_NAME_MAX: Final = 255
_MAX_SECONDS: Final = 1 << 33  # s_time_max of ext4 is below
# An inode that is being made or torn down is nobody's file.
_NEW_OR_GOING: Final = ("I_NEW", "I_WILL_FREE", "I_FREEING", "I_CLEAR")
_SMALLEST_INODE: Final = 256  # bytes: bounds how many there can be
_SMALLEST_DENTRY: Final = 128


@dataclass(frozen=True, slots=True)
class CachedFileSystem:
    """One mounted file system; ``device_head`` is the head of its block device's page cache."""

    address: int
    fstype: str
    major: int
    minor: int
    uuid: bytes
    block_size: int
    device_head: int
    label: str  # what the kernel calls it: "vda1"


class CachedInode(NamedTuple):
    """An inode in memory. Times are nanoseconds since the epoch.

    ``head`` is the head of its page cache, which has ``pages`` pages; ``marks`` tells that some
    are dirty or under write-back. ``lazy`` tells that its times are in memory alone (lazytime).
    ``alias`` leads to the first dentry that refers to it. ``swap`` tells that it is swapped to:
    past its page cache, whose pages are old then (mm/page_io.c).
    """

    address: int
    number: int
    mode: int
    uid: int
    gid: int
    links: int
    device: int  # of a character or block special file, as the kernel numbers it
    size: int
    generation: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    lazy: bool
    head: int
    marks: int
    pages: int
    operations: int  # a_ops of its page cache: one for each way of writing data
    alias: int
    swap: bool


class InodeCache:
    """Reads the inodes and dentries that one kernel has cached.

    Args:
        kernel: The kernel.

    Raises:
        UnsupportedGuestError: This kernel is laid out otherwise.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._inode_limit = kernel.memory.size_bytes // _SMALLEST_INODE
        self._dentry_limit = kernel.memory.size_bytes // _SMALLEST_DENTRY
        with guest_reads("reading the layout of inodes and dentries"):
            self._layout_of_supers()
            self._layout_of_inodes()
            self._layout_of_dentries()

    def _layout_of_supers(self) -> None:
        kernel = self._kernel
        self._supers = variable(kernel, "super_blocks")
        self._in_supers = offset(kernel, "struct super_block", "s_list")
        self._inodes = offset(kernel, "struct super_block", "s_inodes")
        self._super = Fields(kernel, "struct super_block", "s_dev", "s_blocksize", "s_type",
                             "s_bdev", "s_id")  # fmt: skip
        self._uuid = offset(kernel, "struct super_block", "s_uuid")
        self._type_name = offset(kernel, "struct file_system_type", "name")

    def _layout_of_inodes(self) -> None:
        kernel = self._kernel
        times = [
            member for which in ("atime", "mtime", "ctime") for member in _times(kernel, which)
        ]
        kind = kernel.type("struct inode").member("i_state").type
        state = "i_state"
        if kind.kind == TypeKind.STRUCT:  # "fs: hide ->i_state handling" (v6.19)
            state, kind = "i_state.__state", kind.member("__state").type
        self._going, self._dirty_time = _state_bits(kind)
        self._inode = Fields(
            kernel, "struct inode", "i_mode", "i_uid.val", "i_gid.val", "i_ino", "i_nlink",
            "i_rdev", "i_size", *times, state, "i_sb_list.next", "i_dentry.first",
            "i_data.i_pages.xa_flags", "i_data.i_pages.xa_head", "i_data.nrpages", "i_data.a_ops",
            "i_generation", "i_flags",
        )  # fmt: skip
        self._in_list = offset(kernel, "struct inode", "i_sb_list")

    def _layout_of_dentries(self) -> None:
        kernel = self._kernel
        children, sibling = "d_children", "d_sib"
        if not has_member(kernel, "struct dentry", children):
            children, sibling = "d_subdirs", "d_child"
        # Short names lie in the dentry itself, under another name since 61bc714cf0d7 (v6.15).
        short = (
            "d_iname" if has_member(kernel, "struct dentry", "d_iname") else "d_shortname.string"
        )
        self._dentry = Fields(kernel, "struct dentry", "d_hash.pprev", "d_name.len", "d_name.name",
                              "d_inode", short, f"{sibling}.next")  # fmt: skip
        self._short = offset(kernel, "struct dentry", short)
        self._sibling = offset(kernel, "struct dentry", sibling)
        self._children = offset(kernel, "struct dentry", children)
        # The union around it had a name up to v6.19 at least, and has none in v7.3.
        alias = "d_alias" if has_member(kernel, "struct dentry", "d_alias") else "d_u.d_alias"
        self._alias = offset(kernel, "struct dentry", alias)

    def file_systems(self) -> Iterator[CachedFileSystem]:
        """Yield the mounted file systems that lie on a block device."""
        kernel = self._kernel
        with guest_reads("listing the super blocks"):
            for node in walk.list_nodes(kernel, self._supers, _MAX_SUPER_BLOCKS):
                address = node - self._in_supers
                device, block_size, kind, bdev, label = self._super.read(address)
                if not bdev:
                    continue
                name = read_word(kernel, kind + self._type_name)
                yield CachedFileSystem(
                    address=address,
                    fstype=to_text(kernel.prog.read_c_string(name, max_size=64)),
                    major=device >> _MINOR_BITS,
                    minor=device & ((1 << _MINOR_BITS) - 1),
                    uuid=kernel.virtual.read(VirtAddr(address + self._uuid), 16),
                    block_size=block_size,
                    device_head=device_head(kernel, bdev),
                    label=to_text(label.partition(b"\0")[0]),
                )

    def inodes(self, one: CachedFileSystem) -> Iterator[CachedInode]:
        """Yield the inodes that are cached of a file system.

        Raises:
            CorruptGuestError: Their list does not come back to its head.
        """
        head = one.address + self._inodes
        seen = {head}
        node = read_word(self._kernel, head)
        while node != head:
            if node in seen or len(seen) > self._inode_limit:
                raise CorruptGuestError(f"the inodes of {one.label} have no end")
            seen.add(node)
            address = node - self._in_list
            (mode, uid, gid, number, links, device, size, a_s, a_ns, m_s, m_ns, c_s, c_ns, state,
             node, alias, flags, pages, count, operations, generation,
             attributes) = self._inode.read(address)  # fmt: skip
            if state & self._going:
                continue
            if max(map(abs, (a_s, m_s, c_s))) > _MAX_SECONDS:
                raise CorruptGuestError(f"inode {number} of {one.label} has a time of no calendar")
            yield CachedInode(
                address, number, mode, uid, gid, links, device, size, generation,
                a_s * _SECOND + a_ns, m_s * _SECOND + m_ns, c_s * _SECOND + (c_ns & _NANOSECONDS),
                bool(state & self._dirty_time), pages, flags >> 6, count, operations, alias,
                bool(attributes & _SWAPFILE),
            )  # fmt: skip

    def children(self, directory: CachedInode) -> Iterator[tuple[bytes, int]]:
        """Yield the cached entries of a directory: name, and address of the inode.

        The address is 0 where the kernel knows that there is no such file.

        Raises:
            CorruptGuestError: The entries have no end, or names that none can have.
        """
        if not directory.alias:
            return
        head = directory.alias - self._alias + self._children
        node = read_word(self._kernel, head)
        seen: set[int] = set()
        while node and node != head:
            if node in seen or self._dentry_limit < 0:
                raise CorruptGuestError(f"the entries of directory {directory.number} have no end")
            seen.add(node)
            self._dentry_limit -= 1
            address = node - self._sibling
            hashed, length, at, inode, short, node = self._dentry.read(address)
            if hashed:  # else it is deleted, or still being looked up
                if at == address + self._short and 0 < length < len(short):
                    name = short[:length]
                else:
                    name = self._long_name(at, length)
                yield _checked(name, directory.number), inode

    def _long_name(self, address: int, length: int) -> bytes:
        if not 0 < length <= _NAME_MAX:
            return b""
        return self._kernel.virtual.read(VirtAddr(address), length)


def device_head(kernel: Kernel, bdev: int) -> int:
    """Return the head of the page cache of a ``struct block_device``."""
    head = offset(kernel, "struct address_space", "i_pages.xa_head")
    if has_member(kernel, "struct block_device", "bd_mapping"):
        mapping = read_word(kernel, bdev + offset(kernel, "struct block_device", "bd_mapping"))
    else:
        inode = read_word(kernel, bdev + offset(kernel, "struct block_device", "bd_inode"))
        mapping = read_word(kernel, inode + offset(kernel, "struct inode", "i_mapping"))
    return read_word(kernel, mapping + head)


def _checked(name: bytes, directory: int) -> bytes:
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise CorruptGuestError(f"an entry of directory {directory} is named {name!r}")
    return name


def _state_bits(kind: Type) -> tuple[int, int]:
    """Return which bits of ``i_state`` say: no file yet or any more; times wait to be written.

    An enumeration names them ("fs: make the i_state flags an enum", v6.18). Before, the size of
    the number tells: 32 bits since "fs: reorder i_state bits" (v6.12), a long until then.
    """
    if kind.kind == TypeKind.ENUM:
        values = labels(kind)
        return sum(values[name] for name in _NEW_OR_GOING), values["I_DIRTY_TIME"]
    return (0x01 | 0x1C0 if sizeof(kind) == 4 else 0x08 | 0x70), 1 << 11


def _times(kernel: Kernel, which: str) -> tuple[str, str]:
    """Name the members of a time; see `ouassister.kernel.inodes` for how they moved."""
    if has_member(kernel, "struct inode", f"i_{which}_sec"):
        return f"i_{which}_sec", f"i_{which}_nsec"
    name = f"__i_{which}" if has_member(kernel, "struct inode", f"__i_{which}") else f"i_{which}"
    return f"{name}.tv_sec", f"{name}.tv_nsec"
