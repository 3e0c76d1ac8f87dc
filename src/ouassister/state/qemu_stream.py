"""Index of a QEMU migration stream: which page of which RAM block lies where in the file.

The file is mapped, and RAM is never copied. Nothing is accepted that a sample or QEMU's source
does not prove: XBZRLE, compressed pages, shared memory left out, postcopy and live device state
are refused by name. A stream must be whole: device sections carry no lengths, so the proof is
the description that QEMU writes last, whose length must end exactly at the end of the stream.

With mapped-ram the pages lie at fixed places instead of in records, between the blocks of the
list (`c_mapped_ram`); the stream around them is the same.

Source: QEMU v7.2.0, ``migration/savevm.c`` (``qemu_loadvm_state``,
``qemu_savevm_state_complete_precopy_non_iterable``) and ``migration/ram.c``
(``ram_save_setup``, ``save_page_header``, ``ram_load_precopy``); QEMU v9.0.0
``migration/ram.c`` (``mapped_ram_setup_ramblock``, ``parse_ramblock_mapped_ram``).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from ouassister.errors import TruncatedStateError, UnsupportedStateError
from ouassister.state import c_mapped_ram
from ouassister.state import c_qevm as c
from ouassister.state.data import TRIM_BYTES, Data, Reader, map_file
from ouassister.state.ram_table import (
    MAX_BLOCK_BYTES,
    FixedPages,
    PageTable,
    RamBlock,
    RunReader,
)

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_SECTION_NAMES: Final = {
    c.SECTION_START: "QEMU_VM_SECTION_START",
    c.SECTION_PART: "QEMU_VM_SECTION_PART",
    c.SECTION_END: "QEMU_VM_SECTION_END",
    c.SECTION_FULL: "QEMU_VM_SECTION_FULL",
    c.SUBSECTION: "QEMU_VM_SUBSECTION",
    c.DESCRIPTION: "QEMU_VM_VMDESCRIPTION",
    c.CONFIGURATION: "QEMU_VM_CONFIGURATION",
    c.COMMAND: "QEMU_VM_COMMAND",
}
_MAX_BLOCKS: Final = 1024  # the samples have 7
_MAX_NAME: Final = 255
_MAX_CAPABILITIES: Final = 64


class SaveStream:
    """An open, indexed migration stream. Read-only; a context manager.

    Args:
        path: The file.
        data: Its bytes, or those of the stream in it; closed with this object.
        start: Where the stream starts in them.

    Attributes:
        path: The file.
        machine: QEMU's machine type, such as ``pc-i440fx-7.2``.
        uuid: The VM's UUID when the stream carries one, else ``b""``.
        blocks: RAM blocks by name, in the stream's order.
        mapped_ram: Whether pages lie at fixed places.
        data: The bytes.
        ram_end: Offset just behind the last RAM record.

    Raises:
        NotSuspendedError: There is no such file.
        TruncatedStateError: The file ends early; the message names the offset.
        UnsupportedStateError: Something in it was never seen before.
    """

    def __init__(self, path: Path, data: Data | None = None, start: int = 0) -> None:
        self.path = path
        self.machine = ""
        self.uuid = b""
        self.mapped_ram = False
        self.blocks: dict[bytes, RamBlock] = {}
        self._tables: dict[bytes, PageTable] = {}  # of the blocks whose pages are records
        self.ram_end = 0
        self._description = (0, 0)
        self.data = map_file(path) if data is None else data
        self._read = Reader(self.data, str(path))
        try:
            self._parse(start)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the mapping and the tables."""
        for block in self.blocks.values():
            block.pages.close()
        self.data.close()

    def __enter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def description(self) -> dict[str, Any]:
        """Return QEMU's description of the device state (``devices``, ``page_size``...)."""
        start, end = self._description
        return _json_object(bytes(self.data[start:end]), start)

    # --- the stream ------------------------------------------------------------------------

    def _parse(self, start: int) -> None:
        self._header(start)
        position = self._configuration(start + 8)
        position, section = self._ram_start(position)
        position = self._records(position, section)
        while self._read.u8(position, "section type") == c.SECTION_PART:
            position = self._records(self._same_section(position, section), section)
        position = self._switchover(position)
        kind = self._read.u8(position, "section type")
        if kind != c.SECTION_END:
            self._refuse_section(position, kind, "an END of the ram section belongs here")
        self.ram_end = self._records(self._same_section(position, section), section)
        kind = self._read.u8(self.ram_end, "section type")
        if kind not in (c.SECTION_FULL, c.EOF):
            self._refuse_section(self.ram_end, kind, "only device state is known behind ram")
        self._description = self._find_description()
        self.data.trim()

    def _switchover(self, position: int) -> int:
        """Pass the mark that the VM is stopped from here on, where there is one."""
        if self._read.u8(position, "section type") != c.COMMAND:
            return position
        number, length = (self._read.be16(position + at, "command") for at in (1, 3))
        if (number, length) != (c.SWITCHOVER_START, 0):
            raise UnsupportedStateError(
                "command", position + 1, number, f"only {c.SWITCHOVER_START} without data is known"
            )
        return position + 5

    def _header(self, start: int) -> None:
        head = self.data[start : start + 8]
        want = c.MAGIC + c.BE32.pack(c.VERSION)
        if head[:4] != c.MAGIC[: len(head)]:
            raise UnsupportedStateError("magic", start, head, "not a QEMU migration stream")
        if head != want[: len(head)]:
            version = int.from_bytes(head[4:8], "big")
            raise UnsupportedStateError(
                "stream version", start + 4, version, f"only {c.VERSION} is known"
            )
        self._read.need(start, 8, "stream header")

    def _configuration(self, position: int) -> int:
        kind = self._read.u8(position, "section type")
        if kind != c.CONFIGURATION:
            self._refuse_section(position, kind, "the configuration belongs here")
        length = self._read.be32(position + 1, "configuration.len")
        if not 0 < length <= _MAX_NAME:
            raise UnsupportedStateError("configuration.len", position + 1, length)
        name = self._read.bytes(position + 5, length, "configuration.name")
        if not (name.isascii() and name.decode("ascii").isprintable()):
            raise UnsupportedStateError("configuration.name", position + 5, name)
        self.machine = name.decode("ascii")
        position += 5 + length
        while self._read.u8(position, "section type") == c.SUBSECTION:
            name, position = self._name(position + 1, "subsection name")
            version = self._read.be32(position, "subsection version")
            if version != 1:
                raise UnsupportedStateError(f"version of {name.decode(errors='replace')}",
                                            position, version)  # fmt: skip
            position = self._configuration_field(name, position + 4)
        return position

    def _configuration_field(self, name: bytes, position: int) -> int:
        if name == c.TARGET_PAGE_BITS:
            bits = self._read.be32(position, "target-page-bits")
            if bits != c.PAGE_BITS:
                raise UnsupportedStateError("target-page-bits", position, bits)
            return position + 4
        if name == c.UUID:
            self.uuid = self._read.bytes(position, 16, "uuid")
            return position + 16
        if name == c.CAPABILITIES:
            # Only capabilities that change the layout are listed: x-ignore-shared, mapped-ram...
            # (QEMU savevm.c, should_validate_capability)
            start = position
            count = self._read.be32(position, "capabilities.count")
            position += 4
            names = []
            for _ in range(min(count, _MAX_CAPABILITIES)):
                capability, position = self._name(position, "capability")
                names.append(capability)
            if names != [c_mapped_ram.CAPABILITY]:
                raise UnsupportedStateError(
                    "capabilities",
                    start,
                    ", ".join(name.decode(errors="replace") for name in names),
                    "only mapped-ram is known to change where RAM lies",
                )
            self.mapped_ram = True
            return position
        raise UnsupportedStateError("subsection", position, name.decode(errors="replace"))

    def _ram_start(self, position: int) -> tuple[int, int]:
        kind = self._read.u8(position, "section type")
        if kind != c.SECTION_START:
            self._refuse_section(position, kind, "the START of the ram section belongs here")
        section = self._read.be32(position + 1, "section id")
        name, after = self._name(position + 5, "section name")
        if name != c.RAM_SECTION:
            raise UnsupportedStateError(
                "live section", position, name.decode(errors="replace"), "only ram is known"
            )
        instance = self._read.be32(after, "instance id")
        version = self._read.be32(after + 4, "section version")
        if (instance, version) != (0, c.RAM_VERSION):
            raise UnsupportedStateError("instance and version of ram", after, (instance, version))
        word = self._read.be64(after + 8, "ram record")
        if word & c.FLAG_MASK != c.FLAG_MEM_SIZE:
            self._refuse_flags(after + 8, word, "the list of blocks belongs here")
        return self._block_list(after + 16, word & ~c.FLAG_MASK), section

    def _block_list(self, position: int, total: int) -> int:
        start = position
        left = total
        while left:
            name, position = self._name(position, "RAM block name")
            size = self._read.be64(position, "RAM block length")
            if size == 0 or size % c.PAGE_SIZE or size > min(left, MAX_BLOCK_BYTES):
                raise UnsupportedStateError(f"length of {name!r}", position, size)
            if name in self.blocks or len(self.blocks) >= _MAX_BLOCKS:
                raise UnsupportedStateError("RAM block list", start, name, "twice, or too many")
            left -= size
            position += 8
            if self.mapped_ram:
                self.blocks[name], position = self._mapped_block(name, size, position)
            else:
                self.blocks[name] = self._block_of_records(name, size, position)
        if not self.blocks:
            raise UnsupportedStateError("RAM block list", start, 0, "no memory at all")
        return position

    def _block_of_records(self, name: bytes, size: int, position: int) -> RamBlock:
        try:
            table = self._tables[name] = PageTable(size >> c.PAGE_BITS)
        except OSError as error:
            raise UnsupportedStateError(
                f"length of {name!r}", position - 8, size, f"no memory for its index ({error})"
            ) from error
        return RamBlock(name, size, table)

    def _mapped_block(self, name: bytes, size: int, position: int) -> tuple[RamBlock, int]:
        """Read a block's mapped-ram header; the stream goes on behind its pages."""
        header = self._read.bytes(position, c_mapped_ram.HEADER.size, "mapped-ram header")
        version, page_size, bitmap, first = c_mapped_ram.HEADER.unpack(header)
        if (version, page_size) != (c_mapped_ram.VERSION, c.PAGE_SIZE):
            raise UnsupportedStateError(
                "version and page size of the mapped-ram header", position, (version, page_size)
            )
        pages = size >> c.PAGE_BITS
        length = c_mapped_ram.bitmap_bytes(pages)
        if bitmap != position + len(header):
            raise UnsupportedStateError("bitmap_offset", position + 12, bitmap)
        if first < bitmap + length or first % c.PAGE_SIZE or first > self._read.size:
            raise UnsupportedStateError("pages_offset", position + 20, first)
        bits = self._read.bytes(bitmap, length, "mapped-ram bitmap")
        if int.from_bytes(bits[pages >> 3 :], "little") >> (pages & 7):
            raise UnsupportedStateError("mapped-ram bitmap", bitmap, name, "beyond the block's end")
        self._read.need(first, size, f"pages of {name!r}")
        return RamBlock(name, size, FixedPages(bits, pages, first)), first + size

    def _same_section(self, position: int, section: int) -> int:
        found = self._read.be32(position + 1, "section id")
        if found != section:
            raise UnsupportedStateError(
                "section id", position + 1, found, "a second live section; only ram is known"
            )
        return position + 5

    # --- records ---------------------------------------------------------------------------

    def _records(self, position: int, section: int) -> int:
        """Index one section's records and return the offset behind its footer."""
        runs = RunReader(self.data)
        block = self._block
        while True:
            word = self._read.be64(position, "ram record")
            flags = word & c.FLAG_MASK
            if flags == c.FLAG_EOS:
                self._block = block
                return self._footer(position + 8, section)
            if flags == c.FLAG_MULTIFD_FLUSH and self.mapped_ram:
                position += 8  # other channels wrote pages, each to its fixed place
                continue
            kind = flags & ~c.FLAG_CONTINUE
            if self.mapped_ram or kind not in (c.FLAG_PAGE, c.FLAG_ZERO):
                self._refuse_flags(position, word, "not seen before")
            start = position
            page = word >> c.PAGE_BITS
            if flags & c.FLAG_CONTINUE:
                if block is None:
                    self._refuse_flags(position, word, "continues a block, but none was named")
                position += 8
            else:
                name, position = self._name(position + 8, "RAM block name")
                block = self.blocks.get(name)
                if block is None:
                    raise UnsupportedStateError(
                        "RAM block name", start, name.decode(errors="replace"), "not in the list"
                    )
            if kind == c.FLAG_PAGE:
                self._read.need(position, c.PAGE_SIZE, "page")
                if position - self._trimmed > TRIM_BYTES:
                    self.data.trim()  # reading headers maps every page
                    self._trimmed = position
                count = runs.pages(position + c.PAGE_SIZE, word | c.FLAG_CONTINUE)
                self._check_pages(block, page, count + 1, start)
                self._tables[block.name].set_stored(page, count + 1, position)
                position += c.PAGE_SIZE + count * c.PAGE_STRIDE
            else:
                fill = self._read.u8(position, "fill byte")
                count = runs.fills(position + 1, word | c.FLAG_CONTINUE, fill)
                self._check_pages(block, page, count + 1, start)
                self._tables[block.name].set_filled(page, count + 1, fill)
                position += 1 + count * c.ZERO_STRIDE

    _trimmed = 0
    _block: RamBlock | None = None  # the block of the last record; it outlives a section

    @staticmethod
    def _check_pages(block: RamBlock, page: int, count: int, position: int) -> None:
        if page + count > block.size_bytes >> c.PAGE_BITS:
            raise UnsupportedStateError(
                "page address", position, page << c.PAGE_BITS,
                f"beyond block {block.name.decode(errors='replace')}",
            )  # fmt: skip

    def _footer(self, position: int, section: int) -> int:
        mark = self._read.u8(position, "section footer")
        if mark != c.SECTION_FOOTER:
            raise UnsupportedStateError("section footer", position, mark)
        found = self._read.be32(position + 1, "section footer")
        if found != section:
            raise UnsupportedStateError("id in the section footer", position + 1, found)
        return position + 5

    def _find_description(self) -> tuple[int, int]:
        mark = bytes((c.EOF, c.DESCRIPTION))
        position = self._read.size
        for _ in range(1024):  # the pair also occurs by chance, but JSON has no NUL in it
            position = self.data.last(mark, self.ram_end, position)
            if position < 0 or self._read.size - position > 1 << 28:
                break
            start = position + 6
            if (
                start < self._read.size
                and start + self._read.be32(position + 2, "") == self._read.size
            ):
                _json_object(bytes(self.data[start : self._read.size]), start)
                return start, self._read.size
        raise TruncatedStateError(
            f"{self.path} ends at offset {self._read.size:#x} within its device state: "
            "the description that ends a whole stream is missing"
        )

    # --- fields ----------------------------------------------------------------------------

    def _name(self, position: int, what: str) -> tuple[bytes, int]:
        length = self._read.u8(position, what)
        if length == 0:
            raise UnsupportedStateError(what, position, "", "empty")
        return self._read.bytes(position + 1, length, what), position + 1 + length

    @staticmethod
    def _refuse_section(position: int, kind: int, reason: str) -> NoReturn:
        raise UnsupportedStateError(
            "section type", position, _SECTION_NAMES.get(kind, kind), reason
        )

    @staticmethod
    def _refuse_flags(position: int, word: int, reason: str) -> NoReturn:
        flags = word & c.FLAG_MASK
        names = [name for bit, name in c.FLAG_NAMES.items() if flags & bit]
        raise UnsupportedStateError("ram record flags", position, flags,
                                    " | ".join(names) or reason)  # fmt: skip


def _json_object(text: bytes, position: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnsupportedStateError("description", position, text[:40], "not JSON") from error
    if not isinstance(value, dict) or value.get("page_size") != c.PAGE_SIZE:
        raise UnsupportedStateError("description", position, text[:40], "no page_size 4096 in it")
    return value
