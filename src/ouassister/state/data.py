"""The bytes of a save file: one mapped file, or a stream that lies in it in stretches.

Nothing is copied but what is asked for. A stream inside of a qcow2 image or of a flattened dump
lies in stretches; `Stretches` gives it positions of its own, from 0 on.

Source: Linux ``mmap(2)``, ``madvise(2)`` (a private file mapping's pages can be dropped at any
time and are read again from the file).
"""

from __future__ import annotations

import bisect
import mmap
import os
import stat
from typing import TYPE_CHECKING, Final, Protocol

from ouassister.errors import NotSuspendedError, TruncatedStateError, UnsupportedStateError

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator
    from pathlib import Path

TRIM_BYTES: Final = 64 << 20  # of the file that stay mapped at most while it is scanned
GAP: Final = -1
_BACKWARDS: Final = 1 << 20
_GAP_BYTES: Final = 1 << 20


class Data(Protocol):
    """Bytes that can be cut and searched."""

    def __len__(self) -> int:
        """Return the number of bytes."""

    def __getitem__(self, where: slice, /) -> bytes:
        """Return the bytes from ``where.start`` to ``where.stop``, fewer at the end."""

    def extent(self, position: int) -> tuple[mmap.mmap, int, int]:
        """Return the mapped file, where in it ``position`` is, and how many bytes follow there."""

    def search(self, needle: bytes, start: int, end: int) -> Iterator[int]:
        """Yield the positions of ``needle`` between ``start`` and ``end``, overlaps included."""

    def last(self, needle: bytes, start: int, end: int) -> int:
        """Return the last position of ``needle`` between ``start`` and ``end``, or -1."""

    def trim(self) -> None:
        """Give back what scanning has mapped; it is read again when it is needed."""

    def close(self) -> None:
        """Release everything."""


class MappedFile(mmap.mmap):
    """A file, mapped to be read."""

    def extent(self, position: int) -> tuple[mmap.mmap, int, int]:
        """See `Data`."""
        return self, position, len(self) - position

    def search(self, needle: bytes, start: int, end: int) -> Iterator[int]:
        """See `Data`."""
        while start < end:
            stop = min(start + TRIM_BYTES + len(needle) - 1, end)
            position = self.find(needle, start, stop)
            while position >= 0:
                yield position
                position = self.find(needle, position + 1, stop)
            self.trim()
            start += TRIM_BYTES

    def last(self, needle: bytes, start: int, end: int) -> int:
        """See `Data`."""
        return self.rfind(needle, start, end)

    def trim(self) -> None:
        """See `Data`."""
        self.madvise(mmap.MADV_DONTNEED)


