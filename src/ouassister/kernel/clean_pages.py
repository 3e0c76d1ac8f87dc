"""Pages of files that memory and disk both have: to hold a view against, and one that differs.

Source: Linux v6.1 ``fs/ext4/inline.c`` (``ext4_convert_inline_data_nolock``), ``fs/ext4/ext4.h``
(``struct ext4_super_block``, ``EXT4_FEATURE_INCOMPAT_INLINE_DATA``), ``mm/filemap.c``.
"""

from __future__ import annotations

import stat
import struct
from typing import TYPE_CHECKING, Final

from ouassister.kernel.pagecache import Piece
from ouassister.model import PhysAddr

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ouassister.kernel.cached_inodes import CachedFileSystem, CachedInode
    from ouassister.kernel.pagecache import CachedPage, PageCache
    from ouassister.kernel.program import Kernel

_SAMPLE: Final = 4 << 20  # bytes
_SAMPLE_OF_FILE: Final = 256 << 10
_SUPER_BLOCK: Final = 1024
_INCOMPATIBLE: Final = _SUPER_BLOCK + 0x60
_INLINE_DATA: Final = 0x8000


def sample(cache: PageCache, inodes: Iterable[CachedInode]) -> dict[int, list[Piece]]:
    """Take pages that the disk has, too, by inode number: of the files changed last."""
    found: dict[int, list[Piece]] = {}
    left = _SAMPLE
    newest = sorted(_files(inodes), key=lambda one: max(one.mtime_ns, one.ctime_ns), reverse=True)
    for inode in newest:
        pieces: list[Piece] = []
        taken = 0
        for page in cache.pages(inode.head, marked=False):
            size = min(page.size, inode.size - page.position)
            if size <= 0 or taken >= min(left, _SAMPLE_OF_FILE):
                break
            if _is_settled(cache, page):
                pieces.append(Piece(page.position, size, page.physical))
                taken += size
        if pieces:
            found[inode.number] = pieces
        left -= taken
        if left <= 0:
            break
    return found


def has_inline_data(kernel: Kernel, cache: PageCache, one: CachedFileSystem) -> bool:
    """Tell whether small files live in their inodes; the kernel holds on to the super block."""
    for page in cache.pages(one.device_head, marked=False):
        if page.position:
            break
        raw = kernel.memory.read(PhysAddr(page.physical + _INCOMPATIBLE), 4)
        return bool(struct.unpack("<I", raw)[0] & _INLINE_DATA)
    return False


def first(cache: PageCache, inodes: Iterable[CachedInode]) -> dict[int, Piece]:
    """Take the first page of each file, by inode number; see ``Unflushed.first``."""
    found = {}
    for inode in _files(inodes):
        for page in cache.pages(inode.head, marked=False):
            size = min(page.size, inode.size)
            if not page.position and size > 0 and _is_settled(cache, page):
                found[inode.number] = Piece(0, size, page.physical)
            break
    return found


def _files(inodes: Iterable[CachedInode]) -> Iterator[CachedInode]:
    for one in inodes:
        if one.links and one.pages and stat.S_ISREG(one.mode) and not one.swap:
            yield one


def _is_settled(cache: PageCache, page: CachedPage) -> bool:
    """Tell whether a page has its last contents, and nothing of it waits to be written."""
    if page.flags & (cache.dirty | cache.locked) or not page.flags & cache.uptodate:
        return False
    return not page.buffers or not any(
        buffer.state & cache.buffer_unwritten for buffer in cache.buffers(page)
    )
