"""Where each page of one RAM block lies in the save file, and fast reading of record runs.

A migration stream is mostly long runs of records for consecutive pages, at a fixed stride. One
`struct` call reads the headers of a whole window; comparing it with the expected ones costs a
few nanoseconds a page.

Source: QEMU v7.2.0 ``migration/ram.c``: ``ram_find_and_save_block`` walks the dirty bitmap
upwards, ``save_page_header`` leaves the name out while the block stays the same.
"""

from __future__ import annotations

import bisect
import mmap
import struct
from array import array
from itertools import takewhile
from typing import Final

from ouassister.state import c_qevm as c

MAX_BLOCK_BYTES: Final = 1 << 44  # 16 TiB: the table of it is 32 GiB of untouched zero pages
ABSENT: Final = 0  # no page can lie at offset 0: the stream's header does

_WINDOWS: Final = (1024, 128, 16, 1)
_PAGE_HEADERS: Final = {n: struct.Struct(">" + f"Q{c.PAGE_SIZE}x" * n) for n in _WINDOWS}
_FILL_HEADERS: Final = {n: struct.Struct(">" + "QB" * n) for n in _WINDOWS}


class PageTable:
    """Page number to file offset; `ABSENT`, or ``-1 - fill`` for a page of one repeated byte."""

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
        """Release the memory."""
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
        """Return (page, offset in the page) of a file offset, if a current page lies there."""
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


class RunReader:
    """Counts how many of the following records continue a run."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)

    def pages(self, position: int, word: int) -> int:
        """Count stored pages that follow ``word``'s page, with records from ``position`` on."""
        total = 0
        window = 16
        while True:
            while window > 1 and position + window * c.PAGE_STRIDE > self._size:
                window = _WINDOWS[_WINDOWS.index(window) + 1]
            if position + window * c.PAGE_STRIDE > self._size:
                return total
            first = word + c.PAGE_SIZE
            want = range(first, first + window * c.PAGE_SIZE, c.PAGE_SIZE)
            found = _PAGE_HEADERS[window].unpack_from(self._data, position)
            if found != tuple(want):
                same = zip(found, want, strict=True)
                return total + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
            total += window
            position += window * c.PAGE_STRIDE
            word += window * c.PAGE_SIZE
            window = min(1024, window * 8) if window > 1 else 1

    def fills(self, position: int, word: int, fill: int) -> int:
        """Count pages of the same repeated byte that follow ``word``'s page."""
        total = 0
        window = 16
        while True:
            while window > 1 and position + window * c.ZERO_STRIDE > self._size:
                window = _WINDOWS[_WINDOWS.index(window) + 1]
            if position + window * c.ZERO_STRIDE > self._size:
                return total
            first = word + c.PAGE_SIZE
            want = range(first, first + window * c.PAGE_SIZE, c.PAGE_SIZE)
            record = _FILL_HEADERS[window].unpack_from(self._data, position)
            found, bytes_ = record[::2], record[1::2]
            if found != tuple(want) or bytes_ != (fill,) * window:
                same = zip(found, want, bytes_, strict=True)
                return total + sum(
                    1 for _ in takewhile(lambda one: one[0] == one[1] and one[2] == fill, same)
                )
            total += window
            position += window * c.ZERO_STRIDE
            word += window * c.PAGE_SIZE
            window = min(1024, window * 8) if window > 1 else 1
