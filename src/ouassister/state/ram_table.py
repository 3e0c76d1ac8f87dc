"""Where each page of a RAM block lies in the save file, and fast reading of record runs.

A migration stream is mostly long runs of records for consecutive pages, at a fixed stride. One
`struct` call reads the headers of a whole window; comparing it with the expected ones costs a
few nanoseconds a page. Records of zero pages follow each other without a gap, so a window of them
is one long number, and what it should be is a multiple of one constant plus another one. Where
pages lie at fixed places (mapped-ram, dumps) there is no table at all: their place is computed
when it is asked for.

Source: QEMU v7.2.0 ``migration/ram.c``: ``ram_find_and_save_block`` walks the dirty bitmap
upwards, ``save_page_header`` leaves the name out while the block stays the same. QEMU v9.0.0
``migration/ram.c``: ``read_ramblock_mapped_ram`` (a bit for each page that was written).
"""

from __future__ import annotations

import bisect
import mmap
import re
import struct
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from ouassister.state import c_qevm as c
from ouassister.state.data import TRIM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ouassister.state.data import Data

MAX_BLOCK_BYTES: Final = 1 << 44  # 16 TiB: the table of it is 32 GiB of untouched zero pages
ABSENT: Final = 0  # no page can lie at offset 0: a header does
ZERO_PAGE: Final = -1

_WINDOWS: Final = (1024, 128, 16, 1)
_PAGE_HEADERS: Final = {n: struct.Struct(">" + f"Q{c.PAGE_SIZE}x" * n) for n in _WINDOWS}
_LONGEST_RUN: Final = 4096  # pages: a scan must get the chance to give back what it has mapped
_SET_BITS: Final = re.compile(rb"[^\0]+")


def _numbers(step: int, window: int) -> int:
    """Return 1, 1 + step, 1 + 2 * step... as records of zero pages, one behind the other."""
    return int.from_bytes(
        b"".join((1 + step * n).to_bytes(c.ZERO_STRIDE, "big") for n in range(window)), "big"
    )


_ONES: Final = {n: _numbers(0, n) for n in _WINDOWS}
_STEPS: Final = {n: _numbers(c.PAGE_SIZE << 8, n) - _ONES[n] for n in _WINDOWS}


class Offsets(Protocol):
    """Page number to offset; `ABSENT`, or ``-1 - fill`` for a page of one repeated byte."""

    def __getitem__(self, page: int, /) -> int:
        """Return the offset of a page of the block; others raise IndexError."""


class Pages(Protocol):
    """The pages of one RAM block."""

    @property
    def offsets(self) -> Offsets:
        """Where each page lies."""

    def locate(self, offset: int) -> tuple[int, int] | None:
        """Return (page, offset in the page) of an offset, if a current page lies there."""

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what holds all stored pages, upwards; other bytes may be in it."""

    def close(self) -> None:
        """Release the memory."""


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One RAM block; ``pages`` maps its page numbers to offsets."""

    name: bytes
    size_bytes: int
    pages: Pages = field(compare=False, repr=False)


class PageTable:
    """The pages of a block whose records come in any order."""

    def __init__(self, pages: int) -> None:
        # Anonymous memory: a block that is declared but never sent costs nothing.
        self._memory = mmap.mmap(-1, pages * 8)
        self.offsets: memoryview[int] = memoryview(self._memory).cast("q")
        self._run_offset = array("q")
        self._run_page = array("q")
        self._run_count = array("q")

    def __len__(self) -> int:
        """Return the number of pages of the block."""
        return len(self.offsets)

    def close(self) -> None:
        """See `Pages`."""
        self.offsets.release()
        self._memory.close()

    def set_stored(self, page: int, count: int, offset: int) -> None:
        """Record ``count`` pages, the first at ``offset``; a page sent again replaces itself."""
        end = offset + count * c.PAGE_STRIDE
        self.offsets[page : page + count] = array("q", range(offset, end, c.PAGE_STRIDE))
        self._run_offset.append(offset)
        self._run_page.append(page)
        self._run_count.append(count)

    def set_filled(self, page: int, count: int, fill: int) -> None:
        """Record ``count`` pages that repeat one byte."""
        self.offsets[page : page + count] = array("q", (-1 - fill,)) * count

    def locate(self, offset: int) -> tuple[int, int] | None:
        """See `Pages`."""
        run = bisect.bisect_right(self._run_offset, offset) - 1
        if run < 0:
            return None
        index, within = divmod(offset - self._run_offset[run], c.PAGE_STRIDE)
        if index >= self._run_count[run] or within >= c.PAGE_SIZE:
            return None
        page = self._run_page[run] + index
        if self.offsets[page] != offset - within:
            return None  # sent again later: this copy is stale
        return page, within

    def starting(self, data: Data, start: bytes) -> Iterator[int]:
        """Yield the pages that start with at least eight given bytes, in the file's order."""
        word = int.from_bytes(start[:8], "big")
        runs = zip(self._run_offset, self._run_page, self._run_count, strict=True)
        scanned = 0
        for offset, page, count in runs:
            index = 0
            while index < count:
                file, place, room = data.extent(offset)
                window = next(n for n in _WINDOWS if n <= count - index)
                if window * c.PAGE_STRIDE > room:
                    window = 1  # the last page of the file, or of a stretch
                    words: tuple[int, ...] = (word,)
                else:
                    words = _PAGE_HEADERS[window].unpack_from(file, place)
                if word in words:
                    for n in range(window):
                        at = offset + n * c.PAGE_STRIDE
                        if data[at : at + len(start)] == start and self.offsets[page + n] == at:
                            yield page + n
                offset += window * c.PAGE_STRIDE
                page += window
                index += window
                scanned += window * c.PAGE_STRIDE
                if scanned > TRIM_BYTES:
                    data.trim()
                    scanned = 0

    def stretches(self) -> Iterator[tuple[int, int]]:
        """See `Pages`: one, from the first record to the last."""
        if self._run_offset:
            last = self._run_offset[-1] + self._run_count[-1] * c.PAGE_STRIDE
            yield self._run_offset[0], last


