"""Where kallsyms lies in a kernel that does not tell: found by the tables' own structure.

Before v6.0 VMCOREINFO says nothing of kallsyms. Its tables are one piece of the read-only data,
which lies between ``_stext`` and ``init_uts_ns``; both of these are in every note. The token of a
character that no pair replaced is the character itself, and the ten digits always are among those:
their strings are what is searched for. All else follows, and each step is checked: the index
behind the tokens, the markers before them, and the names, whose lengths have to lead from marker
to marker.

Source: Linux v5.10 ``scripts/kallsyms.c`` (``write_src``: offsets, relative base, number, names,
markers, token table, token index, each aligned to 8; one marker per 256 names).
"""

from __future__ import annotations

import itertools
import struct
from array import array
from typing import TYPE_CHECKING, Final

from ouassister.errors import PageAbsentError, UnsupportedGuestError
from ouassister.memory import NotMappedError
from ouassister.model import VirtAddr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.vmcoreinfo import Vmcoreinfo
    from ouassister.memory import VirtualMemory

_DIGITS: Final = b"".join(b"%d\0" % digit for digit in range(10))
_PAGE: Final = 4096
_CHUNK: Final = 1 << 20
_MAX_IMAGE: Final = 128 << 20
_MAX_MARKERS_BYTES: Final = 64 << 10  # of four million symbols
_MAX_TOKENS_BYTES: Final = 16 << 10
_MAX_NAMES_BYTES: Final = 16 << 20  # of a million symbols; 5.10 has two hundred thousand
_MAX_CANDIDATES: Final = 64
_MAX_BLOCK: Final = 256 * 129  # bytes of 256 names
_PER_MARKER: Final = 256
_INDEX: Final = struct.Struct("<256H")


def find_tables(virtual: VirtualMemory, note: Vmcoreinfo) -> dict[str, int]:
    """Return the address of each table, by the kernel's own name of it.

    Raises:
        UnsupportedGuestError: There are none with this structure.
    """
    start, end = note.symbol("_stext"), note.symbol("init_uts_ns")
    if start is not None and end is not None and start < end <= start + _MAX_IMAGE:
        for digits in itertools.islice(_find_back(virtual, start, end), _MAX_CANDIDATES):
            found = _tables(virtual, digits)
            if found is not None:
                return found
    raise UnsupportedGuestError(
        f"kernel {note.release} does not tell where its symbol table is, and none was found",
        hint="a kernel with CONFIG_KALLSYMS is needed; of those before Linux 6.0 the layout of"
        " 5.10 is known",
    )


def _find_back(virtual: VirtualMemory, start: int, end: int) -> Iterator[int]:
    """Yield where the digits stand; read-only data is nearer to the end."""
    behind = b""
    while end > start:
        at = max(start, end - _CHUNK)
        chunk = _read_what_is_mapped(virtual, at, end - at)
        data = chunk + behind
        place = data.rfind(_DIGITS)
        while place >= 0:
            yield at + place
            place = data.rfind(_DIGITS, 0, place)
        behind = chunk[: len(_DIGITS) - 1]
        end = at


def _read_what_is_mapped(virtual: VirtualMemory, start: int, size: int) -> bytes:
    """Read; pages that are gone (the image has gaps) are zero here, where zeros find nothing."""
    try:
        return virtual.read(VirtAddr(start), size)
    except (NotMappedError, PageAbsentError):
        if size <= _PAGE:
            return bytes(size)
    middle = (start + size // 2) & -_PAGE
    if not start < middle < start + size:
        return bytes(size)
    return _read_what_is_mapped(virtual, start, middle - start) + _read_what_is_mapped(
        virtual, middle, start + size - middle
    )


def _tables(virtual: VirtualMemory, digits: int) -> dict[str, int] | None:
    try:
        tokens = _tokens(virtual, digits)
        if tokens is None:
            return None
        table, index = tokens
        markers, last, count, first_block = _markers(virtual, table)
        if count < 2 or last > _MAX_NAMES_BYTES:
            return None
        names = _names(virtual, markers, last, count, first_block)
    except (NotMappedError, PageAbsentError):
        return None
    if names is None:
        return None
    symbols, number = names
    base = symbols - 16
    return {
        "kallsyms_offsets": base - _aligned(number * 4),
        "kallsyms_relative_base": base,
        "kallsyms_num_syms": symbols - 8,
        "kallsyms_names": symbols,
        "kallsyms_markers": markers,
        "kallsyms_token_table": table,
        "kallsyms_token_index": index,
    }


def _tokens(virtual: VirtualMemory, digits: int) -> tuple[int, int] | None:
    """Return the token table and its index."""
    text = _read_what_is_mapped(virtual, digits, _MAX_TOKENS_BYTES)
    end = 0
    for _ in range(ord("0"), 256):
        end = text.find(b"\0", end) + 1
        if not end:
            return None
    index = _aligned(digits + end)
    starts = _INDEX.unpack(virtual.read(VirtAddr(index), _INDEX.size))
    table = digits - starts[ord("0")]
    if starts[0] or list(starts) != sorted(starts) or not table + starts[255] < digits + end:
        return None
    if any(starts[ord("0") + digit] != starts[ord("0")] + 2 * digit for digit in range(10)):
        return None
    return table, index


def _markers(virtual: VirtualMemory, table: int) -> tuple[int, int, int, int]:
    """Return address, last value, number and second value of the markers before the tokens."""
    if table % 8:
        return 0, 0, 0, 0
    raw = _read_what_is_mapped(virtual, table - _MAX_MARKERS_BYTES, _MAX_MARKERS_BYTES)
    words = memoryview(raw).cast("I")
    end = len(words)
    if not words[end - 1]:  # padding
        end -= 1
    first = end - 1
    while first > 0 and words[first - 1] < words[first]:
        first -= 1
    if words[first] or end - first < 2:
        return 0, 0, 0, 0
    return table - (len(words) - first) * 4, words[end - 1], end - first, words[first + 1]


def _names(
    virtual: VirtualMemory, markers: int, last: int, count: int, first_block: int
) -> tuple[int, int] | None:
    """Return the address and the number of the names."""
    lowest = markers - last - _MAX_BLOCK - 8 & -8
    data = _read_what_is_mapped(virtual, lowest, markers - lowest)
    numbers = array("I", data[: (len(data) & -8)])
    for place in range((len(data) - last) & -8, 8, -8):
        number, padding = numbers[place // 4 - 2], numbers[place // 4 - 1]
        if padding or not (count - 1) * _PER_MARKER < number <= count * _PER_MARKER:
            continue
        if _skip(data, place, _PER_MARKER) != place + first_block:
            continue
        end = _skip(data, place + last, number - (count - 1) * _PER_MARKER)
        if end <= len(data) < end + 8:
            return lowest + place, number
    return None


def _skip(data: bytes, position: int, names: int) -> int:
    """Return where so many names end."""
    for _ in range(names):
        if position >= len(data):
            return -1
        position += 1 + data[position]
    return position


def _aligned(address: int) -> int:
    return -(-address // 8) * 8
