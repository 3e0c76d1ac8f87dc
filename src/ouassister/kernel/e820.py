"""The firmware's memory map in the guest, as the proof of where RAM lies.

The map was written by the machine's firmware, and the kernel keeps one copy of it untouched. It
tells the size of RAM above 4 GiB, and with that where the PCI hole below starts. A layout is
accepted only when the map fits it exactly: no RAM in the hole, and the end of RAM above 4 GiB
where the rest of the block ends.

Source: Linux v6.1 ``arch/x86/kernel/e820.c`` (``e820_table_firmware``),
``arch/x86/include/asm/e820/types.h`` (``struct e820_table``: a count, then packed entries);
SeaBIOS ``src/e820map.c``.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.memory import NotMappedError
from ouassister.memory.physical import FOUR_GIB, PAGE_SIZE
from ouassister.model import VirtAddr

if TYPE_CHECKING:
    from ouassister.kernel.kallsyms import Kallsyms
    from ouassister.memory import VirtualMemory

_RAM: Final = 1  # E820_TYPE_RAM
_MAX_ENTRIES: Final = 4096  # E820_MAX_ENTRIES is 128, plus three per NUMA node
_ENTRY: Final = struct.Struct("<QQI")
_FIRMWARE_SLACK: Final = 64 << 20  # what firmware may keep at the end of low memory


def ram_ranges(virtual: VirtualMemory, symbols: Kallsyms) -> list[tuple[int, int]]:
    """Return (start, end) of each range that the firmware called RAM.

    Raises:
        UnsupportedGuestError: The kernel does not tell.
        CorruptGuestError: The table is absurd, or leads nowhere.
    """
    variable = symbols.address("e820_table_firmware")
    if variable is None:
        raise UnsupportedGuestError("this kernel has no variable e820_table_firmware")
    try:
        table = VirtAddr(int.from_bytes(virtual.read(variable, 8), "little"))
        count = int.from_bytes(virtual.read(table, 4), "little")
        if not 0 < count <= _MAX_ENTRIES:
            raise CorruptGuestError(f"the guest's memory map has {count} entries")
        raw = virtual.read(VirtAddr(table + 4), count * _ENTRY.size)
    except NotMappedError as error:
        raise CorruptGuestError(f"the guest's memory map leads nowhere: {error}") from error
    return [(start, start + size) for start, size, kind in _ENTRY.iter_unpack(raw) if kind == _RAM]


def hole_start(ranges: list[tuple[int, int]], ram_bytes: int) -> int | None:
    """Return where the PCI hole starts if a memory map fits RAM of that size, else None.

    Without RAM above 4 GiB there is no hole in it: the result is ``ram_bytes``.
    """
    low = max((end for _, end in ranges if end <= FOUR_GIB), default=0)
    high = max((end for _, end in ranges if end > FOUR_GIB), default=FOUR_GIB)
    hole = ram_bytes - (high - FOUR_GIB)
    if any(start < FOUR_GIB < end for start, end in ranges):
        return None
    if hole % PAGE_SIZE or not low <= hole <= min(low + _FIRMWARE_SLACK, FOUR_GIB):
        return None
    return hole
