"""What tmpfs contains: it exists in memory alone.

Every file of a tmpfs is held in the dentry cache until it is deleted, so that walking the cache
from the root finds all. A page is in the page cache, in a swap area, or a hole.

Source: Linux v6.1 ``mm/shmem.c`` (``shmem_symlink``, ``shmem_get_folio_gfp``,
``shmem_initxattrs``), ``include/linux/shmem_fs.h``, ``include/linux/xattr.h``,
``include/linux/posix_acl.h``, ``include/uapi/linux/posix_acl_xattr.h``. A page that is not up to
date was allocated by fallocate and never written: it reads as zeros. Extended attributes are in a
tree since 3b4c7bc01727 ("xattr: use rbtree for simple_xattrs", v6.2), in a list before; v7.3 has
them in a list again, next to a hash table that all files share.
"""

from __future__ import annotations

import functools
import stat
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from drgn import Object

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.guest_model import Tmpfs, TmpfsNode, VirtAddr
from ouassister.kernel import dentries, walk
from ouassister.kernel.fields import Fields, has_member, offset, read_string
from ouassister.kernel.page_frames import PAGE_SIZE, PageFrames
from ouassister.kernel.program import guest_reads
from ouassister.kernel.xarray import XArrays
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ouassister.kernel.program import Kernel

_MINOR_BITS: Final = 20
_SYMLINK_MAX: Final = 4096
_MAX_XATTRS: Final = 4096  # of one file
_XATTR_SIZE_MAX: Final = 65536
_MAX_ACL_ENTRIES: Final = 8192
_SWAP_FACTOR: Final = 8
_TIMES: Final = ("atime", "mtime", "ctime")
_SECOND: Final = 1_000_000_000
_NANOSECONDS: Final = (1 << 31) - 1
_ACL_VERSION: Final = 2  # POSIX_ACL_XATTR_VERSION
_ACL_UNDEFINED_ID: Final = 0xFFFF_FFFF
_ACL_USER, _ACL_GROUP = 0x02, 0x08
_NO_ACL: Final = (0, (1 << 64) - 1)  # none, ACL_NOT_CACHED


