"""Is all of a file system on its disk? For those whose memory is not laid over the disk.

It is when nothing that the kernel holds of it waits to be written: no block of its device, no page
of a file, no inode. What such a file system keeps in structures of its own (XFS's log, btrfs's
transactions) shows in none of these, so that the answer is only asked for FAT.

Source: Linux v6.1 ``fs/buffer.c`` (``mark_buffer_dirty`` marks the page of the device),
``mm/page-writeback.c`` (``__folio_mark_dirty``), ``fs/fs-writeback.c`` (``__mark_inode_dirty``),
``fs/fat/inode.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drgn import Object

from ouassister.kernel import inodes as vfs
from ouassister.kernel.cached_inodes import InodeCache
from ouassister.kernel.pagecache import PageCache
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel


def unflushed_part(kernel: Kernel, major: int, minor: int) -> str:
    """Name something of a file system that is in memory alone; empty when there is nothing.

    Args:
        kernel: The kernel.
        major: Of its device.
        minor: Of its device.

    Raises:
        CorruptGuestError: Memory contradicts itself.
    """
    kernel.symbols.learn(("super_blocks", "vmemmap_base"))
    cache, known = PageCache(kernel), InodeCache(kernel)
    kind = kernel.type("struct inode")
    for one in known.file_systems():
        if (one.major, one.minor) != (major, minor):
            continue
        with guest_reads(f"reading what is unflushed on {one.label}"):
            for page in cache.pages(one.device_head, marked=True):
                return f"block at {page.position:#x}"
            for inode in known.inodes(one):
                if inode.marks:
                    return f"pages of inode {inode.number}"
                if vfs.awaits_writing(Object(kernel.prog, kind, address=inode.address)):
                    return f"inode {inode.number}"
        return ""
    return "it is not mounted any more"
