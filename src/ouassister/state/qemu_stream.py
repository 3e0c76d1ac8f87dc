"""Index of a QEMU migration stream: which page of which RAM block lies where in the file.

The file is mapped, and RAM is never copied. Nothing is accepted that a sample or QEMU's source
does not prove: XBZRLE, compressed pages, multifd, mapped-ram, shared memory left out, postcopy
and live device state are refused by name. A stream must be whole: device sections carry no
lengths, so the proof is the description that QEMU writes last, whose length must end exactly
at the end of the file.

Source: QEMU v7.2.0, ``migration/savevm.c`` (``qemu_loadvm_state``,
``qemu_savevm_state_complete_precopy_non_iterable``) and ``migration/ram.c``
(``ram_save_setup``, ``save_page_header``, ``ram_load_precopy``).
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from ouassister.errors import NotSuspendedError, TruncatedStateError, UnsupportedStateError
from ouassister.state import c_qevm as c
from ouassister.state.ram_table import MAX_BLOCK_BYTES, PageTable, RunReader

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
TRIM_BYTES: Final = 64 << 20  # of the file that stay mapped at most while it is scanned


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One RAM block of the stream; ``pages`` maps its page numbers to file offsets."""

    name: bytes
    size_bytes: int
    pages: PageTable = field(compare=False, repr=False)


