"""``dump-guest-memory`` in the kdump-compressed format: each page compressed for itself.

::

    block 0  disk_dump_header   block 1  kdump_sub_header   bitmap, the same again
    one descriptor for each page of the bitmap (offset, size, flags), page data

The pages of the bitmap are numbered in their order; behind a `Dump` they lie at their number,
expanded when they are read. A page of zeros shares the first page of the data. Written to a pipe
or by a QEMU before 8.2 the file is flattened: records of (offset, length, bytes), in which it is
spread out again by an index.

Source: QEMU v7.2.0 ``include/sysemu/dump.h`` (``DiskDumpHeader64``, ``KdumpSubHeader64``,
``PageDescriptor``, ``MakedumpfileHeader``), ``dump/dump.c`` (``create_kdump_vmcore``,
``write_dump_bitmap``, ``write_dump_pages``, ``write_buffer``).
"""

from __future__ import annotations

import bisect
import functools
import re
import struct
import zlib
from array import array
from typing import TYPE_CHECKING, Final

from ouassister.errors import TruncatedStateError, UnsupportedStateError
from ouassister.state import lzo, snappy
from ouassister.state.c_qevm import PAGE_SIZE
from ouassister.state.data import GAP, Data, MappedFile, Reader, Stretches
from ouassister.state.dump import MAX_RANGES, Dump, DumpRange

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator
    from pathlib import Path

SIGNATURE: Final = b"KDUMP   "
_FLAT: Final = struct.Struct(">16sqq")  # signature, type, version
_RECORD: Final = struct.Struct(">qq")  # offset, buf_size
_FLAT_DATA: Final = 4096  # MAX_SIZE_MDF_HEADER
_MAX_RECORDS: Final = 1 << 26
_HEADER: Final = struct.Struct("<8sI390s22s10I")
_STATUS_AT, _BLOCK_AT, _BLOCK32_AT = 424, 428, 416
_SUB_HEADER: Final = struct.Struct("<QIIQQQQQQQQQQQ")
_VERSION: Final = 6
_DUMP_LEVEL: Final = 1  # zero pages are stored once
_METHODS: Final = {1: "zlib", 2: "lzo", 4: "snappy"}
_DESCRIPTOR: Final = struct.Struct("<QIIQ")  # offset, size, flags, page_flags
_AT_ONCE: Final = 1 << 15  # descriptors
_MAX_PAGES: Final = 1 << 30
_MAX_GAP: Final = 1 << 30  # QEMU leaves less than a bitmap
_RUNS: Final = re.compile(rb"\xff+|[^\xff\0]")
_CACHED: Final = 1024  # pages


def open_kdump(path: Path, file: MappedFile) -> Dump:
    """Index a dump; it takes over the mapped file.

    Raises:
        TruncatedStateError: It ends early.
        UnsupportedStateError: Something in it was never seen before.
    """
    flat = file[: len(SIGNATURE)] != SIGNATURE
    data: Data = _unflatten(path, file) if flat else file
    reader = Reader(data, str(path))
    status, first, bitmap_bytes = _header(reader)
    at = first
    reader.need(at, 2 * bitmap_bytes, "bitmaps")
    bitmap = data[at : at + bitmap_bytes]
    if data[at + bitmap_bytes : at + 2 * bitmap_bytes] != bitmap:
        raise UnsupportedStateError(
            "second bitmap", at + bitmap_bytes, "other", "pages were left out of this dump"
        )
    ranges = []
    pages = 0
    for start, count in _set_runs(bitmap, at):
        place = (1 + pages) * PAGE_SIZE  # offset 0 would mean an absent page
        ranges.append(DumpRange(start * PAGE_SIZE, count * PAGE_SIZE, place))
        pages += count
    descriptors = at + 2 * bitmap_bytes
    reader.need(descriptors, pages * _DESCRIPTOR.size, "page descriptors")
    return Dump(path, CompressedPages(reader, status, descriptors, pages), tuple(ranges))


