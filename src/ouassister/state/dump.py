"""A dump of guest memory: ranges of guest-physical addresses, and no device state.

Source: QEMU v7.2.0 ``dump/dump.c`` (``guest_phys_blocks_append``: all RAM as the processors see
it, video memory and ROMs included).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ouassister.errors import UnsupportedStateError
from ouassister.state.c_qevm import PAGE_SIZE
from ouassister.state.data import Data
from ouassister.state.ram_table import FixedPages, RamBlock

FOUR_GIB: Final = 1 << 32
_ONE_MIB: Final = 1 << 20
MAX_RANGES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class DumpRange:
    """A stretch of guest-physical memory; ``offset`` is where its first byte lies in the data."""

    address: int
    size_bytes: int
    offset: int


@dataclass(slots=True)
class Dump:
    """An open, indexed dump.

    Attributes:
        path: The file.
        data: Its bytes, or its pages behind one another.
        ranges: Its memory, upwards and without overlap.
        blocks: The same as RAM blocks, named by their addresses.
        machine: Not told by a dump.
        uuid: Not told by a dump.
    """

    path: Path
    data: Data
    ranges: tuple[DumpRange, ...]
    machine: str = ""
    uuid: bytes = b""
    blocks: dict[bytes, RamBlock] = field(init=False)

    def __post_init__(self) -> None:
        """Make the blocks."""
        self.blocks = {}
        for one in self.ranges:
            name = b"%#x" % one.address
            pages = FixedPages(None, one.size_bytes // PAGE_SIZE, one.offset)
            self.blocks[name] = RamBlock(name, one.size_bytes, pages)

    def hole(self) -> int:
        """Return where RAM below 4 GiB ends: RAM from 1 MiB on is one piece.

        Raises:
            UnsupportedStateError: There is no RAM at 1 MiB.
        """
        end = 0
        for one in self.ranges:
            if one.address == end or (end == 0 and one.address <= _ONE_MIB < _end(one)):
                end = _end(one) if _end(one) > _ONE_MIB else 0
        if not _ONE_MIB < end <= FOUR_GIB:
            raise UnsupportedStateError("memory ranges", 0, len(self.ranges), "no RAM at 1 MiB")
        return end

    def ram_bytes(self) -> int:
        """Return the size of base memory: up to the hole and above 4 GiB."""
        high = max((_end(one) for one in self.ranges), default=0)
        return self.hole() + max(high - FOUR_GIB, 0)

    def description(self) -> dict[str, Any]:
        """Refuse: there is no device state.

        Raises:
            UnsupportedStateError: Always.
        """
        raise UnsupportedStateError("device state", 0, "none", "a dump holds memory alone")

    def close(self) -> None:
        """Release the data."""
        self.data.close()


def _end(one: DumpRange) -> int:
    return one.address + one.size_bytes
