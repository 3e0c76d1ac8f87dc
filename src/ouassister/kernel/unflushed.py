"""What the kernel holds of an ext4 file system and the disk does not, in the file system's terms.

Three things make the disk whole:

* Blocks of the device. Every change of metadata goes through buffers of the block device, under
  the journal. From its first change on and until its last state is at home on the disk, a buffer
  carries ``BH_JBD`` (jbd2_journal_add_journal_head .. __journal_remove_journal_head), is dirty, or
  is locked for its way there. All others are what the disk says, or leftovers of blocks that
  belong to file data by now: these must not be written. (The page's dirty bit is no help: the
  journal keeps it clear until a transaction is committed.)
* Pages of files, which carry a mark in the page cache's tree until they are on the disk, mapped
  and written through included: the first store to a clean page of a shared mapping faults and
  marks it (mm/memory.c, ``do_wp_page``; mm/mmap.c, ``vma_wants_writenotify``). With data=journal
  the journal keeps the mark clear, and ``BH_JBD`` on the page's own buffers tells.
* Size and times of inodes: delayed allocation leaves the size on the disk behind until the blocks
  exist (``i_disksize``), and lazytime the times.

Everything else in an inode is copied to its buffer with each change (ext4_mark_inode_dirty), so
that inodes and cached directory entries are there to be compared with the result. So are pages of
files that are on the disk already: a sample of them, those of the files changed last first.

Source: Linux v6.1 ``fs/jbd2/{transaction,commit,checkpoint,journal}.c``,
``fs/ext4/{inode,inline,page-io}.c``, ``fs/ext4/ext4.h`` (``EXT4_MOUNT_JOURNAL_DATA``,
``EXT4_JOURNAL_DATA_FL``, ``EXT4_FEATURE_INCOMPAT_INLINE_DATA``).
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.kernel import clean_pages, superblocks
from ouassister.kernel.cached_inodes import CachedFileSystem, CachedInode, InodeCache
from ouassister.kernel.journalling import Journalling
from ouassister.kernel.pagecache import PageCache, Piece
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from ouassister.kernel.pagecache import CachedPage
    from ouassister.kernel.program import Kernel

_MAX_INODE: Final = 0xFFFF_FFFF
_MAX_SIZE: Final = 1 << 60  # the largest file of ext4 is smaller (EXT4_MAX_LOGICAL_BLOCK)
_MIN_READS: Final = 4 << 20
_SMALLEST: Final = 64  # bytes: a struct page; a buffer head, an entry and an inode are larger
_FSTYPES: Final = ("ext4", "ext3", "ext2")


@dataclass(slots=True)
class Unflushed:
    """One ext4 file system, as memory knows it.

    Attributes:
        file_system: Which one.
        device: Blocks of the device.
        inodes: All inodes that are cached.
        files: Pieces of files, by inode number; files that nobody can open any more are left out.
        names: Cached directory entries: directory's inode, name, inode or 0 for none.
        clean: Pieces of files that the disk has, too, by inode number: a sample.
        first: The first piece of each cached file of a file system with ``inline_data``. A file
            that outgrows its inode gets its first block through the device's cache, under the
            journal (ext4_convert_inline_data_nolock). Nothing takes it from there when the file's
            own page is written, so that the old contents may reach the disk last; what is read
            is the page.
    """

    file_system: CachedFileSystem
    device: list[Piece] = field(default_factory=list)
    inodes: list[CachedInode] = field(default_factory=list)
    files: dict[int, list[Piece]] = field(default_factory=dict)
    names: list[tuple[int, bytes, int]] = field(default_factory=list)
    clean: dict[int, list[Piece]] = field(default_factory=dict)
    first: dict[int, Piece] = field(default_factory=dict)


def collect(kernel: Kernel) -> list[Unflushed]:
    """Find what memory holds of each mounted ext4 file system.

    Raises:
        UnsupportedGuestError: This kernel is laid out otherwise.
        CorruptGuestError: Its memory contradicts itself.
    """
    kernel.symbols.learn(("super_blocks", "vmemmap_base"))
    # Inodes, entries, nodes, pages and buffers: each is at least so large, and read once.
    with kernel.virtual.bounded(_MIN_READS + kernel.memory.size_bytes // _SMALLEST):
        return _collect_all(kernel)


def _collect_all(kernel: Kernel) -> list[Unflushed]:
    cache, inodes = PageCache(kernel), InodeCache(kernel)
    journalling = Journalling(kernel)
    found = []
    for one in inodes.file_systems():
        if one.fstype in _FSTYPES and _by_ext4(kernel, one):
            with guest_reads(f"reading what is unflushed on {one.label}"):
                found.append(_collect(kernel, one, cache, inodes, journalling))
    return found


def _by_ext4(kernel: Kernel, one: CachedFileSystem) -> bool:
    """Tell whether the driver of ext4 serves a file system.

    It serves ext3 always, and ext2 where the kernel is built so (CONFIG_EXT4_USE_FOR_EXT2, not
    together with CONFIG_EXT2_FS); that of ext2 does not keep inodes and buffers in step.
    """
    if one.fstype != "ext2":
        return True
    module = superblocks.module_of(kernel, one.address)
    return module == "ext4" or (not module and kernel.types.struct("ext2_inode_info") is None)


def _collect(
    kernel: Kernel,
    one: CachedFileSystem,
    cache: PageCache,
    inodes: InodeCache,
    journalling: Journalling,
) -> Unflushed:
    result = Unflushed(one)
    for page in cache.pages(one.device_head, marked=False):
        result.device += _unwritten(cache, page, whole=bool(page.flags & cache.dirty))
    numbers: dict[int, int] = {}
    whole_fs = journalling.of(one)
    for inode in inodes.inodes(one):
        if not 0 < inode.number <= _MAX_INODE:
            raise CorruptGuestError(f"an inode of {one.label} has number {inode.number}")
        if not 0 <= inode.size < _MAX_SIZE:
            raise CorruptGuestError(f"inode {inode.number} of {one.label} has size {inode.size}")
        numbers[inode.address] = inode.number
        result.inodes.append(inode)
        if not inode.pages or not inode.links or not _has_data(inode.mode):
            continue
        if whole_fs or stat.S_ISLNK(inode.mode) or journalling.inode(inode):
            pieces = _journalled(cache, inode)
        elif inode.marks:
            pieces = []
            for page in cache.pages(inode.head, marked=True):
                pieces += _unwritten(cache, page, whole=True)
        else:
            continue
        if pieces:
            if inode.number in result.files:
                raise CorruptGuestError(f"inode {inode.number} of {one.label} is there twice")
            result.files[inode.number] = pieces
    for inode in result.inodes:
        if stat.S_ISDIR(inode.mode) and inode.links:
            for name, child in inodes.children(inode):
                number = numbers.get(child, 0)
                if child and not number:
                    continue  # just being made or torn down
                result.names.append((inode.number, name, number))
    result.clean = clean_pages.sample(cache, result.inodes)
    if clean_pages.has_inline_data(kernel, cache, one):
        result.first = clean_pages.first(cache, result.inodes)
    return result


def _has_data(mode: int) -> bool:
    # Long symbolic links were in the page cache before 6493792d3299 ("ext4: convert symlink
    # external data block mapping to bdev", v5.19).
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def _unwritten(cache: PageCache, page: CachedPage, *, whole: bool) -> list[Piece]:
    """Return the parts of a page that are not on the disk.

    Args:
        cache: The page cache.
        page: The page.
        whole: What to say of a page without buffers.
    """
    if not page.buffers:
        return [Piece(page.position, page.size, page.physical)] if whole else []
    pieces: list[Piece] = []
    wanted, uptodate = cache.buffer_unwritten, cache.buffer_uptodate
    for buffer in cache.buffers(page):
        if not (buffer.state & wanted and buffer.state & uptodate):
            continue
        start = page.position + buffer.offset
        last = pieces[-1] if pieces else None
        if last and last.offset + last.size == start:
            pieces[-1] = Piece(last.offset, last.size + buffer.size, last.physical)
        else:
            pieces.append(Piece(start, buffer.size, page.physical + buffer.offset))
    return pieces


def _journalled(cache: PageCache, inode: CachedInode) -> list[Piece]:
    pieces = []
    for page in cache.pages(inode.head, marked=False):
        pieces += _unwritten(cache, page, whole=bool(page.flags & cache.dirty))
    return pieces
