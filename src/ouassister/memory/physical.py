"""Guest-physical memory of a saved PC: reads, search, and where RAM lies around the PCI hole.

QEMU maps base memory from address 0 up to the PCI hole and the rest from 4 GiB on. Base memory
is one RAM block, or one for each NUMA node, one behind the other. Where the hole starts depends
on the machine type, its version and ``max-ram-below-4g``, and is not in a save file; so a
`PhysicalMemory` of a save file is made *for* a hole, and whoever makes it has to prove it
(`ouassister.kernel.e820` does, with the guest's own memory map). A dump tells its addresses.

Addresses that a PC maps to ROM or video memory (0xa0000-0xfffff) read as the RAM behind them,
from a save file; a dump holds what the processor saw there, or nothing.

Source: QEMU v7.2.0 ``hw/i386/pc_piix.c`` (``pc_init1``), ``hw/i386/pc_q35.c``
(``pc_q35_init``), ``hw/i386/pc.c`` (``pc_memory_init``), ``hw/core/numa.c``
(``numa_init_memory_layout``).
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import PageAbsentError
from ouassister.model import PhysAddr
from ouassister.state.ram_table import PageTable, RamBlock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ouassister.state.data import Data
    from ouassister.state.ram_table import Offsets, Pages

PAGE_SIZE: Final = 4096
FOUR_GIB: Final = 1 << 32
# Where QEMU's own rules and common settings put the hole: pc 0xe0000000 or 0xc0000000, q35
# 0xb0000000 or 0x80000000, microvm 0xc0000000; 1 GiB by max-ram-below-4g.
HOLE_STARTS: Final = (0xE0000000, 0xC0000000, 0xB0000000, 0x80000000, 0x40000000)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of guest-physical addresses and where in its block it lies."""

    address: PhysAddr
    size_bytes: int
    block_offset: int
    block: RamBlock


def around_hole(blocks: Sequence[RamBlock], hole: int) -> tuple[Segment, ...]:
    """Lay base memory around the PCI hole.

    Args:
        blocks: What base memory is made of, in its order.
        hole: First address of the hole; at or beyond the size of base memory there is none.
    """
    segments = []
    start = 0  # in base memory
    for block in blocks:
        low = min(max(hole - start, 0), block.size_bytes)  # so much of the block lies below
        if low:
            segments.append(Segment(PhysAddr(start), low, 0, block))
        if low < block.size_bytes:
            address = PhysAddr(FOUR_GIB + start + low - hole)
            segments.append(Segment(address, block.size_bytes - low, low, block))
        start += block.size_bytes
    return tuple(sorted(segments, key=lambda segment: segment.address))


class PhysicalMemory:
    """Guest-physical memory in one layout.

    Args:
        data: The bytes that the blocks' offsets point into.
        segments: Where the blocks lie, upwards and without overlap.
        hole: Where the PCI hole starts; the size of RAM when there is none in it.

    Attributes:
        segments: See above.
        hole: See above.
        size_bytes: Of all segments.
    """

    def __init__(self, data: Data, segments: Sequence[Segment], hole: int) -> None:
        self.hole = hole
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.size_bytes = sum(segment.size_bytes for segment in segments)
        self._data = data
        # first page, end, what turns a page into one of the block, offsets of the block
        self._spans = [
            (
                segment.address // PAGE_SIZE,
                (segment.address + segment.size_bytes) // PAGE_SIZE,
                (segment.address - segment.block_offset) // PAGE_SIZE,
                segment.block.pages.offsets,
            )
            for segment in self.segments
        ]
        self._starts = [span[0] for span in self._spans]
        self._few = self._spans if len(self._spans) <= 4 else []

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
        for first, end, shift, offsets in self._few or self._near(page):
            if first <= page < end:
                offset = offsets[page - shift]
                if offset == 0:
                    break
                return offset
        raise PageAbsentError(address)

    def _near(self, page: int) -> list[tuple[int, int, int, Offsets]]:
        at = bisect.bisect_right(self._starts, page) - 1
        return self._spans[at : at + 1] if at >= 0 else []

    def find(self, needle: bytes, limit: int = 1 << 16) -> Iterator[PhysAddr]:
        """Yield the addresses of ``needle`` in stored pages, in the save file's order.

        See `occurrences`.
        """
        for name, offset in self.occurrences(needle, limit):
            yield from self.addresses(name, offset)

    def occurrences(self, needle: bytes, limit: int = 1 << 16) -> Iterator[tuple[bytes, int]]:
        """Yield name and offset of the block where ``needle`` is; the same in every layout.

        A match has to lie within one page. At most ``limit`` occurrences in the file are
        looked at, matches or not.
        """
        for name, pages in self._blocks().items():
            for start, end in pages.stretches():
                for position in self._data.search(needle, start, end):
                    limit -= 1
                    if limit < 0:
                        return
                    place = pages.locate(position)
                    if place is not None and place[1] + len(needle) <= PAGE_SIZE:
                        yield name, place[0] * PAGE_SIZE + place[1]

    def page_starts(self, start: bytes, limit: int = 1 << 16) -> Iterator[tuple[bytes, int]]:
        """Yield `occurrences` at the start of a page; of at least eight bytes.

        Where the save file is made of records, no more is read than what is compared.
        """
        blocks = self._blocks()
        if all(isinstance(pages, PageTable) for pages in blocks.values()):
            found = (
                (name, page * PAGE_SIZE)
                for name, pages in blocks.items()
                if isinstance(pages, PageTable)
                for page in pages.starting(self._data, start)
            )
            yield from itertools.islice(found, limit)
            return
        for name, offset in self.occurrences(start, limit):
            if offset % PAGE_SIZE == 0:
                yield name, offset

    def _blocks(self) -> dict[bytes, Pages]:
        return {one.block.name: one.block.pages for one in self.segments}

    def addresses(self, name: bytes, offset: int) -> Iterator[PhysAddr]:
        """Yield where this layout has a byte of a block."""
        for one in self.segments:
            inside = offset - one.block_offset
            if one.block.name == name and 0 <= inside < one.size_bytes:
                yield PhysAddr(one.address + inside)
