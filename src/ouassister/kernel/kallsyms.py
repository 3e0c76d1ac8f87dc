"""The kernel's own symbol table, looked up by name straight from its compressed form.

Names are sequences of tokens, stored in address order. Expanding all of them costs a quarter of
a second; so only those entries are expanded whose outer tokens fit a name that is looked for. The
first tokens of all entries are one string of bytes, the last ones another, the last but one a
third: each is translated to the names that its tokens fit, one bit for each of eight names.

Source: Linux ``kernel/kallsyms.c`` (``kallsyms_expand_symbol``, ``kallsyms_sym_address``) and
``scripts/kallsyms.c``. The table's place is in VMCOREINFO since f09bddbd8661 ("vmcoreinfo: add
kallsyms_num_syms symbol", v6.0) and its neighbours; before, `ouassister.kernel.kallsyms_scan`
finds it. Names longer than 127 tokens carry a two-byte length since 73bbb94466fd ("kallsyms:
support "big" kernel symbols", v6.1).
Each offset is relative to its own place since a081b5789255 ("kallsyms: Get rid of kallsyms relative
base", v7.0), and to a common base before.
"""

from __future__ import annotations

import itertools
import re
import struct
from array import array
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel import kallsyms_scan
from ouassister.model import VirtAddr

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ouassister.kernel.vmcoreinfo import Vmcoreinfo
    from ouassister.memory import VirtualMemory

_MAX_SYMBOLS: Final = 4_000_000
_MAX_NAMES_BYTES: Final = 64 << 20
_KEYS: Final = ("kallsyms_names", "kallsyms_num_syms", "kallsyms_token_table",
                "kallsyms_token_index", "kallsyms_offsets")  # fmt: skip
_BASE: Final = "kallsyms_relative_base"
_TOKEN_INDEX: Final = struct.Struct("<256H")
_MASK: Final = (1 << 64) - 1
_AT_ONCE: Final = 8  # bits of a byte
_SET: Final = re.compile(rb"[^\0]")
_LONG: Final = 0x80  # the length of an entry has a second byte


class Kallsyms:
    """Symbols of the kernel image; names that were asked for are remembered.

    Args:
        virtual: The kernel's address space.
        note: Its VMCOREINFO.
        names: Symbols that will be asked for; one pass finds them all.

    Raises:
        UnsupportedGuestError: The table is not found.
        CorruptGuestError: The table contradicts itself.
    """

    def __init__(self, virtual: VirtualMemory, note: Vmcoreinfo, names: Iterable[str] = ()) -> None:
        told = {key: note.symbol(key) for key in (*_KEYS, _BASE)}
        at = {key: value for key, value in told.items() if value is not None}
        if not at.keys() >= set(_KEYS):
            at = kallsyms_scan.find_tables(virtual, note)
        self._count = _u32(virtual, at["kallsyms_num_syms"])
        if not 0 < self._count <= _MAX_SYMBOLS:
            raise CorruptGuestError(f"kallsyms_num_syms is {self._count}")
        self._tokens = _tokens(virtual, at["kallsyms_token_table"], at["kallsyms_token_index"])
        self._names = _names(virtual, at)
        self._places, *self._outer = _entries(self._names, self._count)
        self._longest = max(map(len, self._tokens))
        self._whole: dict[bytes, list[int]] = {}  # tokens by their text
        self._tails: dict[bytes, list[int]] = {}  # likewise, without its first byte
        for code, token in enumerate(self._tokens):
            if token:
                self._whole.setdefault(token, []).append(code)
                self._tails.setdefault(token[1:], []).append(code)
        size = self._count * 4
        self._offsets = array("i")
        self._offsets.frombytes(virtual.read(VirtAddr(at["kallsyms_offsets"]), size))
        self._place = at["kallsyms_offsets"]
        self._base: int | None = None
        if _BASE in at:
            self._base = int.from_bytes(virtual.read(VirtAddr(at[_BASE]), 8), "little")
        known = {name: note.symbol(name) for name in ("_stext", "init_uts_ns")}
        known = {name: address for name, address in known.items() if address is not None}
        self._indexes = self._scan({*known, *names})
        # With a base: are negative offsets relative and others absolute
        # (CONFIG_KALLSYMS_ABSOLUTE_PERCPU, x86 before v6.15), or are all relative? The addresses
        # that the note has tell.
        for self._absolute_percpu in (False, True):
            if known and all(self.address(name) == known[name] for name in known):
                break
        else:
            raise CorruptGuestError(
                f"kallsyms does not find {' and '.join(known) or '_stext'} where VMCOREINFO says"
            )

    def learn(self, names: Iterable[str]) -> None:
        """Look several names up in one pass over the table."""
        wanted = {name for name in names if name not in self._indexes}
        if wanted:
            self._indexes.update(self._scan(wanted))

    def address(self, name: str) -> VirtAddr | None:
        """Return the address of a symbol, or None when there is no such symbol."""
        if name not in self._indexes:
            self.learn((name,))
        index = self._indexes[name]
        return None if index is None else VirtAddr(self._address(index))

    def _address(self, index: int) -> int:
        offset = self._offsets[index]
        if self._base is None:
            return (self._place + 4 * index + offset) & _MASK
        if not self._absolute_percpu:
            return (self._base + (offset & 0xFFFF_FFFF)) & _MASK
        return offset if offset >= 0 else (self._base - 1 - offset) & _MASK

    def _scan(self, wanted: set[str]) -> dict[str, int | None]:
        """Return each name's place in the table; the first one when a name occurs again."""
        found: dict[str, int | None] = dict.fromkeys(wanted)
        order = list(wanted)
        for at in range(0, len(order), _AT_ONCE):
            names = {name.encode(): name for name in order[at : at + _AT_ONCE]}
            for index in self._candidates(list(names)):
                name = names.get(self._expand(index))
                if name is not None and found[name] is None:
                    found[name] = index
        return found

    def _candidates(self, names: list[bytes]) -> Iterator[int]:
        """Yield the entries, upwards, whose outer tokens fit one of a few names."""
        fits = [bytearray(256) for _ in self._outer]
        first, last_but_one, last = fits
        second: set[int] = set()
        for bit, name in enumerate(names):
            flag = 1 << bit
            for cut in range(len(name) + 1):
                # The first token starts with the symbol's type letter.
                before, behind = self._tails.get(name[:cut], ()), self._whole.get(name[cut:], ())
                if before:
                    for code in before:
                        first[code] |= flag
                    for end in range(cut + 1, min(cut + self._longest, len(name)) + 1):
                        second.update(self._whole.get(name[cut:end], ()))
                if behind:
                    for code in behind:
                        last[code] |= flag
                    for code in before:
                        last_but_one[code] |= flag
                    for begin in range(max(cut - self._longest, 0), cut):
                        for code in self._whole.get(name[begin:cut], ()):
                            last_but_one[code] |= flag
            for code in self._tails.get(name, ()):  # the only token, behind a length of 1
                last[code] |= flag
                last_but_one[1] |= flag
        flags = -1
        for tokens, fit in zip(self._outer, fits, strict=True):
            flags &= int.from_bytes(tokens.translate(fit), "little")
        for match in _SET.finditer(flags.to_bytes(self._count, "little")):
            index = match.start()
            place = self._places[index]
            # The next token, unless there is none, or the length has two bytes
            if not 1 < self._names[place] < _LONG or self._names[place + 2] in second:
                yield index

    def _expand(self, index: int) -> bytes:
        """Return an entry's name, without its type letter."""
        start, end = self._places[index] + 1, self._places[index + 1]
        if self._names[start - 1] & _LONG:
            start += 1
        return b"".join(map(self._tokens.__getitem__, self._names[start:end]))[1:]


