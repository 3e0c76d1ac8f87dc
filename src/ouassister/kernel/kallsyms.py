"""The kernel's own symbol table, looked up by name straight from its compressed form.

Names are sequences of tokens, stored in address order. Expanding all of them costs a quarter of
a second; so a lookup of several names makes one pass and expands only those entries whose first
and last token fit one of the names.

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
import struct
from array import array
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel import kallsyms_scan
from ouassister.model import VirtAddr

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.kernel.vmcoreinfo import Vmcoreinfo
    from ouassister.memory import VirtualMemory

_MAX_SYMBOLS: Final = 4_000_000
_MAX_NAMES_BYTES: Final = 64 << 20
_KEYS: Final = ("kallsyms_names", "kallsyms_num_syms", "kallsyms_token_table",
                "kallsyms_token_index", "kallsyms_offsets")  # fmt: skip
_BASE: Final = "kallsyms_relative_base"
_TOKEN_INDEX: Final = struct.Struct("<256H")
_MASK: Final = (1 << 64) - 1


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
        names = {name.encode() for name in wanted}
        # The first token starts with the symbol's type letter.
        firsts = {
            code
            for code, token in enumerate(self._tokens)
            if token and any(name.startswith(token[1:]) for name in names)
        }
        lasts = {
            code
            for code, token in enumerate(self._tokens)
            if token and any(name.endswith(token) or token[1:] == name for name in names)
        }
        data, token_of = self._names, self._tokens.__getitem__
        position = 0
        try:
            for index in range(self._count):
                length = data[position]
                position += 1
                if length & 0x80:
                    length = length & 0x7F | data[position] << 7
                    position += 1
                end = position + length
                if data[position] in firsts and data[end - 1] in lasts:
                    name = b"".join(map(token_of, data[position:end]))[1:]
                    if name in names and found[name.decode()] is None:
                        found[name.decode()] = index
                position = end
        except IndexError as error:
            raise CorruptGuestError("kallsyms_names is longer than its place") from error
        return found


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