def _header(reader: Reader) -> tuple[int, int, int]:
    """Return the compression, where the bitmaps start, and the length of one."""
    head = reader.bytes(0, _HEADER.size, "kdump header")
    signature, version, _, _, status, block, sub_blocks, bitmap_blocks, *_ = _HEADER.unpack(head)
    if signature != SIGNATURE:
        raise UnsupportedStateError("signature", 0, signature)
    if version != _VERSION:
        raise UnsupportedStateError("header_version", 8, version)
    if block != PAGE_SIZE:
        if int.from_bytes(head[_BLOCK32_AT : _BLOCK32_AT + 4], "little") == PAGE_SIZE:
            raise UnsupportedStateError(
                "block_size", _BLOCK_AT, block, "the guest was not in 64-bit mode"
            )
        raise UnsupportedStateError("block_size", _BLOCK_AT, block)
    if status not in _METHODS:
        raise UnsupportedStateError("status", _STATUS_AT, status, "not zlib, lzo or snappy")
    raw = reader.bytes(block, _SUB_HEADER.size, "kdump sub header")
    _, level, split, *_, max_page = _SUB_HEADER.unpack(raw)
    if (level, split) != (_DUMP_LEVEL, 0):
        raise UnsupportedStateError("dump_level and split", block + 8, (level, split))
    if bitmap_blocks % 2 or not 0 < max_page <= min(_MAX_PAGES, bitmap_blocks // 2 * block * 8):
        raise UnsupportedStateError("max_mapnr_64", block + 96, (max_page, bitmap_blocks))
    return status, (1 + sub_blocks) * block, bitmap_blocks // 2 * block


def _set_runs(bitmap: bytes, at: int) -> list[tuple[int, int]]:
    """Return (first, number) of each run of set bits."""
    runs: list[tuple[int, int]] = []

    def add(start: int, count: int) -> None:
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((start, count))
        if len(runs) > MAX_RANGES:
            raise UnsupportedStateError("bitmap", at, len(runs), "too many ranges")

    for match in _RUNS.finditer(bitmap):
        start = match.start() * 8
        if match[0][0] == 0xFF:
            add(start, 8 * len(match[0]))
            continue
        for bit in range(8):
            if match[0][0] >> bit & 1:
                add(start + bit, 1)
    return runs


def _unflatten(path: Path, file: MappedFile) -> Stretches:
    """Index the records of a flattened file."""
    reader = Reader(file, str(path))
    _signature, kind, version = _FLAT.unpack(reader.bytes(0, _FLAT.size, "flat header"))
    if (kind, version) != (1, 1):
        raise UnsupportedStateError("type and version of the flat header", 16, (kind, version))
    found: list[tuple[int, int, int]] = []
    position = _FLAT_DATA
    while True:
        offset, size = _RECORD.unpack(reader.bytes(position, _RECORD.size, "flat record"))
        if (offset, size) == (-1, -1):
            break
        if offset < 0 or size <= 0 or offset + size > 1 << 62 or len(found) >= _MAX_RECORDS:
            raise UnsupportedStateError("flat record", position, (offset, size))
        reader.need(position + _RECORD.size, size, "flat record")
        found.append((offset, position + _RECORD.size, size))
        position += _RECORD.size + size
    if position + _RECORD.size != len(file):
        raise UnsupportedStateError("end of the flat file", position, len(file), "bytes behind it")
    found.sort()
    starts, places = array("Q"), array("q")
    end = 0
    for offset, place, size in found:
        if offset < end:
            raise UnsupportedStateError("flat record", place, offset, "written twice")
        if offset - end > _MAX_GAP:
            raise UnsupportedStateError("flat record", place, offset, "far behind the others")
        if offset > end:
            starts.append(end)
            places.append(GAP)
        starts.append(offset)
        places.append(place)
        end = offset + size
    return Stretches(file, starts, places, end)


class CompressedPages:
    """The pages of a dump behind one another, from offset 4096 on, expanded when they are read.

    Args:
        reader: The dump.
        status: Its compression.
        descriptors: Where the page descriptors start.
        pages: Their number.
    """

    def __init__(self, reader: Reader, status: int, descriptors: int, pages: int) -> None:
        self._data = reader.data
        self._read = reader
        self._status = status
        self._descriptors = descriptors
        self._pages = pages
        self._page = functools.lru_cache(_CACHED)(self._expand)
        self._check_end()

    def __len__(self) -> int:
        """See `Data`."""
        return (1 + self._pages) * PAGE_SIZE

    def __getitem__(self, where: slice, /) -> bytes:
        """See `Data`."""
        start, end, _step = where.indices(len(self))
        page, within = divmod(start, PAGE_SIZE)
        if end - start <= PAGE_SIZE - within:
            return self._page(page - 1)[within : within + end - start]
        last = (end - 1) // PAGE_SIZE
        joined = b"".join(self._page(number - 1) for number in range(page, last + 1))
        return joined[within : within + end - start]

    def extent(self, position: int) -> tuple[mmap.mmap, int, int]:
        """Refuse: nothing lies in the file as it is read."""
        raise TypeError(f"compressed pages are not mapped: {position:#x}")

    def search(self, needle: bytes, start: int, end: int) -> Iterator[int]:
        """See `Data`, but in two passes, and within pages alone.

        All compressions here leave a string as it is when nothing like it came before in the
        page. So the compressed bytes are searched first; only a caller who asks on makes every
        page be expanded.
        """
        first, last = start // PAGE_SIZE - 1, -(-end // PAGE_SIZE) - 1
        seen: set[int] = set()
        for number in self._likely(needle):
            if first <= number < last and number not in seen:
                seen.add(number)
                yield from self._within(number, needle)
        for number in range(first, last):
            if number not in seen and self._flags(number)[1] != self._zero:
                yield from self._within(number, needle)

    def last(self, needle: bytes, start: int, end: int) -> int:
        """Refuse: a dump has no end to look for."""
        raise TypeError(f"compressed pages are not searched backwards: {needle!r} {start} {end}")

    def trim(self) -> None:
        """See `Data`."""
        self._page.cache_clear()
        self._data.trim()

    def close(self) -> None:
        """See `Data`."""
        self._page.cache_clear()
        self._data.close()

    def _flags(self, number: int) -> tuple[int, int, int, int]:
        """Return where the descriptor is, and offset, size and flags of the page."""
        at = self._descriptors + number * _DESCRIPTOR.size
        raw = self._data[at : at + _DESCRIPTOR.size]
        offset, size, flags, _ = _DESCRIPTOR.unpack(raw)
        return at, offset, size, flags

    @property
    def _zero(self) -> int:
        """Where the page data starts, with the page of zeros."""
        return self._descriptors + self._pages * _DESCRIPTOR.size

    def _check_end(self) -> None:
        """The last page that has data of its own ends where the dump does."""
        for number in range(self._pages - 1, -1, -1):
            _, offset, size, _ = self._flags(number)
            if offset != self._zero:
                self._read.need(offset, size, "page data")
                if offset + size != self._read.size:
                    raise TruncatedStateError(
                        f"{self._read.name} has {self._read.size:#x} bytes where its last page "
                        f"ends at {offset + size:#x}"
                    )
                return

    def _expand(self, number: int) -> bytes:
        at, offset, size, flags = self._flags(number)
        if offset < self._zero or size > 2 * PAGE_SIZE or flags not in (0, self._status):
            raise UnsupportedStateError("page descriptor", at, (offset, size, flags))
        raw = self._read.bytes(offset, size, "page data")
        page = raw
        try:
            if flags == 1:
                engine = zlib.decompressobj()
                page = engine.decompress(raw, PAGE_SIZE + 1)
            elif flags == 2:
                page = lzo.expand(raw, PAGE_SIZE)
            elif flags == 4:
                page = snappy.expand(raw, PAGE_SIZE)
        except (zlib.error, lzo.LzoError, snappy.SnappyError) as error:
            raise UnsupportedStateError(
                f"{_METHODS[flags]} page", offset, raw[:8], str(error)
            ) from error
        if len(page) != PAGE_SIZE:
            raise UnsupportedStateError("expanded page", offset, len(page), "not of 4096 bytes")
        return page

    def _likely(self, needle: bytes) -> Iterator[int]:
        """Yield the pages whose compressed bytes hold the needle."""
        offsets, numbers = array("Q"), array("Q")
        for first in range(0, self._pages, _AT_ONCE):
            count = min(_AT_ONCE, self._pages - first)
            at = self._descriptors + first * _DESCRIPTOR.size
            raw = self._data[at : at + count * _DESCRIPTOR.size]
            for number, row in enumerate(_DESCRIPTOR.iter_unpack(raw), first):
                if row[0] != self._zero:
                    offsets.append(row[0])
                    numbers.append(number)
        for position in self._data.search(needle, self._zero, self._read.size):
            index = bisect.bisect_right(offsets, position) - 1
            if index >= 0:
                yield numbers[index]

    def _within(self, number: int, needle: bytes) -> Iterator[int]:
        page = self._page(number)
        found = page.find(needle)
        while found >= 0:
            yield (1 + number) * PAGE_SIZE + found
            found = page.find(needle, found + 1)
