"""Symbol tables that no note points to: an image as v5.10 lays it out, whole and damaged."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, cast

import pytest

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel import kallsyms_scan, vmcoreinfo
from ouassister.kernel.kallsyms import Kallsyms
from ouassister.memory import NotMappedError
from ouassister.model import PhysAddr, VirtAddr

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.memory import VirtualMemory

STEXT = 0xFFFFFFFF81000000
RODATA = STEXT + 0x200000
DATA = STEXT + 0x400000
COUNT = 700  # three markers


class Image:
    """Kernel memory with a gap between text and read-only data."""

    def __init__(self) -> None:
        self.text = bytes(0x1000)
        self.rodata = bytearray(0x10000)

    def read(self, address: VirtAddr, size: int) -> bytes:
        for start, data in ((STEXT, self.text), (RODATA, self.rodata)):
            if start <= address and address + size <= start + len(data):
                return bytes(data[address - start : address - start + size])
        raise NotMappedError(address)


def put(rodata: bytearray, at: int, data: bytes) -> int:
    rodata[at : at + len(data)] = data
    return -(-(at + len(data)) // 8) * 8


def build() -> tuple[Image, dict[str, int]]:
    """Lay the tables out in scripts/kallsyms.c's order; return where each begins."""
    image = Image()
    names = [b"D" + f"symbol_{number}".encode() for number in range(COUNT)]
    names[0], names[300] = b"T_stext", b"Dinit_uts_ns"
    tokens = [bytes((code,)) if 33 <= code < 127 else b"pair%d" % code for code in range(256)]
    tokens[200] = b"symbol_"
    packed, markers = b"", []
    for number, name in enumerate(names):
        if number % 256 == 0:
            markers.append(len(packed))
        codes = name.replace(b"symbol_", b"\xc8")
        packed += bytes((len(codes),)) + codes
    offsets = [-1 - 16 * number for number in range(COUNT)]
    offsets[300] = -1 - (DATA - STEXT)
    table = b"".join(token + b"\0" for token in tokens)
    index = [sum(len(token) + 1 for token in tokens[:code]) for code in range(256)]
    where: dict[str, int] = {}
    at = 0x3008
    for table_name, data in (
        ("offsets", struct.pack(f"<{COUNT}i", *offsets)),
        ("relative_base", struct.pack("<Q", STEXT)),
        ("num_syms", struct.pack("<I", COUNT)),
        ("names", packed),
        ("markers", struct.pack(f"<{len(markers)}I", *markers)),
        ("token_table", table),
        ("token_index", struct.pack("<256H", *index)),
    ):
        where[f"kallsyms_{table_name}"] = RODATA + at
        at = put(image.rodata, at, data)
    return image, where


def note(text: str = "") -> vmcoreinfo.Vmcoreinfo:
    text = (
        "OSRELEASE=5.10.0-test\nPAGESIZE=4096\nSYMBOL(swapper_pg_dir)=ffffffff82000000\n"
        f"NUMBER(phys_base)=0\nSYMBOL(_stext)={STEXT:x}\n"
    ) + (text or f"SYMBOL(init_uts_ns)={DATA:x}\n")
    parsed = vmcoreinfo.parse(text.encode().ljust(4096, b"\0"), PhysAddr(0))
    assert parsed is not None
    return parsed


def find(image: Image, text: str = "") -> dict[str, int]:
    return kallsyms_scan.find_tables(cast("VirtualMemory", image), note(text))


def test_tables_are_found_where_they_lie() -> None:
    image, where = build()
    assert find(image) == where


def test_symbols_of_a_note_without_keys_are_found() -> None:
    image, _ = build()
    symbols = Kallsyms(cast("VirtualMemory", image), note())
    assert symbols.address("symbol_1") == STEXT + 16
    assert symbols.address("symbol_699") == STEXT + 16 * 699
    assert symbols.address("init_uts_ns") == DATA
    assert symbols.address("symbol_300") is None


def test_tables_across_a_chunk_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    image, where = build()
    digits = where["kallsyms_token_table"] + image.rodata[
        where["kallsyms_token_table"] - RODATA :
    ].find(b"0\x001\x002")
    # The digits lie across the border of two chunks, whichever byte of them is the first.
    for cut in range(1, 20):
        monkeypatch.setattr(kallsyms_scan, "_CHUNK", DATA - digits - cut)
        assert find(image) == where


def damage_at(table: str, offset: int, data: bytes) -> Callable[[Image, dict[str, int]], None]:
    def damage(image: Image, where: dict[str, int]) -> None:
        put(image.rodata, where[f"kallsyms_{table}"] - RODATA + offset, data)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damage_at("token_table", 0, b"x" * 0x800),  # no digits
        damage_at("token_index", 2 * 0x32, b"\0\0"),
        damage_at("token_index", 0, b"\1\0"),
        damage_at("markers", 0, b"\1"),
        damage_at("markers", 4, bytes(4)),
        damage_at("markers", 4, b"\xff\xff\xff\xff" * 2),
        damage_at("num_syms", 0, struct.pack("<I", 256)),
        damage_at("num_syms", 0, struct.pack("<I", COUNT + 256)),
        damage_at("num_syms", 4, b"\1"),
        damage_at("names", 0, b"\xff"),
        damage_at("names", 0, bytes(8)),
    ],
)
def test_tables_that_contradict_each_other_are_none(
    damage: Callable[[Image, dict[str, int]], None],
) -> None:
    image, where = build()
    damage(image, where)
    with pytest.raises(UnsupportedGuestError, match=r"5\.10\.0-test does not tell"):
        find(image)


def test_look_alike_before_the_tables_is_passed_over() -> None:
    image, where = build()
    put(image.rodata, 0xF000, b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00")
    assert find(image) == where


@pytest.mark.parametrize("end", [STEXT, STEXT - 1, STEXT + (1 << 40)])
def test_image_of_absurd_size_is_not_searched(end: int) -> None:
    image, _ = build()
    with pytest.raises(UnsupportedGuestError):
        find(image, f"SYMBOL(init_uts_ns)={end:x}\n")


def test_tables_of_another_kernel_are_refused() -> None:
    image, where = build()
    put(image.rodata, where["kallsyms_relative_base"] - RODATA, struct.pack("<Q", STEXT + 8))
    with pytest.raises(CorruptGuestError, match="init_uts_ns"):
        Kallsyms(cast("VirtualMemory", image), note())
