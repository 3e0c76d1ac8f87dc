"""The stream index, on streams written here record by record."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import NotSuspendedError, TruncatedStateError, UnsupportedStateError
from ouassister.memory import open_save
from ouassister.model import PhysAddr
from ouassister.state.qemu_stream import SaveStream

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
ZERO, MEM_SIZE, STORED, EOS, CONTINUE = 2, 4, 8, 16, 32
HEADER = b"QEVM" + struct.pack(">I", 3)
MACHINE = b"pc-i440fx-7.2"
CONFIGURATION = b"\x07" + struct.pack(">I", len(MACHINE)) + MACHINE
RAM_START = b"\x01" + struct.pack(">IB3sII", 2, 3, b"ram", 0, 4)
FOOTER = b"\x7e" + struct.pack(">I", 2)
END_OF_RECORDS = struct.pack(">Q", EOS) + FOOTER
PART = b"\x02" + struct.pack(">I", 2)
END = b"\x03" + struct.pack(">I", 2)
DEVICE = b"\x04" + struct.pack(">IB5sII", 0, 5, b"timer", 0, 2) + bytes(24)
DEVICE += b"\x7e" + struct.pack(">I", 0)
JSON = json.dumps({"page_size": PAGE, "devices": [{"name": "timer"}]}).encode()
TAIL = DEVICE + b"\0\x06" + struct.pack(">I", len(JSON)) + JSON


def blocks(*sizes: tuple[bytes, int]) -> bytes:
    total = sum(size for _, size in sizes)
    return struct.pack(">Q", total | MEM_SIZE) + b"".join(
        struct.pack(">B", len(name)) + name + struct.pack(">Q", size) for name, size in sizes
    )


def record(page: int, flags: int, name: bytes = b"", data: bytes = b"") -> bytes:
    head = struct.pack(">Q", page * PAGE | flags)
    if not flags & CONTINUE:
        head += struct.pack(">B", len(name)) + name
    return head + data


def content(page: int) -> bytes:
    return struct.pack("<Q", page) * (PAGE // 8)


def stored(first: int, count: int) -> bytes:
    return b"".join(
        record(page, STORED | CONTINUE, data=content(page)) for page in range(first, first + count)
    )


def zeros(first: int, count: int, fill: int = 0) -> bytes:
    return b"".join(
        record(page, ZERO | CONTINUE, data=bytes((fill,))) for page in range(first, first + count)
    )


SETUP = RAM_START + blocks((b"pc.ram", 64 * PAGE), (b"pc.bios", PAGE)) + END_OF_RECORDS
FIRST = record(0, STORED, b"pc.ram", content(0))
RECORDS = FIRST + stored(1, 9) + zeros(10, 30) + zeros(40, 2, 0xAA) + stored(42, 1)
WHOLE = (
    HEADER
    + CONFIGURATION
    + SETUP
    + PART
    + RECORDS
    + END_OF_RECORDS
    + END
    + stored(43, 20)  # goes on in the block of the section before
    + record(0, ZERO, b"pc.bios", b"\0")
    + END_OF_RECORDS
    + TAIL
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(stream: bytes) -> Path:
        path = tmp_path / "save.img"
        path.write_bytes(stream)
        return path

    return write


def with_records(records: bytes) -> bytes:
    return HEADER + CONFIGURATION + SETUP + PART + records + END_OF_RECORDS + END


def test_stream_whole_reads_every_page(write: Callable[[bytes], Path]) -> None:
    with open_save(write(WHOLE)) as save:
        assert save.machine == "pc-i440fx-7.2"
        assert save.ram_bytes == 64 * PAGE
        assert list(save.blocks) == [b"pc.ram", b"pc.bios"]
        assert save.description()["devices"] == [{"name": "timer"}]
        memory = save.memory
        for page in (*range(10), *range(42, 63)):
            assert memory.read(PhysAddr(page * PAGE), PAGE) == content(page)
        assert memory.read(PhysAddr(10 * PAGE), 30 * PAGE) == bytes(30 * PAGE)
        assert memory.read(PhysAddr(40 * PAGE), 2 * PAGE) == b"\xaa" * (2 * PAGE)


def test_stream_page_sent_twice_keeps_last(write: Callable[[bytes], Path]) -> None:
    again = record(3, STORED | CONTINUE, data=b"new!" * 1024)
    with open_save(write(with_records(RECORDS + again) + END_OF_RECORDS + TAIL)) as save:
        assert save.memory.read(PhysAddr(3 * PAGE), 8) == b"new!new!"
        assert save.memory.read(PhysAddr(4 * PAGE), PAGE) == content(4)
        assert list(save.memory.find(content(3)[:64])) == []


@pytest.mark.parametrize("section", [END, PART])
def test_stream_tells_where_the_vm_stopped(write: Callable[[bytes], Path], section: bytes) -> None:
    """QEMU 10.0 puts a command between the last PART and the END, and nowhere else."""
    stream = WHOLE.replace(section, b"\x08\0\x0b\0\0" + section)
    if section is END:
        with open_save(write(stream)) as save:
            assert save.memory.read(PhysAddr(62 * PAGE), PAGE) == content(62)
    else:
        with pytest.raises(UnsupportedStateError, match="an END of the ram section"):
            SaveStream(write(stream))


@pytest.mark.parametrize("command", [b"\0\x03\0\0", b"\0\x0b\0\1x", b"\x0b\0\0\0"])
def test_stream_with_another_command_is_refused(
    write: Callable[[bytes], Path], command: bytes
) -> None:
    with pytest.raises(UnsupportedStateError, match="command at offset"):
        SaveStream(write(WHOLE.replace(END, b"\x08" + command + END)))


def test_stream_whose_index_has_no_room_is_refused(write: Callable[[bytes], Path]) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * PAGE + (1 << 30), before[1]))
    try:
        with pytest.raises(UnsupportedStateError, match="no memory for its index"):
            SaveStream(write(HEADER + CONFIGURATION + RAM_START + blocks((b"pc.ram", 1 << 44))))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_stream_uuid_and_page_bits_are_read(write: Callable[[bytes], Path]) -> None:
    bits, uuid = b"configuration/target-page-bits", b"configuration/uuid"
    subsections = b"".join(
        b"\x05" + struct.pack(">B", len(name)) + name + struct.pack(">I", 1) + value
        for name, value in ((bits, struct.pack(">I", 12)), (uuid, bytes(range(16))))
    )
    with SaveStream(write(WHOLE.replace(CONFIGURATION, CONFIGURATION + subsections))) as stream:
        assert stream.uuid == bytes(range(16))


def test_stream_cut_in_its_head_is_truncated(write: Callable[[bytes], Path]) -> None:
    for size in range(1, len(HEADER + CONFIGURATION + SETUP + PART) + 40):
        with pytest.raises(TruncatedStateError, match=f"offset {size:#x}"):
            SaveStream(write(WHOLE[:size]))


def test_stream_cut_anywhere_is_truncated(write: Callable[[bytes], Path]) -> None:
    edges = {len(WHOLE) - 1, len(WHOLE) - len(JSON), len(WHOLE) - len(TAIL)}
    position = 0
    for part in (PART, FIRST, stored(1, 9), zeros(10, 30), END_OF_RECORDS, END, TAIL):
        position = WHOLE.index(part, position)
        edges |= {position, position + 1, position + len(part) - 1}
    for size in sorted(edges | set(range(200, len(WHOLE), 1111))):
        with pytest.raises(TruncatedStateError, match=f"offset {size:#x}"):
            SaveStream(write(WHOLE[:size]))


def test_stream_empty_is_truncated(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(TruncatedStateError, match="offset 0x0"):
        SaveStream(write(b""))


def test_stream_longer_than_its_description_is_truncated(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(TruncatedStateError, match="description"):
        SaveStream(write(WHOLE + b"\n"))


def test_stream_missing_is_not_suspended(tmp_path: Path) -> None:
    with pytest.raises(NotSuspendedError, match=r"no save file .*nothing"):
        SaveStream(tmp_path / "nothing")


def test_stream_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnsupportedStateError, match="not a regular file"):
        SaveStream(tmp_path / "fifo")


REFUSED = {
    "libvirt": (b"LibvirtQemudSave" + WHOLE, "magic", "Libvirt"),
    "elf": (b"\x7fELF" + bytes(100), "magic", "not a QEMU migration stream"),
    "version 2": (b"QEVM\0\0\0\2" + WHOLE[8:], "stream version", "is 2"),
    "no configuration": (HEADER + SETUP, "section type", "SECTION_START"),
    "absurd machine name": (HEADER + b"\x07\xff\xff\xff\xff" + bytes(64), "configuration.len", ""),
    "control characters": (HEADER + b"\x07\0\0\0\2\x1bc" + SETUP, "configuration.name", ""),
    "unknown subsection": (
        HEADER + CONFIGURATION + b"\x05\x07" + b"unknown" + struct.pack(">I", 1) + SETUP,
        "subsection",
        "unknown",
    ),
    "postcopy": (HEADER + CONFIGURATION + b"\x08\0\1\0\4" + SETUP, "section type", "VM_COMMAND"),
    "other live section": (
        HEADER + CONFIGURATION + b"\x01" + struct.pack(">IB5sII", 1, 5, b"block", 0, 1),
        "live section",
        "block",
    ),
    "ram version": (
        HEADER + CONFIGURATION + RAM_START[:-1] + b"\5" + bytes(64),
        "instance and version",
        "",
    ),
    "block too long": (
        HEADER + CONFIGURATION + RAM_START + blocks((b"pc.ram", 1 << 62)),
        "length of b'pc.ram'",
        "",
    ),
    "block not whole pages": (
        HEADER + CONFIGURATION + RAM_START + struct.pack(">QB6sQ", PAGE | 4, 6, b"pc.ram", 100),
        "length of b'pc.ram'",
        "",
    ),
    "block twice": (
        HEADER + CONFIGURATION + RAM_START + blocks((b"a", PAGE), (b"a", PAGE)),
        "RAM block list",
        "twice",
    ),
    "no block": (HEADER + CONFIGURATION + RAM_START + blocks(), "RAM block list", "no memory"),
    "page beyond block": (with_records(FIRST + stored(64, 1)), "page address", "pc.ram"),
    "run beyond block": (with_records(FIRST + zeros(1, 70)), "page address", "pc.ram"),
    "unknown block": (with_records(record(0, ZERO, b"vga.vram", b"\0")), "RAM block name", "vga"),
    "continues nothing": (with_records(stored(1, 1)), "ram record flags", ""),
    "xbzrle": (with_records(FIRST + record(1, 64 | CONTINUE)), "ram record flags", "XBZRLE"),
    "compressed": (with_records(FIRST + record(1, 256 | CONTINUE)), "ram record flags", "COMPRESS"),
    "multifd": (with_records(FIRST + record(0, 512 | CONTINUE)), "ram record flags", "MULTIFD"),
    "hook": (with_records(FIRST + record(0, 128 | CONTINUE)), "ram record flags", "HOOK"),
    "two kinds": (with_records(FIRST + record(1, 2 | 8 | CONTINUE)), "ram record flags", ""),
    "no footer": (with_records(FIRST + struct.pack(">Q", EOS) + bytes(64)), "section footer", ""),
    "footer of another": (
        with_records(FIRST + struct.pack(">QBI", EOS, 0x7E, 3) + bytes(64)),
        "id in the section footer",
        "",
    ),
    "second live section": (
        with_records(FIRST).replace(END, b"\x03\0\0\0\x09") + bytes(64),
        "section id",
        "",
    ),
    "live state behind ram": (
        with_records(RECORDS) + END_OF_RECORDS + b"\x02\0\0\0\x09" + TAIL,
        "section type",
        "SECTION_PART",
    ),
    "description is no JSON": (WHOLE[: -len(JSON)] + b"x" * len(JSON), "description", "not JSON"),
    "description of another page size": (
        WHOLE.replace(b'"page_size": 4096', b'"page_size": 8192'),
        "description",
        "page_size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_stream_unseen_is_refused_by_name(write: Callable[[bytes], Path], case: str) -> None:
    stream, field, words = REFUSED[case]
    with pytest.raises(UnsupportedStateError) as caught:
        SaveStream(write(stream))
    assert words in str(caught.value)
    assert caught.value.field.startswith(field)
    assert caught.value.offset <= len(stream)


@pytest.mark.parametrize("capability", [b"x-ignore-shared", b"mapped-ram"])
def test_stream_with_capability_is_refused_by_its_name(
    write: Callable[[bytes], Path], capability: bytes
) -> None:
    name = b"configuration/capabilities"
    subsection = b"\x05" + struct.pack(">B", len(name)) + name + struct.pack(">II", 1, 1)
    subsection += struct.pack(">B", len(capability)) + capability
    with pytest.raises(UnsupportedStateError, match=capability.decode()):
        SaveStream(write(HEADER + CONFIGURATION + subsection + SETUP))


def test_stream_with_other_page_bits_is_refused(write: Callable[[bytes], Path]) -> None:
    name = b"configuration/target-page-bits"
    subsection = b"\x05" + struct.pack(">B", len(name)) + name + struct.pack(">II", 1, 14)
    with pytest.raises(UnsupportedStateError, match="target-page-bits") as caught:
        SaveStream(write(HEADER + CONFIGURATION + subsection + SETUP))
    assert caught.value.value == 14


def test_save_without_main_block_is_refused(write: Callable[[bytes], Path]) -> None:
    stream = WHOLE.replace(b"pc.ram", b"pc.rom")
    with pytest.raises(UnsupportedStateError, match=r"pc\.rom, pc\.bios.*not among them"):
        open_save(write(stream))


def test_stream_flipped_bytes_never_crash(write: Callable[[bytes], Path]) -> None:
    """Every byte of structure is flipped in turn: read, refused or truncated, nothing else."""
    page_data = {
        offset
        for start in range(len(WHOLE))
        if WHOLE.startswith(content(5), start)
        for offset in range(start, start + PAGE)
    }
    structure = [at for at in range(len(HEADER + CONFIGURATION + SETUP + PART) + 30)]
    structure += [at for at in range(len(WHOLE) - len(TAIL) - 60, len(WHOLE))]
    for at in structure:
        if at in page_data:
            continue
        for flip in (0x01, 0xFF):
            stream = bytearray(WHOLE)
            stream[at] ^= flip
            with contextlib.suppress(TruncatedStateError, UnsupportedStateError):
                SaveStream(write(bytes(stream))).close()
