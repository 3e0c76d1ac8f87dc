"""A save file opened for reading: identity, blocks and guest-physical memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from ouassister.errors import UnsupportedStateError
from ouassister.memory.physical import HOLE_STARTS, PhysicalMemory, Segment, around_hole
from ouassister.model import PhysAddr
from ouassister.state import formats
from ouassister.state.data import map_file
from ouassister.state.formats import SaveFormat, Support
from ouassister.state.qemu_stream import SaveStream
from ouassister.state.ram_blocks import base_memory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from ouassister.state.data import MappedFile
    from ouassister.state.dump import Dump
    from ouassister.state.libvirt_save import LibvirtHeader
    from ouassister.state.ram_table import RamBlock

# Above this QEMU may move memory beyond AMD's HyperTransport range to 1 TiB
# (hw/i386/pc.c, pc_memory_init, AMD_ABOVE_1TB_START, v7.2).
_MAX_RAM_BYTES: Final = 0xF0_0000_0000
_NO_HOLE_BELOW: Final = 0x8000_0000


class SaveFile:
    """An open save file.

    Args:
        source: Its index.
        format: Its format.
        libvirt: libvirt's header, where there is one.
        ram: The blocks of base memory in their order, where the caller knows them.

    Attributes:
        path: The file.
        format: Its row in `ouassister.state.formats`.
        libvirt: libvirt's header: the domain's XML and libvirt's cookie; else None.
        machine: QEMU's machine type; empty in a dump.
        uuid: The VM's UUID, 16 bytes, when the file carries it; else ``b""``.
        blocks: All RAM blocks by name.
        ram_bytes: Size of the guest's base memory.
    """

    def __init__(
        self,
        source: SaveStream | Dump,
        format: SaveFormat,
        libvirt: LibvirtHeader | None = None,
        ram: Sequence[bytes] = (),
    ) -> None:
        self._source = source
        self.path = source.path
        self.format = format
        self.libvirt = libvirt
        self.machine = source.machine
        self.uuid = source.uuid
        self.blocks: dict[bytes, RamBlock] = source.blocks
        self._base: tuple[RamBlock, ...] = ()
        self._proven: PhysicalMemory | None = None
        if isinstance(source, SaveStream):
            self._base = base_memory(source.blocks, ram)
            self.ram_bytes = sum(block.size_bytes for block in self._base)
        else:
            self.ram_bytes = source.ram_bytes()
            self._proven = _dumped(source)
        if self.ram_bytes > _MAX_RAM_BYTES:
            raise UnsupportedStateError(
                "length of base memory", 0, self.ram_bytes, "not seen so large"
            )

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
                "length of base memory",
                0,
                self.ram_bytes,
                "the start of its PCI hole is not proven",
            )
        return self.candidates()[0]

    def candidates(self) -> list[PhysicalMemory]:
        """Return memory under each possible start of the PCI hole, most likely first."""
        if not isinstance(self._source, SaveStream):
            return [self.memory]
        holes = [start for start in HOLE_STARTS if start < self.ram_bytes]
        if self.ram_bytes <= HOLE_STARTS[0]:
            holes.insert(0, self.ram_bytes)
        return [self.layout(hole) for hole in holes]

    def layout(self, hole: int) -> PhysicalMemory:
        """Return memory with its PCI hole at one address; it is the caller's to prove.

        Raises:
            UnsupportedStateError: A dump tells another address.
        """
        if not isinstance(self._source, SaveStream):
            if hole != self.memory.hole:
                raise UnsupportedStateError(
                    "memory ranges", 0, hex(self.memory.hole), f"{hole:#x} was expected"
                )
            return self.memory
        hole = min(hole, self.ram_bytes)
        return PhysicalMemory(self._source.data, around_hole(self._base, hole), hole)

    def proven(self, memory: PhysicalMemory) -> None:
        """Fix the layout of `memory`: the guest's own memory map agrees with it."""
        self._proven = memory

    def require_full(self, what: str) -> None:
        """Refuse an action that needs more than memory to look at.

        Raises:
            UnsupportedStateError: The format is supported in part only.
        """
        if self.format.support is not Support.FULL:
            raise UnsupportedStateError(
                "format", 0, self.format.name, f"no {what}: {self.format.note}"
            )

    def description(self) -> dict[str, Any]:
        """Return QEMU's description of the device state.

        Raises:
            UnsupportedStateError: A dump has none.
        """
        return self._source.description()

    def close(self) -> None:
        """Release the file; memory objects made from it must not be used afterwards."""
        self._source.close()

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


def open_save(
    path: Path,
    *,
    snapshot: str = "",
    spool: Path | None = None,
    ram: Sequence[bytes] = (),
) -> SaveFile:
    """Open and index a save file of any supported format; nothing of it is written.

    Args:
        path: The file.
        snapshot: Name or id of an internal snapshot, of a qcow2 image that has several.
        spool: Folder in which a compressed image stays expanded, to be found there again; the
            caller removes it. Without one it is expanded into a nameless file.
        ram: Names of the RAM blocks that are base memory, in the order of their NUMA nodes;
            without it they are told by their names.

    Raises:
        NotSuspendedError: There is no such file, or no such snapshot.
        TruncatedStateError: The file ends early.
        UnsupportedStateError: Something in it was never seen before.
        HostNotReadyError: The program that expands it is not installed.
        WorkDiskFullError: There is no room to expand it.
    """
    formats.detect_folder(path)
    file = map_file(path)
    try:
        source, kind, header = _open(path, file, snapshot, spool)
    except BaseException:
        file.close()
        raise
    try:
        return SaveFile(source, kind, header, ram)
    except BaseException:
        source.close()
        raise


def _open(
    path: Path, file: MappedFile, snapshot: str, spool: Path | None
) -> tuple[SaveStream | Dump, SaveFormat, LibvirtHeader | None]:
    # Each format with what it needs alone: programs, temporary files and decompression.
    kind = formats.detect(path, file[: formats.HEAD_BYTES])
    if kind is None:
        from ouassister.state.libvirt_save import read_header

        header = read_header(file, str(path))
        return _libvirt(path, file, header, spool), formats.libvirt_format(header.format), header
    if kind is formats.QCOW2_SNAPSHOT:
        from ouassister.state.qcow2_vmstate import Qcow2

        image = Qcow2(path, file)
        return SaveStream(path, image.state(image.choose(snapshot))), kind, None
    if kind is formats.ELF_DUMP:
        from ouassister.state.elf_dump import open_elf

        return open_elf(path, file), kind, None
    if kind is formats.KDUMP:
        from ouassister.state.kdump import open_kdump

        return open_kdump(path, file), kind, None
    stream = SaveStream(path, file)
    return stream, formats.QEMU_MAPPED_RAM if stream.mapped_ram else kind, None


def _libvirt(path: Path, file: MappedFile, header: LibvirtHeader, spool: Path | None) -> SaveStream:
    start = header.stream_start
    if header.format in ("raw", "sparse"):
        stream = SaveStream(path, file, start)
        if stream.mapped_ram != (header.format == "sparse"):
            stream.close()
            raise UnsupportedStateError("format", 28, header.format, "the stream says otherwise")
        return stream
    from ouassister.state.expand import expand

    expanded = expand(path, file, start, header.format, header.memory_bytes(), spool)
    file.close()
    return SaveStream(path, expanded)


def _dumped(dump: Dump) -> PhysicalMemory:
    segments = [
        Segment(PhysAddr(one.address), one.size_bytes, 0, dump.blocks[b"%#x" % one.address])
        for one in dump.ranges
    ]
    return PhysicalMemory(dump.data, segments, dump.hole())