class Stretches:
    """Bytes that lie in a mapped file in stretches, one after the other.

    Args:
        file: The mapped file; it is closed with this object.
        starts: Where each stretch starts here, from 0 upwards.
        places: Where it starts in the file; `GAP` for one that was never written.
        size: Bytes in all.
    """

    def __init__(self, file: MappedFile, starts: array[int], places: array[int], size: int) -> None:
        self._file = file
        self._starts = starts
        self._places = places
        self._size = size
        # A gap is as long as a hostile file says: it is read in pieces of this one.
        self._gap = mmap.mmap(-1, _GAP_BYTES)

    def __len__(self) -> int:
        """See `Data`."""
        return self._size

    def __getitem__(self, where: slice, /) -> bytes:
        """See `Data`."""
        start, end, _step = where.indices(self._size)
        if start >= end:
            return b""
        file, place, count = self.extent(start)
        if end - start <= count:
            return file[place : place + end - start]
        parts = []
        while start < end:
            file, place, count = self.extent(start)
            count = min(count, end - start)
            parts.append(file[place : place + count])
            start += count
        return b"".join(parts)

    def extent(self, position: int) -> tuple[mmap.mmap, int, int]:
        """See `Data`."""
        index = bisect.bisect_right(self._starts, position) - 1
        start, place = self._starts[index], self._places[index]
        if place == GAP:
            return self._gap, 0, min(self._end(index) - position, _GAP_BYTES)
        return self._file, place + position - start, self._end(index) - position

    def _end(self, index: int) -> int:
        return self._starts[index + 1] if index + 1 < len(self._starts) else self._size

    def _gap_at(self, position: int) -> tuple[int, int]:
        """Return start and end of the gap at a position; nothing when there is none."""
        index = bisect.bisect_right(self._starts, position) - 1
        if self._places[index] != GAP:
            return position, position
        return self._starts[index], self._end(index)

    def search(self, needle: bytes, start: int, end: int) -> Iterator[int]:
        """See `Data`."""
        scanned = 0
        more = len(needle) - 1
        while start < end:
            file, place, count = self.extent(start)
            count = min(count, end - start, TRIM_BYTES)
            empty = min(self._gap_at(start)[1], end) - start if any(needle) else 0
            found = -1 if empty > 0 else file.find(needle, place, place + count)
            count = max(count, empty)
            while found >= 0:
                yield start + found - place
                found = file.find(needle, found + 1, place + count)
            edge = max(start, start + count - more)
            around = self[edge : min(start + count + more, end)]  # a match over the edge
            found = around.find(needle)
            while found >= 0:
                if edge + found + more >= start + count:
                    yield edge + found
                found = around.find(needle, found + 1)
            start += count
            scanned += count
            if scanned > TRIM_BYTES:
                self.trim()
                scanned = 0

    def last(self, needle: bytes, start: int, end: int) -> int:
        """See `Data`."""
        stop = end
        more = len(needle) - 1
        while stop > start:
            begin = max(start, stop - _BACKWARDS)
            first, behind = self._gap_at(stop - 1)
            if any(needle) and max(first, start) < stop and behind >= min(stop + more, end):
                stop = max(first, start)  # nothing starts in here
                continue
            found = self[begin : min(stop + more, end)].rfind(needle)
            if found >= 0:
                return begin + found
            stop = begin
        return -1

    def trim(self) -> None:
        """See `Data`."""
        self._file.trim()

    def close(self) -> None:
        """See `Data`."""
        self._gap.close()
        self._file.close()


def map_file(path: Path) -> MappedFile:
    """Map a save file; nothing of it is written.

    Raises:
        NotSuspendedError: There is no such file.
        TruncatedStateError: It is empty.
        UnsupportedStateError: It is no regular file.
    """
    try:
        # O_NONBLOCK: the open of a FIFO must not wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotSuspendedError(f"there is no save file {path}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedStateError("save file", 0, str(path), "not a regular file")
        if status.st_size == 0:
            raise TruncatedStateError(f"{path} is empty: it ends at offset 0x0")
        return MappedFile(descriptor, 0, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)


class Reader:
    """Numbers and bytes at positions, with the error of a file that ends too early.

    Args:
        data: The bytes.
        name: What they are, for messages: a path.
    """

    def __init__(self, data: Data, name: str) -> None:
        self.data = data
        self.name = name
        self.size = len(data)

    def need(self, position: int, size: int, what: str) -> None:
        """Raise TruncatedStateError unless ``size`` bytes lie at ``position``."""
        if position + size > self.size:
            raise TruncatedStateError(
                f"{self.name} ends at offset {self.size:#x}, within the {what} "
                f"at offset {position:#x}"
            )

    def bytes(self, position: int, size: int, what: str) -> bytes:
        """Return ``size`` bytes."""
        self.need(position, size, what)
        return self.data[position : position + size]

    def u8(self, position: int, what: str) -> int:
        """Return one byte."""
        return self.bytes(position, 1, what)[0]

    def be16(self, position: int, what: str) -> int:
        """Return a big-endian number of 16 bits."""
        return int.from_bytes(self.bytes(position, 2, what), "big")

    def be32(self, position: int, what: str) -> int:
        """Return a big-endian number of 32 bits."""
        return int.from_bytes(self.bytes(position, 4, what), "big")

    def be64(self, position: int, what: str) -> int:
        """Return a big-endian number of 64 bits."""
        return int.from_bytes(self.bytes(position, 8, what), "big")
