"""Memory of a process, page by page: what is here, and where the rest is.

Source: Intel SDM volume 3A, section 4.5; Linux v6.1 ``arch/x86/include/asm/pgtable_types.h``
(``_PAGE_PROTNONE``), ``arch/x86/include/asm/pgtable-invert.h`` (frames of such pages are inverted),
``arch/x86/include/asm/pgtable_64.h`` (swap entries), ``include/linux/swap.h`` (``MAX_SWAPFILES``).
"""

from __future__ import annotations

import struct
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from ouassister.errors import PageAbsentError, UnsupportedGuestError
from ouassister.kernel.fields import Fields
from ouassister.kernel.program import guest_reads
from ouassister.model import PhysAddr, VirtAddr

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ouassister.guest_model import Vma
    from ouassister.kernel.program import Kernel

PAGE_SIZE: Final = 4096
_PRESENT, _LARGE, _PROTNONE = 1, 0x80, 0x100
_FRAME: Final = 0x000F_FFFF_FFFF_F000
_TABLE: Final = struct.Struct("<512Q")
_SWAP_TYPE_SHIFT: Final = 59
_MAX_SWAPFILES: Final = 23  # of 32; the kernel keeps the others for what is no swap
_MAX_STRINGS_BYTES: Final = 1 << 20


class PageState(StrEnum):
    """Where a page of a process is."""

    PRESENT = "present"
    SWAPPED = "swapped out"
    ABSENT = "absent from the save"
    FILE = "not read from its file"
    UNTOUCHED = "never touched"  # anonymous: the process would read zeros
    MOVING = "being moved, or poisoned"
    UNMAPPED = "not mapped"


class NotHereError(LookupError):
    """A page of a process is not in memory.

    Attributes:
        address: The first such byte.
        state: Where the page is.
    """

    def __init__(self, address: int, state: PageState) -> None:
        super().__init__(f"the page at {address:#x} is {state}")
        self.address = address
        self.state = state


class ProcessMemory:
    """The memory of one process.

    Args:
        kernel: The kernel.
        mm: ``struct mm_struct *``.
        vmas: Its mappings, by address.
    """

    def __init__(self, kernel: Kernel, mm: int, vmas: Sequence[Vma]) -> None:
        self._kernel = kernel
        self._vmas = vmas
        with guest_reads("reading the page tables of a process"):
            fields = Fields(kernel, "struct mm_struct", "pgd", "arg_start", "arg_end",
                            "env_start", "env_end")  # fmt: skip
            pgd, *self._marks = fields.read(mm)
            self._root = kernel.virtual.translate(pgd)
        self._tables: dict[int, tuple[int, ...]] = {}

    def state(self, address: int) -> PageState:
        """Tell where the page at an address is."""
        found = self._find(address)
        return found if isinstance(found, PageState) else PageState.PRESENT

    def read(self, address: VirtAddr, size: int) -> bytes:
        """Read memory of the process.

        Args:
            address: First byte to read.
            size: Number of bytes.

        Returns:
            Exactly ``size`` bytes.

        Raises:
            NotHereError: Some page is not in memory; its state tells where it is.
        """
        parts = []
        while size > 0:
            found = self._find(address)
            if isinstance(found, PageState):
                raise NotHereError(address, found)
            count = min(size, PAGE_SIZE - address % PAGE_SIZE)
            parts.append(found[address % PAGE_SIZE :][:count])
            address = VirtAddr(address + count)
            size -= count
        return b"".join(parts)

    def arguments(self) -> tuple[bytes, ...]:
        """Return the command line, as it was given to execve(2)."""
        return self._strings(self._marks[0], self._marks[1])

    def environment(self) -> tuple[bytes, ...]:
        """Return the environment, as it was given to execve(2)."""
        return self._strings(self._marks[2], self._marks[3])

    def _strings(self, start: int, end: int) -> tuple[bytes, ...]:
        if not start < end:
            return ()
        if end - start > _MAX_STRINGS_BYTES:
            raise UnsupportedGuestError(f"a process was started with {end - start} bytes")
        return tuple(self.read(VirtAddr(start), end - start).removesuffix(b"\0").split(b"\0"))

    def _find(self, address: int) -> bytes | PageState:
        try:
            entry, shift = self._entry(address)
            if not entry:
                return self._nothing(address)
            if not entry & (_PRESENT | _PROTNONE):
                swapped = entry >> _SWAP_TYPE_SHIFT < _MAX_SWAPFILES
                return PageState.SWAPPED if swapped else PageState.MOVING
            if not entry & _PRESENT:
                entry ^= _FRAME
            inside = (1 << shift) - 1
            frame = (entry & _FRAME & ~inside) | (address & inside & ~(PAGE_SIZE - 1))
            return self._kernel.memory.read(PhysAddr(frame), PAGE_SIZE)
        except PageAbsentError:
            return PageState.ABSENT

    def _entry(self, address: int) -> tuple[int, int]:
        """Return the last entry of the walk, and the size of what it maps as a shift."""
        if not 0 <= address < 1 << (11 + 9 * self._kernel.levels):
            return 0, 12
        frame = self._root & _FRAME
        shift = 12 + 9 * (self._kernel.levels - 1)
        while True:
            table = self._tables.get(frame)
            if table is None:
                table = _TABLE.unpack(self._kernel.memory.read(PhysAddr(frame), PAGE_SIZE))
                self._tables[frame] = table
            entry = table[(address >> shift) & 0x1FF]
            if shift == 12 or not entry & _PRESENT or (entry & _LARGE and shift <= 30):
                return entry, shift
            frame = entry & _FRAME
            shift -= 9

    def _nothing(self, address: int) -> PageState:
        for vma in self._vmas:
            if vma.start <= address < vma.end:
                backed = vma.inode and not vma.path.startswith(b"/dev/zero")
                return PageState.FILE if backed else PageState.UNTOUCHED
        return PageState.UNMAPPED
