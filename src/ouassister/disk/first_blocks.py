"""Blocks of files that the journal has a copy of, where small files live in their inodes.

A file that outgrows its inode gets its first block through the device's cache, under the journal
(fs/ext4/inline.c, ``ext4_convert_inline_data_nolock``), and from then on lives in pages of its own.
Nothing takes the block from the journal when such a page is written, so that the disk is newer than
the buffer until its checkpoint, and older afterwards. What the guest reads is the page; and where
none is cached, what lies on the disk: reading a file does not look into the device's cache. Both
were seen on Linux 6.1 and 6.12.

So of the buffers that were laid over the disk, those of files are taken back, and then each first
page that is cached is laid over its block.

Source: Linux v6.1 ``fs/ext4/ext4_extents.h``, ``fs/ext4/ext4.h`` (``EXT4_EXTENTS_FL``).
"""

from __future__ import annotations

import os
import stat
import struct
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from ouassister.disk import raw_inode
from ouassister.disk.libext2fs import Ext4, Super
from ouassister.errors import CorruptGuestError, UnsupportedGuestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ouassister.disk.handover import HandOver

_INLINE_DATA: Final = 0x8000  # incompatible feature
_SUPER_BLOCK: Final = 1024
_MOST: Final = 512 << 20  # bytes; they are kept in memory
_NODE: Final = struct.Struct("<HHHHI")
_ENTRY: Final = 12
_MAGIC: Final = 0xF30A
_MOST_DEPTH: Final = 5  # EXT4_MAX_EXTENT_DEPTH
_UNWRITTEN: Final = 1 << 15  # EXT_INIT_MAX_LEN: a longer extent is an unwritten one


class Replaced:
    """What the disk had where buffers were laid over it.

    Args:
        image: The file system, before anything is laid over it.
    """

    def __init__(self, image: Path) -> None:
        with image.open("rb", buffering=0) as file:
            raw = os.pread(file.fileno(), 4, _SUPER_BLOCK + Super.INCOMPAT)
        self._wanted = len(raw) == 4 and bool(struct.unpack("<I", raw)[0] & _INLINE_DATA)
        self._image = image
        self._places: list[tuple[int, bytes]] = []
        self._size = 0

    def add(self, offset: int, data: bytes) -> None:
        """Remember what is about to be replaced, where that matters.

        Raises:
            UnsupportedGuestError: It is more than any journal is expected to hold.
        """
        if not self._wanted:
            return
        self._size += len(data)
        if self._size > _MOST:
            raise UnsupportedGuestError(
                f"the guest's ext4 has inline_data and more than {_MOST >> 20} MiB of unflushed"
                " metadata",
                hint="resume the VM, run 'sync' in it and save it again",
            )
        self._places.append((offset, data))

    def take_back(self) -> None:
        """Give the blocks of files back what the disk had.

        Raises:
            CorruptGuestError: An inode or the extents of a file are damaged.
        """
        if not self._places:
            return
        with (
            Ext4(self._image, writable=False) as ext4,
            self._image.open("r+b", buffering=0) as image,
        ):
            size = ext4.block_size
            blocks = {
                (offset + done) // size: data[done : done + size]
                for offset, data in reversed(self._places)
                for done in range(0, len(data) - size + 1, size)
            }
            order = sorted(blocks)
            of_files: set[int] = set()
            for number, raw in ext4.inodes():
                if not stat.S_ISREG(raw_inode.mode(raw)) or not raw_inode.links(raw):
                    continue
                for start, count in _extents(image.fileno(), size, number, raw):
                    of_files.update(
                        order[bisect_left(order, start) : bisect_left(order, start + count)]
                    )
            for block in of_files:
                image.seek(block * size)
                image.write(blocks[block])


def write_cached(ext4: Ext4, handover: HandOver) -> None:
    """Let the first block of a file be what its page holds; see ``Unflushed.first``."""
    for place in handover.first:
        flags = raw_inode.flags(ext4.inode(place.inode))
        if flags & (raw_inode.ENCRYPT_FL | raw_inode.INLINE_DATA_FL):
            continue
        data = b"".join(handover.read(place))[: ext4.block_size]
        if ext4.block(place.inode, 0) and ext4.read(place.inode, [(0, len(data))]) != [data]:
            ext4.write(place.inode, iter([(0, data)]))


def _extents(image: int, block_size: int, number: int, raw: bytearray) -> Iterator[tuple[int, int]]:
    """Yield first block and length of each extent; of a file in the old form its first block."""
    flags = raw_inode.flags(raw)
    if flags & (raw_inode.INLINE_DATA_FL | raw_inode.EA_INODE_FL):
        return
    root = raw_inode.blocks(raw)
    if not flags & raw_inode.EXTENTS_FL:
        (block,) = struct.unpack_from("<I", root)
        if block:  # else a hole
            yield block, 1
        return
    nodes = [(root, _MOST_DEPTH)]
    while nodes:
        node, most = nodes.pop()
        magic, entries, _, depth, _ = _NODE.unpack_from(node)
        if magic != _MAGIC or depth > most or _NODE.size + entries * _ENTRY > len(node):
            raise CorruptGuestError(f"the extents of inode {number} are damaged")
        for at in range(_NODE.size, _NODE.size + entries * _ENTRY, _ENTRY):
            if depth:
                low, high = struct.unpack_from("<IH", node, at + 4)
                place = (low | high << 32) * block_size
                child = os.pread(image, block_size, place) if place < 1 << 62 else b""
                if len(child) != block_size:
                    raise CorruptGuestError(f"the extents of inode {number} are damaged")
                nodes.append((child, depth - 1))
            else:
                length, high, low = struct.unpack_from("<HHI", node, at + 4)
                yield low | high << 32, length - _UNWRITTEN * (length > _UNWRITTEN)