class FixedPages:
    """Pages at fixed places, with a bit for each that is stored; the others are zero.

    Args:
        bitmap: One bit for each page, lowest first; None when all are stored.
        pages: The block's number of pages.
        offset: Where page 0 would lie.
    """

    def __init__(self, bitmap: bytes | None, pages: int, offset: int) -> None:
        self._bitmap = bitmap
        self._pages = pages
        self._offset = offset

    @property
    def offsets(self) -> Offsets:
        """See `Pages`."""
        return self

    def __getitem__(self, page: int, /) -> int:
        """See `Offsets`."""
        if not 0 <= page < self._pages:
            raise IndexError(page)
        if self._bitmap is None or self._bitmap[page >> 3] >> (page & 7) & 1:
            return self._offset + page * c.PAGE_SIZE
        return ZERO_PAGE

    def locate(self, offset: int) -> tuple[int, int] | None:
        """See `Pages`."""
        page, within = divmod(offset - self._offset, c.PAGE_SIZE)
        if not 0 <= page < self._pages or self[page] < 0:
            return None
        return page, within

    def stretches(self) -> Iterator[tuple[int, int]]:
        """See `Pages`: never a hole of more than 7 pages, for such a file is mostly holes."""
        end = self._offset + self._pages * c.PAGE_SIZE
        if self._bitmap is None:
            yield self._offset, end
            return
        for match in _SET_BITS.finditer(self._bitmap):
            start = self._offset + match.start() * 8 * c.PAGE_SIZE
            yield start, min(self._offset + match.end() * 8 * c.PAGE_SIZE, end)

    def close(self) -> None:
        """See `Pages`: nothing of it lies outside of Python's heap."""


class RunReader:
    """Counts how many of the following records continue a run."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def pages(self, position: int, word: int) -> int:
        """Count stored pages that follow ``word``'s page, with records from ``position`` on."""
        if position >= len(self._data):
            return 0
        file, position, room = self._data.extent(position)
        size = position + room
        total = 0
        window = 16
        while True:
            while window > 1 and position + window * c.PAGE_STRIDE > size:
                window = _WINDOWS[_WINDOWS.index(window) + 1]
            if position + window * c.PAGE_STRIDE > size:
                return total
            first = word + c.PAGE_SIZE
            want = tuple(range(first, first + window * c.PAGE_SIZE, c.PAGE_SIZE))
            found = _PAGE_HEADERS[window].unpack_from(file, position)
            if found != want:
                return total + _common(found, want)
            total += window
            if total >= _LONGEST_RUN:
                return total
            position += window * c.PAGE_STRIDE
            word += window * c.PAGE_SIZE
            window = min(1024, window * 8) if window > 1 else 1

    def fills(self, position: int, word: int, fill: int) -> int:
        """Count pages of the same repeated byte that follow ``word``'s page."""
        if position >= len(self._data):
            return 0
        if word >> 63:  # no block is so large; below, no sum of addresses has more than 64 bits
            return 0
        file, position, room = self._data.extent(position)
        size = position + room
        total = 0
        window = 16
        while True:
            while window > 1 and position + window * c.ZERO_STRIDE > size:
                window = _WINDOWS[_WINDOWS.index(window) + 1]
            length = window * c.ZERO_STRIDE
            if position + length > size:
                return total
            first = (word + c.PAGE_SIZE) << 8 | fill
            want = (first * _ONES[window] + _STEPS[window]).to_bytes(length, "big")
            found = file[position : position + length]
            if found != want:
                return total + _common(found, want) // c.ZERO_STRIDE
            total += window
            position += length
            word += window * c.PAGE_SIZE
            window = min(1024, window * 8) if window > 1 else 1


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many items agree before the first that does not."""
    low, high = 0, len(left)
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