class SaveStream:
    """An open, indexed migration stream. Read-only; a context manager.

    Attributes:
        path: The file.
        machine: QEMU's machine type, such as ``pc-i440fx-7.2``.
        uuid: The VM's UUID when the stream carries one, else ``b""``.
        blocks: RAM blocks by name, in the stream's order.
        data: The mapped file.
        ram_end: Offset just behind the last RAM record.

    Raises:
        NotSuspendedError: There is no such file.
        TruncatedStateError: The file ends early; the message names the offset.
        UnsupportedStateError: Something in it was never seen before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machine = ""
        self.uuid = b""
        self.blocks: dict[bytes, RamBlock] = {}
        self.ram_end = 0
        self._description = (0, 0)
        self.data = _map(path)
        self._size = len(self.data)
        try:
            self._parse()
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

    def _parse(self) -> None:
        self._header()
        position = self._configuration(8)
        position, section = self._ram_start(position)
        position = self._records(position, section)
        while self._u8(position, "section type") == c.SECTION_PART:
            position = self._records(self._same_section(position, section), section)
        kind = self._u8(position, "section type")
        if kind != c.SECTION_END:
            self._refuse_section(position, kind, "an END of the ram section belongs here")
        self.ram_end = self._records(self._same_section(position, section), section)
        kind = self._u8(self.ram_end, "section type")
        if kind not in (c.SECTION_FULL, c.EOF):
            self._refuse_section(self.ram_end, kind, "only device state is known behind ram")
        self._description = self._find_description()
        self.data.madvise(mmap.MADV_DONTNEED)

    def _header(self) -> None:
        head = bytes(self.data[:16])
        if head in c.LIBVIRT_MAGICS:
            raise UnsupportedStateError(
                "magic", 0, head.decode(), "libvirt's save format is not read yet"
            )
        want = c.MAGIC + c.BE32.pack(c.VERSION)
        if head[:4] != c.MAGIC[: len(head)]:
            raise UnsupportedStateError("magic", 0, head[:8], "not a QEMU migration stream")
        if head[:8] != want[: len(head)]:
            version = int.from_bytes(head[4:8], "big")
            raise UnsupportedStateError("stream version", 4, version, f"only {c.VERSION} is known")
        self._need(0, 8, "stream header")

    def _configuration(self, position: int) -> int:
        kind = self._u8(position, "section type")
        if kind != c.CONFIGURATION:
            self._refuse_section(position, kind, "the configuration belongs here")
        length = self._be32(position + 1, "configuration.len")
        if not 0 < length <= _MAX_NAME:
            raise UnsupportedStateError("configuration.len", position + 1, length)
        name = self._bytes(position + 5, length, "configuration.name")
        if not (name.isascii() and name.decode("ascii").isprintable()):
            raise UnsupportedStateError("configuration.name", position + 5, name)
        self.machine = name.decode("ascii")
        position += 5 + length
        while self._u8(position, "section type") == c.SUBSECTION:
            name, position = self._name(position + 1, "subsection name")
            version = self._be32(position, "subsection version")
            if version != 1:
                raise UnsupportedStateError(f"version of {name.decode(errors='replace')}",
                                            position, version)  # fmt: skip
            position = self._configuration_field(name, position + 4)
        return position

    def _configuration_field(self, name: bytes, position: int) -> int:
        if name == c.TARGET_PAGE_BITS:
            bits = self._be32(position, "target-page-bits")
            if bits != c.PAGE_BITS:
                raise UnsupportedStateError("target-page-bits", position, bits)
            return position + 4
        if name == c.UUID:
            self.uuid = self._bytes(position, 16, "uuid")
            return position + 16
        if name == c.CAPABILITIES:
            # Only capabilities that change the layout are listed: x-ignore-shared, mapped-ram...
            # (QEMU savevm.c, should_validate_capability)
            names = []
            start = position
            count = self._be32(position, "capabilities.count")
            position += 4
            for _ in range(min(count, 64)):
                capability, position = self._name(position, "capability")
                names.append(capability.decode(errors="replace"))
            raise UnsupportedStateError(
                "capabilities", start, ", ".join(names), "this layout of RAM is not read yet"
            )
        raise UnsupportedStateError("subsection", position, name.decode(errors="replace"))

    def _ram_start(self, position: int) -> tuple[int, int]:
        kind = self._u8(position, "section type")
        if kind != c.SECTION_START:
            self._refuse_section(position, kind, "the START of the ram section belongs here")
        section = self._be32(position + 1, "section id")
        name, after = self._name(position + 5, "section name")
        if name != c.RAM_SECTION:
            raise UnsupportedStateError(
                "live section", position, name.decode(errors="replace"), "only ram is known"
            )
        instance = self._be32(after, "instance id")
        version = self._be32(after + 4, "section version")
        if (instance, version) != (0, c.RAM_VERSION):
            raise UnsupportedStateError("instance and version of ram", after, (instance, version))
        word = self._be64(after + 8, "ram record")
        if word & c.FLAG_MASK != c.FLAG_MEM_SIZE:
            self._refuse_flags(after + 8, word, "the list of blocks belongs here")
        return self._block_list(after + 16, word & ~c.FLAG_MASK), section

    def _block_list(self, position: int, total: int) -> int:
        start = position
        left = total
        while left:
            name, position = self._name(position, "RAM block name")
            size = self._be64(position, "RAM block length")
            if size == 0 or size % c.PAGE_SIZE or size > min(left, MAX_BLOCK_BYTES):
                raise UnsupportedStateError(f"length of {name!r}", position, size)
            if name in self.blocks or len(self.blocks) >= _MAX_BLOCKS:
                raise UnsupportedStateError("RAM block list", start, name, "twice, or too many")
            self.blocks[name] = RamBlock(name, size, PageTable(size >> c.PAGE_BITS))
            left -= size
            position += 8
        if not self.blocks:
            raise UnsupportedStateError("RAM block list", start, 0, "no memory at all")
        return position

    def _same_section(self, position: int, section: int) -> int:
        found = self._be32(position + 1, "section id")
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
        trimmed = position
        while True:
            word = self._be64(position, "ram record")
            flags = word & c.FLAG_MASK
            if flags == c.FLAG_EOS:
                self._block = block
                return self._footer(position + 8, section)
            kind = flags & ~c.FLAG_CONTINUE
            if kind not in (c.FLAG_PAGE, c.FLAG_ZERO):
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
                self._need(position, c.PAGE_SIZE, "page")
                if position - trimmed > TRIM_BYTES:
                    self.data.madvise(mmap.MADV_DONTNEED)  # reading headers maps every page
                    trimmed = position
                count = runs.pages(position + c.PAGE_SIZE, word | c.FLAG_CONTINUE)
                self._check_pages(block, page, count + 1, start)
                block.pages.set_stored(page, count + 1, position)
                position += c.PAGE_SIZE + count * c.PAGE_STRIDE
            else:
                fill = self._u8(position, "fill byte")
                count = runs.fills(position + 1, word | c.FLAG_CONTINUE, fill)
                self._check_pages(block, page, count + 1, start)
                block.pages.set_filled(page, count + 1, fill)
                position += 1 + count * c.ZERO_STRIDE

    _block: RamBlock | None = None  # the block of the last record; it outlives a section

    @staticmethod
    def _check_pages(block: RamBlock, page: int, count: int, position: int) -> None:
        if page + count > block.size_bytes >> c.PAGE_BITS:
            raise UnsupportedStateError(
                "page address", position, page << c.PAGE_BITS,
                f"beyond block {block.name.decode(errors='replace')}",
            )  # fmt: skip

    def _footer(self, position: int, section: int) -> int:
        mark = self._u8(position, "section footer")
        if mark != c.SECTION_FOOTER:
            raise UnsupportedStateError("section footer", position, mark)
        found = self._be32(position + 1, "section footer")
        if found != section:
            raise UnsupportedStateError("id in the section footer", position + 1, found)
        return position + 5

    def _find_description(self) -> tuple[int, int]:
        mark = bytes((c.EOF, c.DESCRIPTION))
        position = self._size
        for _ in range(1024):  # the pair also occurs by chance, but JSON has no NUL in it
            position = self.data.rfind(mark, self.ram_end, position)
            if position < 0 or self._size - position > 1 << 28:
                break
            start = position + 6
            if start < self._size and start + self._be32(position + 2, "") == self._size:
                _json_object(bytes(self.data[start : self._size]), start)
                return start, self._size
        raise TruncatedStateError(
            f"{self.path} ends at offset {self._size:#x} within its device state: "
            "the description that ends a whole stream is missing"
        )

    # --- fields ----------------------------------------------------------------------------

    def _need(self, position: int, size: int, what: str) -> None:
        if position + size > self._size:
            raise TruncatedStateError(
                f"{self.path} ends at offset {self._size:#x}, within the {what} "
                f"at offset {position:#x}"
            )

    def _bytes(self, position: int, size: int, what: str) -> bytes:
        self._need(position, size, what)
        return bytes(self.data[position : position + size])

    def _name(self, position: int, what: str) -> tuple[bytes, int]:
        length = self._u8(position, what)
        if length == 0:
            raise UnsupportedStateError(what, position, "", "empty")
        return self._bytes(position + 1, length, what), position + 1 + length

    def _u8(self, position: int, what: str) -> int:
        self._need(position, 1, what)
        return self.data[position]

    def _be32(self, position: int, what: str) -> int:
        self._need(position, 4, what)
        value: int = c.BE32.unpack_from(self.data, position)[0]
        return value

    def _be64(self, position: int, what: str) -> int:
        self._need(position, 8, what)
        value: int = c.BE64.unpack_from(self.data, position)[0]
        return value

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


def _map(path: Path) -> mmap.mmap:
    try:
        # O_NONBLOCK: the open of a FIFO must not wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotSuspendedError(f"there is no save file {path}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedStateError("save file", 0, str(path), "not a regular file")
        if status.st_size == 0:
            raise TruncatedStateError(f"{path} is empty: it ends at offset 0x0")
        return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)


def _json_object(text: bytes, position: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnsupportedStateError("description", position, text[:40], "not JSON") from error
    if not isinstance(value, dict) or value.get("page_size") != c.PAGE_SIZE:
        raise UnsupportedStateError("description", position, text[:40], "no page_size 4096 in it")
    return value
