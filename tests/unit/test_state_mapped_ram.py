"""mapped-ram: pages at fixed places, and each field of its header."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING

import pytest
from tests.unit.state_samples import END_OF_RECORDS, PAGE, content, libvirt_header, mapped_ram

from ouassister.errors import TruncatedStateError, UnsupportedStateError
from ouassister.memory import open_save
from ouassister.model import PhysAddr
from ouassister.state.qemu_stream import SaveStream
from ouassister.state.ram_table import FixedPages

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZES = {b"pc.ram": 20 * PAGE, b"pc.bios": 2 * PAGE}
WHOLE = mapped_ram(SIZES)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "save.img"
        path.write_bytes(data)
        return path

    return write


def test_pages_are_read_where_their_bit_is_set(write: Callable[[bytes], Path]) -> None:
    with open_save(write(WHOLE)) as save:
        assert save.format.name == "qemu-mapped-ram"
        assert save.ram_bytes == 20 * PAGE
        assert list(save.blocks) == [b"pc.ram", b"pc.bios"]
        assert save.description()["page_size"] == PAGE
        for page in range(20):
            want = content(page) if page % 3 else bytes(PAGE)  # not the rubbish at its place
            assert save.memory.read(PhysAddr(page * PAGE), PAGE) == want
        assert list(save.memory.find(b"\xdd" * 8)) == []
        assert next(iter(save.memory.find(content(7)[:16]))) == 7 * PAGE


def test_offsets_count_from_the_start_of_the_file(write: Callable[[bytes], Path]) -> None:
    header = libvirt_header(6)
    stream = mapped_ram(SIZES, before=len(header))
    with open_save(write(header + stream)) as save:
        assert save.format.name == "libvirt-sparse"
        assert save.memory.read(PhysAddr(4 * PAGE), PAGE) == content(4)
    with pytest.raises(UnsupportedStateError, match="bitmap_offset"):
        open_save(write(header + WHOLE))


def test_other_channels_leave_marks_between_the_sections(write: Callable[[bytes], Path]) -> None:
    with open_save(write(mapped_ram(SIZES, records=struct.pack(">Q", 0x200)))) as save:
        assert save.memory.read(PhysAddr(PAGE), 8) == content(1)[:8]


def field(at: int, form: str, value: int) -> Callable[[int, bytes], bytes]:
    def change(block: int, header: bytes) -> bytes:
        if block:
            return header
        raw = struct.pack(form, value)
        return header[:at] + raw + header[at + len(raw) :]

    return change


REFUSED = {
    "version": (field(0, ">I", 2), "version and page size"),
    "page size": (field(4, ">Q", 16384), "version and page size"),
    "bitmap elsewhere": (field(12, ">Q", 0), "bitmap_offset"),
    "pages in the bitmap": (field(20, ">Q", 0), "pages_offset"),
    "pages not aligned": (field(20, ">Q", 0x10001), "pages_offset"),
    "pages beyond the file": (field(20, ">Q", 1 << 60), "pages_offset"),
    "bits beyond the block": (field(28 + 2, ">B", 0x10), "mapped-ram bitmap"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_header_unseen_is_refused_by_name(write: Callable[[bytes], Path], case: str) -> None:
    change, words = REFUSED[case]
    with pytest.raises(UnsupportedStateError) as caught:
        SaveStream(write(mapped_ram(SIZES, change=change)))
    assert words in caught.value.field


@pytest.mark.parametrize(
    "names", [[b"x-ignore-shared"], [b"mapped-ram", b"x-ignore-shared"], [b"later"], []]
)
def test_other_capability_is_refused(write: Callable[[bytes], Path], names: list[bytes]) -> None:
    with pytest.raises(UnsupportedStateError, match="capabilities"):
        SaveStream(write(mapped_ram(SIZES, capabilities=names)))


def test_page_record_has_no_place_in_it(write: Callable[[bytes], Path]) -> None:
    record = struct.pack(">QB6s", 8, 6, b"pc.ram") + bytes(PAGE)
    with pytest.raises(UnsupportedStateError, match="ram record flags"):
        SaveStream(write(mapped_ram(SIZES, records=record)))


def test_multifd_mark_is_refused_without_mapped_ram(write: Callable[[bytes], Path]) -> None:
    stream = WHOLE.replace(b"mapped-ram", b"mapped-rum")
    with pytest.raises(UnsupportedStateError, match="mapped-rum"):
        SaveStream(write(stream))


def test_file_cut_anywhere_is_truncated(write: Callable[[bytes], Path]) -> None:
    for size in (*range(1, 160), *range(160, len(WHOLE), 4999), len(WHOLE) - 1):
        with pytest.raises((TruncatedStateError, UnsupportedStateError)):
            SaveStream(write(WHOLE[:size]))


def test_flipped_bytes_never_crash(write: Callable[[bytes], Path]) -> None:
    last = WHOLE.index(END_OF_RECORDS)
    for at in (*range(200), *range(last - 10, len(WHOLE))):
        for flip in (1, 0xFF):
            data = bytearray(WHOLE)
            data[at] ^= flip
            with contextlib.suppress(TruncatedStateError, UnsupportedStateError):
                SaveStream(write(bytes(data))).close()


def test_pages_of_a_bitmap_are_bounded() -> None:
    pages = FixedPages(b"\x05\0\0\0\0\0\0\0", 8, 4096)
    assert [pages[page] for page in range(4)] == [4096, -1, 3 * 4096, -1]
    assert pages.locate(4096 + 5) == (0, 5)
    for outside in (0, 4095, 2 * 4096, 9 * 4096):
        assert pages.locate(outside) is None
    for page in (-1, 8):
        with pytest.raises(IndexError):
            pages[page]
    assert list(pages.stretches()) == [(4096, 9 * 4096)]
