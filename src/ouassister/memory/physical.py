"""Guest-physical memory of a saved PC: reads, search, and where RAM lies around the PCI hole.

QEMU maps ``pc.ram`` from address 0 up to the PCI hole and the rest from 4 GiB on. Where the
hole starts depends on the machine type, its version and ``max-ram-below-4g``, and is not in
the save file; so a `PhysicalMemory` is made *for* a hole, and whoever makes it has to prove it
(`ouassister.kernel.e820` does, with the guest's own memory map).

Addresses that a PC maps to ROM or video memory (0xa0000-0xfffff) read as the RAM behind them.

Source: QEMU v7.2.0 ``hw/i386/pc_piix.c`` (``pc_init1``), ``hw/i386/pc_q35.c``
(``pc_q35_init``), ``hw/i386/pc.c`` (``pc_memory_init``).
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import PageAbsentError
from ouassister.model import PhysAddr
from ouassister.state.qemu_stream import TRIM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.state.qemu_stream import RamBlock, SaveStream

PAGE_SIZE: Final = 4096
FOUR_GIB: Final = 1 << 32
# Where QEMU's own rules and common settings put the hole: pc 0xe0000000 or 0xc0000000, q35
# 0xb0000000 or 0x80000000, microvm 0xc0000000; 1 GiB by max-ram-below-4g.
HOLE_STARTS: Final = (0xE0000000, 0xC0000000, 0xB0000000, 0x80000000, 0x40000000)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of guest-physical addresses and where in the block it lies."""

    address: PhysAddr
    size_bytes: int
    block_offset: int


class PhysicalMemory:
    """Guest-physical memory behind one assumed start of the PCI hole.

    Args:
        stream: The save file's index.
        block: The block that holds base memory.
        hole: First address of the PCI hole; at or beyond the block's size there is no hole.
    """

    def __init__(self, stream: SaveStream, block: RamBlock, hole: int) -> None:
        size = block.size_bytes
        self.size_bytes = size
        self.hole = min(hole, size)
        self._data = stream.data
        self._ram_end = stream.ram_end
        self._table = block.pages
        self._offsets = block.pages.offsets
        self._low = self.hole // PAGE_SIZE
        self._high = FOUR_GIB // PAGE_SIZE
        self._shift = self._high - self._low
        self._end = self._shift + size // PAGE_SIZE if size > self.hole else self._low
        self.segments: tuple[Segment, ...] = (Segment(PhysAddr(0), self.hole, 0),)
        if size > self.hole:
            self.segments += (Segment(PhysAddr(FOUR_GIB), size - self.hole, self.hole),)

    def read(self, address: PhysAddr, size: int) -> bytes:
        """Read guest-physical memory.

        Args:
            address: First byte to read.
            size: Number of bytes; zero returns ``b""``.

        Returns:
            Exactly ``size`` bytes.

        Raises:
            PageAbsentError: Some byte was never saved; ``.address`` is the first such byte.

        Source: QEMU migration/ram.c, ``ram_load_precopy``.
        """
        within = address & 0xFFF
        if within + size <= PAGE_SIZE:
            offset = self._page_offset(address)
            if offset > 0:
                return self._data[offset + within : offset + within + size]
            return bytes((-1 - offset,)) * size
        parts = []
        while size > 0:
            within = address & 0xFFF
            count = min(size, PAGE_SIZE - within)
            parts.append(self.read(address, count))
            address = PhysAddr(address + count)
            size -= count
        return b"".join(parts)

    def _page_offset(self, address: int) -> int:
        page = address >> 12
        if page >= self._low:
            if not self._high <= page < self._end:
                raise PageAbsentError(address)
            page -= self._shift
        elif page < 0:
            raise PageAbsentError(address)
        offset = self._offsets[page]
        if offset == 0:
            raise PageAbsentError(address)
        return offset

    def find(self, needle: bytes, limit: int = 1 << 16) -> Iterator[PhysAddr]:
        """Yield the addresses of ``needle`` in stored pages, in the save file's order.

        A match has to lie within one page. At most ``limit`` occurrences in the file are
        looked at, matches or not.
        """
        start = 0
        while start < self._ram_end:
            end = min(start + TRIM_BYTES + len(needle) - 1, self._ram_end)
            position = self._data.find(needle, start, end)
            while position >= 0:
                limit -= 1
                if limit < 0:
                    return
                place = self._table.locate(position)
                if place is not None and place[1] + len(needle) <= PAGE_SIZE:
                    page, within = place
                    if page >= self._low:
                        page += self._shift
                    yield PhysAddr(page * PAGE_SIZE + within)
                position = self._data.find(needle, position + 1, end)
            self._data.madvise(mmap.MADV_DONTNEED)
            start += TRIM_BYTES
