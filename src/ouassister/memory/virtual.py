"""Virtual memory of an x86-64 guest: the page walk, over guest-physical memory.

Source: Intel SDM volume 3A, section 4.5 (4-level and 5-level paging); Linux
``arch/x86/include/asm/pgtable_types.h``.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.model import PhysAddr, VirtAddr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.memory.physical import PhysicalMemory

PAGE_SIZE: Final = 4096
_PRESENT: Final = 1
_LARGE: Final = 0x80
_FRAME: Final = 0x000F_FFFF_FFFF_F000
_TABLE: Final = struct.Struct("<512Q")
_MAX_CACHED: Final = 1 << 16  # translations; beyond, the cache starts anew


class NotMappedError(LookupError):
    """No page is mapped at a virtual address: swapped out, never touched, or a wild pointer.

    Attributes:
        address: The virtual address.
    """

    def __init__(self, address: int) -> None:
        super().__init__(f"no page is mapped at {address:#018x}")
        self.address = address


class VirtualMemory:
    """One address space.

    Args:
        physical: The memory that holds page tables and pages.
        root: Physical address of the top page table (CR3 without its flags).
        levels: 4, or 5 with LA57.
    """

    def __init__(self, physical: PhysicalMemory, root: PhysAddr, levels: int) -> None:
        self._physical = physical
        self._root = root & _FRAME
        self._top = 12 + 9 * (levels - 1)
        self._bits = 12 + 9 * levels
        self._left: int | None = None  # reads, where they are counted
        self._pages: dict[int, int] = {}
        self._tables: dict[int, tuple[int, ...]] = {}

    @contextlib.contextmanager
    def bounded(self, reads: int) -> Iterator[None]:
        """Within, allow so many reads and no more: what a hostile guest may cost.

        Structures may be shared, and lists of lists be as long as their product; whatever way is
        found to make a walk long, it ends here.

        Args:
            reads: How many; within another bound the smaller one holds.
        """
        before = self._left
        self._left = granted = reads if before is None else min(reads, before)
        try:
            yield
        finally:
            left, self._left = self._left, before
            if before is not None:
                self._left = before - (granted - left)

    def translate(self, address: int) -> PhysAddr:
        """Return the physical address behind a virtual one.

        Raises:
            NotMappedError: Nothing is mapped there.
            PageAbsentError: A page table was never saved.
        """
        page = address >> 12
        frame = self._pages.get(page)
        if frame is None:
            frame = self._walk(address)
            if len(self._pages) >= _MAX_CACHED:
                self._pages.clear()
            self._pages[page] = frame
        return PhysAddr(frame | (address & 0xFFF))

    def read(self, address: VirtAddr, size: int) -> bytes:
        """Read virtual memory.

        Args:
            address: First byte to read.
            size: Number of bytes; zero returns ``b""``.

        Returns:
            Exactly ``size`` bytes.

        Raises:
            NotMappedError: Some byte is not mapped.
            PageAbsentError: Some byte, or a page table, was never saved.
            CorruptGuestError: No more reads are left, within `bounded`.
        """
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise CorruptGuestError("the guest's kernel leads from one thing to another"
                                        " without end")  # fmt: skip
        within = address & 0xFFF
        if within + size <= PAGE_SIZE:
            return self._physical.read(self.translate(address), size)
        parts = []
        while size > 0:
            within = address & 0xFFF
            count = min(size, PAGE_SIZE - within)
            parts.append(self._physical.read(self.translate(address), count))
            address = VirtAddr(address + count)
            size -= count
        return b"".join(parts)

    def _walk(self, address: int) -> int:
        sign = address >> (self._bits - 1)
        if sign not in (0, (1 << (65 - self._bits)) - 1):
            raise NotMappedError(address)  # not canonical
        frame = self._root
        shift = self._top
        while True:
            entry = self._entries(frame)[(address >> shift) & 0x1FF]
            if not entry & _PRESENT:
                raise NotMappedError(address)
            frame = entry & _FRAME
            if shift == 12:
                return frame
            if entry & _LARGE and shift <= 30:  # 2 MiB or 1 GiB; bit 7 is reserved higher up
                inside = (1 << shift) - 1
                return (frame & ~inside) | (address & inside & ~0xFFF)
            shift -= 9

    def _entries(self, frame: int) -> tuple[int, ...]:
        table = self._tables.get(frame)
        if table is None:
            table = _TABLE.unpack(self._physical.read(PhysAddr(frame), PAGE_SIZE))
            if len(self._tables) >= 1024:
                self._tables.clear()
            self._tables[frame] = table
        return table
