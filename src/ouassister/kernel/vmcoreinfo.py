"""VMCOREINFO: the note in which a kernel describes itself for crash dumps.

The kernel composes it in one page of its own (``vmcoreinfo_data``), so the text starts at a
page boundary and ends, with a NUL, within that page. Programs in the guest hold look-alikes
(format strings); what is accepted here is still only a candidate, which the kernel's own
``init_uts_ns`` has to confirm.

Source: Linux v6.1 ``kernel/crash_core.c`` (``crash_save_vmcoreinfo_init``,
``vmcoreinfo_append_str``), ``arch/x86/kernel/machine_kexec_64.c``
(``arch_crash_save_vmcoreinfo``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import PageAbsentError
from ouassister.model import PhysAddr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.memory import PhysicalMemory

_PAGE: Final = 4096  # VMCOREINFO_BYTES is PAGE_SIZE
_LINE: Final = re.compile(r"[A-Za-z0-9_.()\-]+=[ -~]*")
_NEEDLE: Final = b"OSRELEASE="


@dataclass(frozen=True, slots=True)
class Vmcoreinfo:
    """One parsed note.

    Attributes:
        text: The whole note, as drgn takes it.
        address: Where it was found.
        values: ``key=value`` lines; ``SYMBOL(name)`` and the like are keys.
    """

    text: bytes
    address: PhysAddr
    values: dict[str, str]

    @property
    def release(self) -> str:
        """``uname -r`` of the kernel that wrote the note."""
        return self.values["OSRELEASE"]

    def number(self, key: str, *, base: int = 10) -> int | None:
        """Return a numeric value, or None when it is missing or no number."""
        try:
            return int(self.values[key], base)
        except (KeyError, ValueError):
            return None

    def symbol(self, name: str) -> int | None:
        """Return the address of a symbol the note lists, or None."""
        return self.number(f"SYMBOL({name})", base=16)


def parse(raw: bytes, address: PhysAddr) -> Vmcoreinfo | None:
    """Parse one page; None when it is no note of an x86-64 kernel."""
    text, nul, _ = raw.partition(b"\0")
    if not nul or not text.endswith(b"\n") or not text.isascii():
        return None
    values: dict[str, str] = {}
    for line in text.decode("ascii").splitlines():
        if not _LINE.fullmatch(line):
            return None
        key, _, value = line.partition("=")
        values.setdefault(key, value)
    note = Vmcoreinfo(text, address, values)
    if values.get("PAGESIZE") != str(_PAGE) or not values.get("OSRELEASE"):
        return None
    if note.symbol("swapper_pg_dir") is None or note.number("NUMBER(phys_base)") is None:
        return None
    return note


def find(memory: PhysicalMemory) -> Iterator[Vmcoreinfo]:
    """Yield the notes in memory that parse."""
    return Notes(memory).find(memory)


class Notes:
    """The notes in a save; it is searched once, however many layouts are tried.

    Args:
        memory: Its memory in any layout.
    """

    def __init__(self, memory: PhysicalMemory) -> None:
        self._more = memory.page_starts(_NEEDLE)
        self._known: list[tuple[bytes, int]] = []

    def find(self, memory: PhysicalMemory) -> Iterator[Vmcoreinfo]:
        """Yield the notes that parse, where a layout has them; at most a few do."""
        for name, offset in self._places():
            for address in memory.addresses(name, offset):
                try:
                    note = parse(memory.read(address, _PAGE), address)
                except PageAbsentError:
                    continue
                if note is not None:
                    yield note

    def _places(self) -> Iterator[tuple[bytes, int]]:
        yield from list(self._known)
        for place in self._more:
            self._known.append(place)
            yield place