class Where(StrEnum):
    """Where a page is when its bytes are not here."""

    SWAPPED = "swapped out"
    ABSENT = "absent from the save"


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file; what lies between extents is a hole, which reads as zeros."""

    position: int
    data: bytes | Where  # one page when it is not here
    size: int


class TmpfsReader:
    """The tmpfs of one kernel.

    Args:
        kernel: The kernel.

    Raises:
        UnsupportedGuestError: This kernel lays them out otherwise.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        with guest_reads("reading the layout of tmpfs"):
            # More pages than there are (and as many again are swapped out) are in no file.
            self._max_pages = _SWAP_FACTOR * kernel.memory.size_bytes // PAGE_SIZE
            self._counts: dict[int, tuple[int, int]] = {}
            self._total = 0
            self._frames = PageFrames(kernel)
            self._arrays = XArrays(kernel)
            self._mapping = Fields(kernel, "struct inode", "i_mapping")
            self._head = Fields(kernel, "struct address_space", "i_pages.xa_head")
            self._inode = Fields(kernel, "struct inode", "i_mode", "i_ino", "i_uid.val",
                                 "i_gid.val", "i_nlink", "i_size", "i_rdev", "i_acl",
                                 "i_default_acl", "i_link")  # fmt: skip
            self._vfs_inode = offset(kernel, "struct shmem_inode_info", "vfs_inode")
            self._xattrs = offset(kernel, "struct shmem_inode_info", "xattrs")
            self._xattr = Fields(kernel, "struct simple_xattr", "name", "size")
            self._xattr_value = offset(kernel, "struct simple_xattr", "value")

    def read(self, target: bytes, sb: Object) -> Tmpfs:
        """Describe all files of a tmpfs, a devtmpfs or a ramfs (which has no attributes).

        Args:
            target: Where it is mounted.
            sb: ``struct super_block *``.
        """
        unread: list[str] = []
        self._counts.clear()
        self._total = 0
        ram = self.is_ramfs(sb)
        nodes = [
            self.describe(path, inode, unread, attributes=not ram)
            for path, inode in self.inodes(self.root(sb))
        ]
        return self.tree(target, sb, nodes, unread)

    def is_ramfs(self, sb: Object) -> bool:
        """Tell whether it is a ramfs: no limits, no attributes."""
        with guest_reads("reading the super block of a tmpfs"):
            return read_string(self._kernel, sb.s_type.name.value_(), 64) == b"ramfs"

    def root(self, sb: Object) -> Object:
        """``struct dentry *`` of its root."""
        with guest_reads("reading the super block of a tmpfs"):
            return sb.s_root.read_()

    def tree(
        self, target: bytes, sb: Object, nodes: Iterable[TmpfsNode], unread: Iterable[str]
    ) -> Tmpfs:
        """Make the description of one from that of its files."""
        with guest_reads("reading the super block of a tmpfs"):
            device = sb.s_dev.value_()
        return Tmpfs(
            target=target,
            major=device >> _MINOR_BITS,
            minor=device & ((1 << _MINOR_BITS) - 1),
            nodes=tuple(sorted(nodes, key=lambda node: node.path)),
            unread=tuple(unread),
        )

    def inodes(self, root: Object) -> Iterator[tuple[bytes, Object]]:
        """Yield path and ``struct inode *`` of every file; a file with several names as often."""
        for path, dentry in dentries.below(self._kernel, root, b"/"):
            inode = dentry.d_inode.read_()
            if inode:
                yield path, inode

    def content(self, inode: Object) -> Iterator[Extent]:
        """Yield what a regular file contains, up to its size; holes are left out.

        Raises:
            CorruptGuestError: Its page cache contradicts itself.
        """
        with guest_reads("reading the pages of a file in tmpfs"):
            size = inode.i_size.value_()
            (mapping,) = self._mapping.read(inode.value_())
            left = self._max_pages
            for first, count, entry in self._arrays.entries(self._head.read(mapping)[0]):
                for index in range(first, first + count):
                    position = index * PAGE_SIZE
                    if position >= size:  # fallocate may keep pages behind the end
                        return
                    left -= 1
                    if left < 0:
                        raise CorruptGuestError("a tmpfs has more pages than there is memory")
                    length = min(PAGE_SIZE, size - position)
                    if entry & 1:
                        yield Extent(position, Where.SWAPPED, length)
                        continue
                    try:
                        data = self._frames.read(entry, mapping, index)
                    except PageAbsentError:
                        yield Extent(position, Where.ABSENT, length)
                        continue
                    if data is not None:
                        yield Extent(position, data[:length], length)

    def describe(
        self,
        path: bytes,
        inode: Object,
        unread: list[str],
        *,
        attributes: bool,
        counted: bool = True,
    ) -> TmpfsNode:
        """Describe one file.

        Args:
            path: Its name.
            inode: ``struct inode *``.
            unread: Takes what could not be told.
            attributes: Files of this kind have extended attributes.
            counted: Count the pages that are not there, for which all of them are looked up.
        """
        with guest_reads(f"reading {to_text(path)} of a tmpfs"):
            (mode, number, uid, gid, links, size, device, acl, default_acl,
             link) = self._inode.read(inode.value_())  # fmt: skip
            (atime, atime_ns, mtime, mtime_ns, ctime,
             ctime_ns) = self._times.read(inode.value_())  # fmt: skip
            swapped = absent = 0
            xattrs: tuple[tuple[bytes, bytes], ...] = ()
            try:
                if attributes:
                    xattrs = self._attributes(inode, acl, default_acl)
            except UnsupportedGuestError as error:
                unread.append(f"attributes of {to_text(path)}: {error.message}")
            target = None
            if stat.S_ISREG(mode) and counted:
                swapped, absent = self._count(inode)
            elif stat.S_ISLNK(mode):
                target, swapped, absent = self._target(inode, link, size)
            if swapped or absent:
                unread.append(
                    f"{to_text(path)}: {swapped} pages are swapped out, {absent} absent from"
                    " the save"
                )
            return TmpfsNode(
                path=path,
                inode=number,
                mode=mode,
                uid=uid,
                gid=gid,
                links=links,
                size=size,
                major=device >> _MINOR_BITS,
                minor=device & ((1 << _MINOR_BITS) - 1),
                atime_ns=atime * _SECOND + atime_ns,
                mtime_ns=mtime * _SECOND + mtime_ns,
                # The highest bit says that somebody asked for it, since 4e40eff0b573 (v6.13).
                ctime_ns=ctime * _SECOND + (ctime_ns & _NANOSECONDS),
                target=target,
                xattrs=xattrs,
                swapped=swapped,
                absent=absent,
            )

    def _count(self, inode: Object) -> tuple[int, int]:
        """Count the pages of a file that are swapped out, or absent; each file once."""
        key = inode.value_()
        if key not in self._counts:
            total = swapped = absent = 0
            for extent in self.content(inode):
                total += 1
                swapped += extent.data is Where.SWAPPED
                absent += extent.data is Where.ABSENT
            self._counts[key] = (swapped, absent)
            self._total += total
            if self._total > self._max_pages:
                raise CorruptGuestError("a tmpfs has more pages than there is memory")
        return self._counts[key]

    def _target(self, inode: Object, link: int, size: int) -> tuple[bytes | None, int, int]:
        if not 0 < size <= _SYMLINK_MAX:
            raise CorruptGuestError(f"a symbolic link has {size} bytes")
        if link:
            return read_string(self._kernel, link, size), 0, 0
        for extent in self.content(inode):  # a long one has a page of its own
            if isinstance(extent.data, bytes):
                return extent.data.partition(b"\0")[0], 0, 0
            return None, extent.data is Where.SWAPPED, extent.data is Where.ABSENT
        raise CorruptGuestError("a symbolic link leads nowhere")

    def _attributes(
        self, inode: Object, acl: int, default_acl: int
    ) -> tuple[tuple[bytes, bytes], ...]:
        found = []
        for name, pointer in ((b"system.posix_acl_access", acl),
                              (b"system.posix_acl_default", default_acl)):  # fmt: skip
            if pointer not in _NO_ACL and not pointer & 1:
                found.append((name, self._acl(pointer)))
        head = inode.value_() - self._vfs_inode + self._xattrs
        for node in self._xattr_nodes(head):
            name_at, size = self._xattr.read(node)
            if size > _XATTR_SIZE_MAX:
                raise CorruptGuestError(f"an extended attribute has {size} bytes")
            value = self._kernel.virtual.read(VirtAddr(node + self._xattr_value), size)
            found.append((read_string(self._kernel, name_at, 256), value))
        return tuple(sorted(found))

    def _xattr_nodes(self, head: int) -> Iterator[int]:
        kernel = self._kernel
        kind, to_head, to_node = self._xattr_list
        if kind == "list":
            nodes = walk.list_nodes(kernel, head + to_head, _MAX_XATTRS)
        else:
            tree = Object(kernel.prog, kernel.type("struct rb_root"), address=head + to_head)
            nodes = walk.rbtree_nodes(tree, _MAX_XATTRS)
        for node in nodes:
            yield node - to_node

    @functools.cached_property
    def _xattr_list(self) -> tuple[str, int, int]:
        """What attributes hang on, and where the heads and nodes of it lie."""
        kernel = self._kernel
        if has_member(kernel, "struct simple_xattr", "node"):
            return "list", 0, offset(kernel, "struct simple_xattr", "node")
        if has_member(kernel, "struct simple_xattrs", "rb_root"):
            return (
                "tree",
                offset(kernel, "struct simple_xattrs", "rb_root"),
                offset(kernel, "struct simple_xattr", "rb_node"),
            )
        return (
            "list",
            offset(kernel, "struct simple_xattrs", "head"),
            offset(kernel, "struct simple_xattr", "list"),
        )

    @functools.cached_property
    def _times(self) -> Fields:
        """Seconds and nanoseconds of atime, mtime and ctime; see `ouassister.kernel.inodes`."""
        kernel = self._kernel
        if has_member(kernel, "struct inode", "i_atime_sec"):
            names = [f"i_{which}_{part}" for which in _TIMES for part in ("sec", "nsec")]
            return Fields(kernel, "struct inode", *names)
        names = []
        for which in _TIMES:
            renamed = has_member(kernel, "struct inode", f"__i_{which}")
            names += [f"{'__' * renamed}i_{which}.{part}" for part in ("tv_sec", "tv_nsec")]
        return Fields(kernel, "struct inode", *names)

    def _acl(self, acl: int) -> bytes:
        """Encode a ``struct posix_acl`` as getxattr(2) would."""
        kernel = self._kernel
        (count,) = Fields(kernel, "struct posix_acl", "a_count").read(acl)
        if count > _MAX_ACL_ENTRIES:
            raise CorruptGuestError(f"an access control list has {count} entries")
        entry = Fields(kernel, "struct posix_acl_entry", "e_tag", "e_perm", "e_uid.val")
        first = acl + offset(kernel, "struct posix_acl", "a_entries")
        size = kernel.type("struct posix_acl_entry").size or 0
        encoded = struct.pack("<I", _ACL_VERSION)
        for index in range(count):
            tag, permissions, owner = entry.read(first + index * size)
            named = tag in (_ACL_USER, _ACL_GROUP)
            encoded += struct.pack("<HHI", tag, permissions, owner if named else _ACL_UNDEFINED_ID)
        return encoded
