"""BPF Type Format: the type table that a kernel carries about itself; format only.

The index keeps one offset and one name per type; nothing else is decoded until it is asked
for. How long a type is depends on one word of it, of which few values occur: its length is worked
out once for each. Everything in the table is checked against its bounds, since it comes from a
guest.

Source: Linux ``Documentation/bpf/btf.rst`` and ``include/uapi/linux/btf.h`` (v6.12, v7.3);
FLOAT since b1828f0b0482 (v5.13), DECL_TAG since b5ea834dde6b (v5.16; named so by 223f903e9c83,
v5.16), TYPE_TAG since 8c42d2fa4eea (v5.17), ENUM64 since 6089fb325cf7 (v6.0). Sizes of kinds, for
readers that do not know them, since 222edc843c15 ("btf: Add BTF kind layout encoding to UAPI",
v7.1); kinds have 7 bits and counts 24 in v7.3, where the bits more had to be zero before.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, UnsupportedGuestError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("<HBBIIIII")
_LAYOUT: Final = struct.Struct("<II")  # layout_off, layout_len, behind the header
_KINDS: Final = 128
_MAX_BYTES: Final = 256 << 20
_MAX_LENGTHS: Final = 1 << 16  # that are remembered; a kernel has some hundred
MAX_NAME: Final = 4096


class Kind(IntEnum):
    """``BTF_KIND_*``."""

    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# Words behind the three of ``struct btf_type``: a constant, and one count per ``vlen``.
_FIXED: Final = {Kind.INT: 1, Kind.ARRAY: 3, Kind.VAR: 1, Kind.DECL_TAG: 1}
_EACH: Final = {Kind.STRUCT: 3, Kind.UNION: 3, Kind.ENUM: 2, Kind.FUNC_PROTO: 2,
                Kind.DATASEC: 3, Kind.ENUM64: 3}  # fmt: skip
_KNOWN: Final = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class Record:
    """One type, undecoded: ``size_or_type`` and ``words`` mean what its kind says."""

    kind: Kind
    name: str
    flag: bool  # kind_flag
    count: int  # vlen
    size_or_type: int
    words: tuple[int, ...]


class Btf:
    """An indexed table.

    Args:
        raw: The whole section.
        base: The table that this one extends (a module's), if any.

    Raises:
        CorruptGuestError: The table exceeds its own bounds.
        UnsupportedGuestError: A kind whose size is not known, or another version.
    """

    def __init__(self, raw: bytes, base: Btf | None = None) -> None:
        self._base = base
        self.first_id: int = base.first_id + len(base) if base else 1
        self._first_string: int = base._first_string + len(base._strings) if base else 0
        types, strings, layout = _sections(raw, split=base is not None)
        self._strings: bytes = strings
        self._words = array("I", types)
        self._starts = _index(self._words, layout)
        self._names = [self._words[start] for start in self._starts]

    def __len__(self) -> int:
        """Return the number of types in this table, without the base."""
        return len(self._starts)

    def name(self, offset: int) -> str:
        """Return the string at an offset of the string section."""
        if offset < self._first_string and self._base:
            return self._base.name(offset)
        start = offset - self._first_string
        end = self._strings.find(b"\0", start, start + MAX_NAME) if start >= 0 else -1
        if end < 0:
            raise CorruptGuestError(f"BTF string {offset:#x} is out of bounds")
        return self._strings[start:end].decode("utf-8", "replace")

    def record(self, type_id: int) -> Record:
        """Return one type by its id (0 is void, and no record).

        Raises:
            CorruptGuestError: There is no such type.
            UnsupportedGuestError: Its kind is not in `Kind`.
        """
        if type_id < self.first_id and self._base:
            return self._base.record(type_id)
        index = type_id - self.first_id
        if not 0 <= index < len(self._starts):
            raise CorruptGuestError(f"BTF type id {type_id} is out of bounds")
        start = self._starts[index]
        end = self._starts[index + 1] if index + 1 < len(self._starts) else len(self._words)
        name, info, size_or_type, *words = self._words[start:end]
        kind = _kind(info)
        if kind not in _KNOWN:
            raise UnsupportedGuestError(f"BTF kind {kind} is not known")
        return Record(
            Kind(kind), self.name(name), bool(info >> 31), info & 0xFF_FFFF,
            size_or_type, tuple(words),
        )  # fmt: skip

    def find(self, name: str, kinds: Collection[Kind]) -> Iterator[int]:
        """Yield the ids of the types with that name and one of those kinds."""
        if self._base:
            yield from self._base.find(name, kinds)
        for offset in self.string_offsets(name):
            index = -1
            while True:
                try:
                    index = self._names.index(offset, index + 1)
                except ValueError:
                    break
                if _kind(self._words[self._starts[index] + 1]) in kinds:
                    yield self.first_id + index

    def of_kind(self, kinds: Collection[Kind]) -> Iterator[int]:
        """Yield the ids of all types of some kinds."""
        if self._base:
            yield from self._base.of_kind(kinds)
        for index, start in enumerate(self._starts):
            if _kind(self._words[start + 1]) in kinds:
                yield self.first_id + index

    def string_offsets(self, name: str) -> list[int]:
        """Return where a string stands in the string section, and in that of the base."""
        if not name:
            return []
        encoded = name.encode()
        offsets = []
        at = self._strings.find(b"\0" + encoded + b"\0")
        if at >= 0:  # pahole stores each string once
            offsets.append(self._first_string + at + 1)
        return offsets + (self._base.string_offsets(name) if self._base else [])


def _sections(raw: bytes, *, split: bool) -> tuple[bytes, bytes, bytes]:
    if not _HEADER.size <= len(raw) <= _MAX_BYTES:
        raise CorruptGuestError(f"a BTF section of {len(raw)} bytes")
    magic, version, flags, header, type_at, type_size, string_at, string_size = _HEADER.unpack_from(
        raw
    )
    if magic != _MAGIC:
        raise CorruptGuestError(f"BTF magic is {magic:#x}")
    if (version, flags) != (1, 0):
        raise UnsupportedGuestError(f"BTF version {version}, flags {flags:#x} is not known")
    body = len(raw) - header
    if header < _HEADER.size or header % 4 or type_at % 4 or type_size % 4:
        raise CorruptGuestError("the BTF header is not aligned")
    if type_at + type_size > body or string_at + string_size > body or not string_size:
        raise CorruptGuestError("the BTF header points out of its section")
    types = raw[header + type_at : header + type_at + type_size]
    strings = raw[header + string_at : header + string_at + string_size]
    # A table that extends another need not start with the empty name (btf_parse_str_sec).
    if (strings[0] and not split) or strings[-1]:
        raise CorruptGuestError("BTF strings do not start and end with NUL")
    layout = b""
    if header >= _HEADER.size + _LAYOUT.size:
        layout_at, layout_size = _LAYOUT.unpack_from(raw, _HEADER.size)
        if layout_size % 4 or layout_at + layout_size > body:
            raise CorruptGuestError("the BTF header points out of its section")
        layout = raw[header + layout_at : header + layout_at + layout_size]
    return types, strings, layout


def _kind(info: int) -> int:
    return (info >> 24) & 0x7F


def _index(words: array[int], layout: bytes) -> list[int]:
    """Return where each type starts."""
    fixed, each = _sizes(layout)
    lengths: dict[int, int] = {}  # words of a type by its ``info``
    starts: list[int] = []
    append = starts.append
    position, end = 0, len(words)
    last = end - 2
    while position < last:
        append(position)
        info = words[position + 1]
        try:
            position += lengths[info]
        except KeyError:
            kind = _kind(info)
            if not fixed[kind]:
                raise UnsupportedGuestError(f"BTF kind {kind} is not known") from None
            length = fixed[kind] + each[kind] * (info & 0xFF_FFFF)
            if len(lengths) < _MAX_LENGTHS:
                lengths[info] = length
            position += length
    if position != end:
        raise CorruptGuestError("the last BTF type reaches beyond its section")
    return starts


def _sizes(layout: bytes) -> tuple[list[int], list[int]]:
    """Return words per type and words per ``vlen`` by kind; 0 words for an unknown kind.

    Kinds that we know have the size we know; of others the table itself may tell.
    """
    fixed = [3 + _FIXED.get(Kind(kind), 0) if kind in _KNOWN else 0 for kind in range(_KINDS)]
    each = [_EACH.get(Kind(kind), 0) if kind in _KNOWN else 0 for kind in range(_KINDS)]
    for kind, (info_size, element_size, _flags) in enumerate(struct.iter_unpack("<BBH", layout)):
        if 0 < kind < _KINDS and kind not in _KNOWN and not (info_size | element_size) % 4:
            fixed[kind] = 3 + info_size // 4
            each[kind] = element_size // 4
    return fixed, each
