"""A save file opened for reading: identity, blocks and guest-physical memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from ouassister.errors import UnsupportedStateError
from ouassister.memory.physical import HOLE_STARTS, PhysicalMemory
from ouassister.state.c_qevm import MAIN_BLOCK
from ouassister.state.qemu_stream import RamBlock, SaveStream

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

# Above this QEMU may move memory beyond AMD's HyperTransport range to 1 TiB
# (hw/i386/pc.c, pc_memory_init, AMD_ABOVE_1TB_START, v7.2).
_MAX_RAM_BYTES: Final = 0xF0_0000_0000
_NO_HOLE_BELOW: Final = 0x8000_0000


class SaveFile:
    """An open save file.

    Attributes:
        path: The file.
        machine: QEMU's machine type.
        uuid: The VM's UUID, 16 bytes, when the file carries it; else ``b""``.
        blocks: All RAM blocks by name.
        ram_bytes: Size of the guest's base memory.
    """

    def __init__(self, stream: SaveStream) -> None:
        self._stream = stream
        self.path = stream.path
        self.machine = stream.machine
        self.uuid = stream.uuid
        self.blocks: dict[bytes, RamBlock] = stream.blocks
        main = stream.blocks.get(MAIN_BLOCK)
        if main is None:
            names = ", ".join(name.decode(errors="replace") for name in stream.blocks)
            raise UnsupportedStateError(
                "RAM block list", 0, names, f"there is no block {MAIN_BLOCK.decode()}"
            )
        self._main = main
        self.ram_bytes = main.size_bytes
        if self.ram_bytes > _MAX_RAM_BYTES:
            raise UnsupportedStateError("length of pc.ram", 0, self.ram_bytes, "not seen so large")
        self._proven: PhysicalMemory | None = None

    @property
    def memory(self) -> PhysicalMemory:
        """Guest-physical memory.

        Up to 2 GiB this assumes that there is no hole in it, as in every pc and q35 machine
        that was not told otherwise; `ouassister.kernel` proves or corrects it.

        Raises:
            UnsupportedStateError: The memory is larger and its hole is not proven yet.
        """
        if self._proven is not None:
            return self._proven
        if self.ram_bytes > _NO_HOLE_BELOW:
            raise UnsupportedStateError(
                "length of pc.ram", 0, self.ram_bytes, "the start of its PCI hole is not proven"
            )
        return self.candidates()[0]

    def candidates(self) -> list[PhysicalMemory]:
        """Return memory under each possible start of the PCI hole, most likely first."""
        holes = [start for start in HOLE_STARTS if start < self.ram_bytes]
        if self.ram_bytes <= HOLE_STARTS[0]:
            holes.insert(0, self.ram_bytes)
        return [self.layout(hole) for hole in holes]

    def layout(self, hole: int) -> PhysicalMemory:
        """Return memory with its PCI hole at one address; it is the caller's to prove."""
        return PhysicalMemory(self._stream, self._main, hole)

    def proven(self, memory: PhysicalMemory) -> None:
        """Fix the layout of `memory`: the guest's own memory map agrees with it."""
        self._proven = memory

    def description(self) -> dict[str, Any]:
        """Return QEMU's description of the device state."""
        return self._stream.description()

    def close(self) -> None:
        """Release the file; memory objects made from it must not be used afterwards."""
        self._stream.close()

    def __enter__(self) -> Self:
        """Return the file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def open_save(path: Path) -> SaveFile:
    """Open and index a save file; nothing of it is written.

    Raises:
        NotSuspendedError: There is no such file.
        TruncatedStateError: The file ends early.
        UnsupportedStateError: Something in it was never seen before.
    """
    stream = SaveStream(path)
    try:
        return SaveFile(stream)
    except BaseException:
        stream.close()
        raise