def _entries(names: bytes, count: int) -> tuple[array[int], bytes, bytes, bytes]:
    """Return where each entry starts and the last one ends, and its outer tokens.

    Raises:
        CorruptGuestError: There are fewer entries.
    """
    places: list[int] = []
    append = places.append
    position = 0
    behind = bytearray(names)
    try:
        for _ in range(count):
            append(position)
            length = names[position]
            if length >= _LONG:
                length = (length & 0x7F | names[position + 1] << 7) + 1
                behind[position + 1] = names[position + 2]
            position += length + 1
        del behind[0]  # now the first token stands where the entry starts
        firsts = bytes([behind[place] for place in places])
        append(position)
        before = b"\0\0" + names
        last_but_ones = bytes([before[end] for end in places[1:]])
        before = b"\0" + names
        lasts = bytes([before[end] for end in places[1:]])
    except IndexError as error:
        raise CorruptGuestError("kallsyms_names is longer than its place") from error
    return array("I", places), firsts, last_but_ones, lasts


def _u32(virtual: VirtualMemory, address: int) -> int:
    return int.from_bytes(virtual.read(VirtAddr(address), 4), "little")


def _tokens(virtual: VirtualMemory, table: int, index: int) -> list[bytes]:
    starts = _TOKEN_INDEX.unpack(virtual.read(VirtAddr(index), _TOKEN_INDEX.size))
    text = virtual.read(VirtAddr(table), starts[-1] + 128)
    tokens = [text[start:].partition(b"\0")[0] for start in starts]
    if any(
        b != a + len(t) + 1 for (a, b), t in zip(itertools.pairwise(starts), tokens, strict=False)
    ):
        raise CorruptGuestError("kallsyms_token_index does not fit kallsyms_token_table")
    return tokens


def _names(virtual: VirtualMemory, at: dict[str, int]) -> bytes:
    """Read from the names up to the next table behind them; the order of tables has changed."""
    start = at["kallsyms_names"]
    behind = [address for address in at.values() if address > start]
    if not behind:
        raise UnsupportedGuestError("nothing known lies behind kallsyms_names in this kernel")
    size = min(behind) - start
    if size > _MAX_NAMES_BYTES:
        raise CorruptGuestError(f"kallsyms_names takes {size} bytes")
    return virtual.read(VirtAddr(start), size)
