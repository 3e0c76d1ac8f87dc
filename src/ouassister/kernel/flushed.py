"""Is all of a file system on its disk? For those whose memory is not laid over the disk.

It is when nothing that the kernel holds of it waits to be written: no block of its device, no page
of a file, no inode; and, of XFS and btrfs, nothing in the structures of their own
(`ouassister.kernel.xfs`, `ouassister.kernel.btrfs`). These two write inodes through their
transactions, so that the marks of an inode itself say nothing there, except that its times are
in memory alone (lazytime). What belongs to a file without a name is nobody's loss.

A file system that is frozen has written everything, which is all that is known where the kernel
keeps no types of XFS.

Source: Linux v6.1 ``fs/buffer.c`` (``mark_buffer_dirty`` marks the page of the device),
``mm/page-writeback.c`` (``__folio_mark_dirty``), ``fs/fs-writeback.c`` (``__mark_inode_dirty``),
``fs/fat/inode.c``; ``fs/super.c`` (``freeze_super``), ``fs/xfs/xfs_super.c`` (``xfs_fs_freeze``,
``xfs_fs_dirty_inode``), ``fs/btrfs/inode.c`` (``btrfs_dirty_inode``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from drgn import Object

from ouassister.errors import UnsupportedGuestError
from ouassister.kernel import btrfs, superblocks, xfs
from ouassister.kernel import inodes as vfs
from ouassister.kernel.cached_inodes import CachedFileSystem, InodeCache, device_head
from ouassister.kernel.fields import Fields, offset, read_string
from ouassister.kernel.pagecache import PageCache
from ouassister.kernel.program import guest_reads
from ouassister.model import VirtAddr
from ouassister.text import to_text

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel

_MINOR_BITS: Final = 20  # include/linux/kdev_t.h
_FREEZE_COMPLETE: Final = 4  # include/linux/fs.h, SB_FREEZE_COMPLETE
_BTREE_INODE: Final = 1  # include/uapi/linux/btrfs_tree.h, BTRFS_BTREE_INODE_OBJECTID
_TYPE_NAME: Final = 64


def unflushed_part(kernel: Kernel, major: int, minor: int) -> str:
    """Name something of a file system that is in memory alone; empty when there is nothing.

    Args:
        kernel: The kernel.
        major: Of its device, as its super block has it.
        minor: Of its device.

    Raises:
        UnsupportedGuestError: This kernel does not tell.
        CorruptGuestError: Memory contradicts itself.
    """
    one = find(kernel, major, minor)
    if one is None:
        return "it is not mounted any more"
    logs = one.fstype in ("xfs", "btrfs")
    cache = PageCache(kernel)
    kind = kernel.type("struct inode")
    with guest_reads(f"reading what is unflushed on {one.label}"):
        for page in cache.pages(one.device_head, marked=True):
            return f"block at {page.position:#x}"
        for inode in InodeCache(kernel).inodes(one):
            if not inode.links and logs:
                continue
            if inode.marks:
                if one.fstype == "btrfs" and inode.number == _BTREE_INODE:
                    return "blocks of its trees"
                return f"pages of inode {inode.number}"
            if inode.lazy:
                return f"times of inode {inode.number}"
            if not logs and vfs.awaits_writing(Object(kernel.prog, kind, address=inode.address)):
                return f"inode {inode.number}"
        info, frozen = Fields(
            kernel, "struct super_block", "s_fs_info", "s_writers.frozen"
        ).read(one.address)  # fmt: skip
    if one.fstype == "btrfs":
        return btrfs.uncommitted(kernel, info)
    if one.fstype == "xfs":
        try:
            types = xfs.xfs_types(kernel)
        except UnsupportedGuestError as error:
            if frozen == _FREEZE_COMPLETE:
                return ""
            return f"what its log lacks cannot be told ({error.message}), and it is not frozen"
        return xfs.unlogged(kernel, types, info)
    return ""


def is_frozen(kernel: Kernel, one: CachedFileSystem) -> bool:
    """Tell whether a file system is frozen, or about to be or to thaw."""
    with guest_reads(f"reading whether {one.label} is frozen"):
        (frozen,) = Fields(kernel, "struct super_block", "s_writers.frozen").read(one.address)
        return bool(frozen)


def find(kernel: Kernel, major: int, minor: int) -> CachedFileSystem | None:
    """Find the super block with a device number; btrfs has one of no device.

    Raises:
        CorruptGuestError: The list of super blocks does not end.
    """
    kernel.symbols.learn(("super_blocks", "vmemmap_base"))
    with guest_reads("looking for a file system"):
        fields = Fields(kernel, "struct super_block", "s_dev", "s_blocksize", "s_type", "s_bdev",
                        "s_root", "s_id")  # fmt: skip
        names = Fields(kernel, "struct file_system_type", "name")
        uuid = offset(kernel, "struct super_block", "s_uuid")
        for address in superblocks.addresses(kernel):
            device, size, kind, bdev, root, label = fields.read(address)
            if device != major << _MINOR_BITS | minor or not root:
                continue
            return CachedFileSystem(
                address=address,
                fstype=to_text(read_string(kernel, names.read(kind)[0], _TYPE_NAME)),
                major=major,
                minor=minor,
                uuid=kernel.virtual.read(VirtAddr(address + uuid), 16),
                block_size=size,
                device_head=device_head(kernel, bdev) if bdev else 0,
                label=to_text(label.partition(b"\0")[0]),
            )
    return None
