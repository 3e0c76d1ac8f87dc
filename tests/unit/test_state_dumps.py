"""Dumps of guest memory: ELF, kdump-compressed, and their page compressions."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
import zlib
from typing import TYPE_CHECKING

import pytest
from tests.unit.state_samples import PAGE, elf, flattened, kdump

from ouassister.errors import (
    OUassisterError,
    PageAbsentError,
    TruncatedStateError,
    UnsupportedStateError,
)
from ouassister.memory import open_save
from ouassister.model import PhysAddr
from ouassister.state import lzo, snappy
from ouassister.state.formats import Support

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
FOUR_GIB = 1 << 32


def noise(seed: int, size: int) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(size)


LOW = noise(1, 640 * 1024)
HIGH = noise(2, 3 * PAGE)
MAIN = b"needle".ljust(2 * MIB, b"\0") + noise(3, PAGE)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "dump"
        path.write_bytes(data)
        return path

    return write


# --- ELF -------------------------------------------------------------------------------------

LOADS = [
    (0, 0, LOW),
    (MIB, len(LOW), MAIN),
    (0xFFFC0000, len(LOW) + len(MAIN), bytes(PAGE)),
    (FOUR_GIB, len(LOW) + len(MAIN) + PAGE, HIGH),
]


@pytest.mark.parametrize("extended", [False, True])
def test_elf_dump_tells_where_memory_is(write: Callable[[bytes], Path], extended: bool) -> None:
    with open_save(write(elf(LOADS, extended=extended))) as save:
        assert save.format.support is Support.PARTIAL
        assert save.memory.hole == MIB + len(MAIN)
        assert save.ram_bytes == MIB + len(MAIN) + len(HIGH)
        assert save.candidates() == [save.memory]
        assert save.layout(save.memory.hole) is save.memory
        assert save.memory.read(PhysAddr(0), len(LOW)) == LOW
        assert save.memory.read(PhysAddr(MIB), len(MAIN)) == MAIN
        assert save.memory.read(PhysAddr(FOUR_GIB), len(HIGH)) == HIGH
        assert list(save.memory.find(b"needle")) == [MIB]
        for absent in (len(LOW), MIB - 1, MIB + len(MAIN), FOUR_GIB - 1, FOUR_GIB + len(HIGH)):
            with pytest.raises(PageAbsentError):
                save.memory.read(PhysAddr(absent), 1)
        with pytest.raises(UnsupportedStateError, match="was expected"):
            save.layout(3 << 30)
        with pytest.raises(UnsupportedStateError, match="memory alone"):
            save.description()
        with pytest.raises(UnsupportedStateError, match="no resume"):
            save.require_full("resume")


def test_elf_ranges_of_paging_are_joined(write: Callable[[bytes], Path]) -> None:
    inside = (MIB + 5 * PAGE, len(LOW) + 5 * PAGE, MAIN[5 * PAGE : 9 * PAGE])
    again = (MIB, len(LOW), MAIN[: 7 * PAGE])
    with open_save(write(elf([inside, *LOADS, again, inside]))) as save:
        assert len(save.blocks) == 4
        assert save.memory.read(PhysAddr(MIB), len(MAIN)) == MAIN


def test_elf_many_ranges_are_found_as_fast(write: Callable[[bytes], Path]) -> None:
    pages = {MIB + 2 * index * PAGE: noise(index, PAGE) for index in range(40)}
    loads = [(address, index * PAGE, data) for index, (address, data) in enumerate(pages.items())]
    with open_save(write(elf(loads))) as save:
        for address, data in pages.items():
            assert save.memory.read(PhysAddr(address), PAGE) == data
            with pytest.raises(PageAbsentError):
                save.memory.read(PhysAddr(address + PAGE), 1)
        with pytest.raises(PageAbsentError):
            save.memory.read(PhysAddr(0), 1)


ELF_REFUSED = {
    "32 bit": (elf(LOADS, bits=1), "EI_CLASS"),
    "program": (elf(LOADS, kind=2), "e_type"),
    "other machine": (elf(LOADS, machine=3), "e_machine"),
    "a process": (elf(LOADS, note=b"GNU\0\0"), "notes"),
    "two places": (elf([*LOADS, (MIB, 0, LOW[:PAGE])]), "p_paddr"),
    "not whole pages": (elf([*LOADS, (8 * MIB, 0, LOW[:100])]), "p_paddr"),
    "beyond all addresses": (elf([*LOADS, (1 << 63, 0, LOW[:PAGE])]), "p_paddr"),
    "no memory": (elf([(0, 0, LOW)]), "memory ranges"),
    "none at all": (elf([]), "memory ranges"),
}


@pytest.mark.parametrize("case", ELF_REFUSED)
def test_elf_unseen_is_refused_by_name(write: Callable[[bytes], Path], case: str) -> None:
    data, field = ELF_REFUSED[case]
    with pytest.raises(UnsupportedStateError) as caught:
        open_save(write(data))
    assert caught.value.field == field


def test_elf_cut_anywhere_is_truncated(write: Callable[[bytes], Path]) -> None:
    whole = elf(LOADS)
    for size in (*range(1, 400, 3), len(whole) // 2, len(whole) - 1):
        with pytest.raises(TruncatedStateError):
            open_save(write(whole[:size]))


# --- kdump -----------------------------------------------------------------------------------

PAGES = {page: LOW[page * PAGE : (page + 1) * PAGE] for page in range(3)}
PAGES |= {256 + page: struct.pack("<Q", page) * 512 for page in range(44)}
PAGES |= {300: bytes(PAGE), 301: b"OSRELEASE=6".ljust(PAGE, b"\1"), 302: b"\2" * 100 + b"xneedlex"}
PAGES[0x100000] = b"above".ljust(PAGE, b"\3")  # 4 GiB


def snappy_literal(page: bytes) -> bytes:
    """The page as one literal and, where its end repeats one byte, a copy."""
    head = page.rstrip(page[-1:]) + page[-1:]
    rest = len(page) - len(head)
    if rest == 0:
        return b"\x80\x20\xf4" + struct.pack("<H", len(page) - 1) + page
    out = b"\x80\x20\xf4" + struct.pack("<H", len(head) - 1) + head
    while rest:
        count = min(rest, 64)
        out += struct.pack("<BH", (count - 1) << 2 | 2, 1)
        rest -= count
    return out


def lzo_literal(page: bytes) -> bytes:
    """Likewise in LZO1X."""
    head = page.rstrip(page[-1:]) + page[-1:]
    rest = len(page) - len(head)
    if len(head) < 4:
        head, rest = page[:4], len(page) - 4
    count = len(head) - 3
    out = bytes([count]) if count < 16 else b"\0" + lzo_more(count - 15)
    out += head
    if rest:
        extra = rest - 2
        out += bytes([32 | extra]) if extra < 32 else b"\x20" + lzo_more(extra - 31)
        out += struct.pack("<H", 0)  # one byte before the end, no literals
    return out + b"\x11\0\0"


def lzo_more(count: int) -> bytes:
    zeros, last = divmod(count - 1, 255)
    return bytes(zeros) + bytes([last + 1])


METHODS: dict[int, Callable[[bytes], bytes]] = {
    1: lambda page: zlib.compress(page, 1),
    2: lzo_literal,
    4: snappy_literal,
}


@pytest.mark.parametrize("status", METHODS)
@pytest.mark.parametrize("flat", [False, True])
def test_kdump_pages_are_expanded(write: Callable[[bytes], Path], status: int, flat: bool) -> None:
    data = kdump(PAGES, status=status, compress=METHODS[status])
    with open_save(write(flattened(data) if flat else data)) as save:
        assert save.format.name == "kdump"
        for page, text in PAGES.items():
            assert save.memory.read(PhysAddr(page * PAGE), PAGE) == text.ljust(PAGE, b"\0"), page
        both = save.memory.read(PhysAddr(256 * PAGE + 100), 2 * PAGE)
        assert both == (PAGES[256] + PAGES[257] + PAGES[258])[100 : 100 + 2 * PAGE]
        assert save.memory.hole == 303 * PAGE
        assert save.ram_bytes == 304 * PAGE
        for absent in (3, 255, 303, 0xFFFFF, 0x100001):
            with pytest.raises(PageAbsentError):
                save.memory.read(PhysAddr(absent * PAGE), 1)
        assert next(iter(save.memory.find(b"OSRELEASE="))) == 301 * PAGE
        assert list(save.memory.find(b"OSRELEASE=")) == [301 * PAGE]
        assert list(save.memory.find(b"xneedlex")) == [302 * PAGE + 100]
        assert next(iter(save.memory.find(b"\3" * 8, limit=3))) == FOUR_GIB + 5


def test_kdump_string_is_found_in_compressed_bytes_too(write: Callable[[bytes], Path]) -> None:
    hidden = zlib.compress(b"abc" * 9, 9)  # deflate leaves no string as it is
    assert b"abcabcabc" not in hidden
    pages = {256: b"abc" * 9 + b"d", 257: b"nothing"}
    with open_save(write(kdump(pages))) as save:
        assert list(save.memory.find(b"abcabcabcd")) == [MIB + 18]


def test_kdump_gap_of_the_flat_form_reads_as_zeros(write: Callable[[bytes], Path]) -> None:
    data = kdump(PAGES)
    with open_save(write(flattened(data, PAGE, skip=range(3 * PAGE, 4 * PAGE)))) as save:
        assert save.memory.read(PhysAddr(0), PAGE) == PAGES[0]  # a part of the bitmap without bits


KDUMP_REFUSED = {
    "version": (kdump(PAGES, version=5), "header_version"),
    "block size": (kdump(PAGES, block=8192), "block_size"),
    "pages left out": (kdump(PAGES, level=31), "dump_level and split"),
    "pages left out by bitmap": (kdump(PAGES, second=False), "second bitmap"),
    "zstd": (kdump(PAGES, status=0x20), "status"),
    "no zlib": (kdump(PAGES, compress=lambda _page: b"rubbish"), "zlib page"),
    "no lzo": (kdump(PAGES, status=2, compress=lambda _page: b"\xff"), "lzo page"),
    "no snappy": (kdump(PAGES, status=4, compress=lambda _page: b"\xff"), "snappy page"),
    "a short page": (kdump(PAGES, compress=lambda page: zlib.compress(page[:9])), "expanded page"),
    "a bomb": (kdump(PAGES, compress=lambda _page: zlib.compress(bytes(8 * MIB), 9)[:4000]),
               "expanded page"),
    "flat version": (flattened(kdump(PAGES)).replace(b"\0" * 7 + b"\1", b"\0" * 7 + b"\2", 1),
                     "type and version of the flat header"),
    "flat and more": (flattened(kdump(PAGES)) + b"more", "end of the flat file"),
    "flat record twice": (flattened(kdump(PAGES)).replace(
        struct.pack(">qq", 5000, 5000), struct.pack(">qq", 4999, 5000)), "flat record"),
    "flat record negative": (flattened(kdump(PAGES)).replace(
        struct.pack(">qq", 5000, 5000), struct.pack(">qq", 5000, -5)), "flat record"),
    "flat record far away": (flattened(kdump(PAGES)).replace(
        struct.pack(">qq", 5000, 5000), struct.pack(">qq", 1 << 61, 5000)), "flat record"),
}  # fmt: skip


@pytest.mark.parametrize("case", KDUMP_REFUSED)
def test_kdump_unseen_is_refused_by_name(write: Callable[[bytes], Path], case: str) -> None:
    data, field = KDUMP_REFUSED[case]
    with pytest.raises(UnsupportedStateError) as caught, open_save(write(data)) as save:
        save.memory.read(PhysAddr(257 * PAGE), PAGE)
    assert caught.value.field == field


def test_kdump_of_a_guest_outside_of_64_bit_mode_is_told(write: Callable[[bytes], Path]) -> None:
    data = bytearray(kdump(PAGES, block=0))
    struct.pack_into("<I", data, 416, PAGE)  # where the 32-bit header has its block size
    with pytest.raises(UnsupportedStateError, match="not in 64-bit mode"):
        open_save(write(bytes(data)))


@pytest.mark.parametrize("flat", [False, True])
def test_kdump_cut_anywhere_is_truncated(write: Callable[[bytes], Path], flat: bool) -> None:
    whole = flattened(kdump(PAGES)) if flat else kdump(PAGES)
    for size in (*range(1, 64, 5), *range(64, len(whole), 997), len(whole) - 1):
        with pytest.raises(TruncatedStateError):
            open_save(write(whole[:size]))
    if not flat:
        with pytest.raises(TruncatedStateError, match="last page"):
            open_save(write(whole + b"more"))


FEW = {page: text for page, text in PAGES.items() if 290 < page < 400}
SMALL = {
    "elf": elf([(MIB, 0, MAIN[:PAGE]), (FOUR_GIB, PAGE, HIGH)]),
    "kdump": kdump(FEW),
    "flattened": flattened(kdump(FEW)),
}


@pytest.mark.parametrize("name", SMALL)
def test_flipped_bytes_never_crash(write: Callable[[bytes], Path], name: str) -> None:
    data = SMALL[name]
    chance = random.Random(5)  # noqa: S311
    places = [*range(0, 600, 2), *(chance.randrange(len(data)) for _ in range(200))]
    for at in places:
        spoilt = bytearray(data)
        spoilt[at] ^= chance.choice((1, 0x80, 0xFF))
        with contextlib.suppress(OUassisterError), open_save(write(bytes(spoilt))) as save:
            for page in (0, 1, 256, 300):
                save.memory.read(PhysAddr(page * PAGE), PAGE)


# --- LZO and Snappy --------------------------------------------------------------------------

LZO = {
    b"\x15abcd\x11\0\0": b"abcd",
    b"\x12a\x11\0\0": b"a",
    b"\x01abcd\x11\0\0": b"abcd",
    b"\x15abcd\x40\0\x11\0\0": b"abcdddd",  # 3 bytes from 1 before
    b"\x15abcd\x6c\0\x11\0\0": b"abcdabcd",  # 4 bytes from 4 before
    b"\x15abcd\x22\x0c\0\x11\0\0": b"abcdabcd",
}


def test_lzo_instructions_of_each_kind() -> None:
    for stream, text in LZO.items():
        assert lzo.expand(stream, 100) == text
    # a short match behind literals of the instruction before: two bytes, from 1 + 1 before
    assert lzo.expand(b"\x15abcd\x41\0e\x04\0\x11\0\0", 100) == b"abcdddde" + b"de"
    # a match of 3 behind a long run, from 2049 before
    run = bytes(range(256)) * 9
    head = b"\0" + lzo_more(len(run) - 3 - 15) + run
    assert lzo.expand(head + b"\0\0\x11\0\0", 4096) == run + run[-2049:][:3]


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"\x11",
        b"\x15abc",
        b"\x15abcd",
        b"\x15abcd\x11\0\0more",
        b"\x15abcd\x60\xff\x11\0\0",  # from before the beginning
        b"\x15abcd\x20" + b"\0" * 50 + b"\1\0\0\x11\0\0",  # expands to too much
        b"\0" * 5000,
    ],
)
def test_lzo_nonsense_is_refused(stream: bytes) -> None:
    with pytest.raises(lzo.LzoError):
        lzo.expand(stream, 4096)


SNAPPY = {
    b"\0": b"",
    b"\x04\x0cabcd": b"abcd",
    b"\x08\x0cabcd\x01\x04": b"abcdabcd",
    b"\x08\x0cabcd\x0e\x04\0": b"abcdabcd",
    b"\x08\x0cabcd\x0f\x04\0\0\0": b"abcdabcd",
    b"\x09\x00a\x1e\x01\0": b"a" * 9,
    b"\x46\xf0\x45" + b"x" * 70: b"x" * 70,
}


def test_snappy_elements_of_each_kind() -> None:
    for stream, text in SNAPPY.items():
        assert snappy.expand(stream, 100) == text


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"\xff\xff\xff\xff\xff\xff",
        b"\x05\x0cabcd",
        b"\x03\x0cabcd",
        b"\x04\x0cab",
        b"\x08\x0cabcd\x01\x05",  # from before the beginning
        b"\x08\x0cabcd\x01\x00",
        b"\x07\x0cabcd\x01\x04",  # longer than it says
        b"\x80\x40\x0cabcd",  # 8192 bytes
    ],
)
def test_snappy_nonsense_is_refused(stream: bytes) -> None:
    with pytest.raises(snappy.SnappyError):
        snappy.expand(stream, 4096)


@pytest.mark.parametrize("expand", [lzo.expand, snappy.expand])
def test_random_bytes_end_in_the_module_s_own_error(
    expand: Callable[[bytes, int], bytes],
) -> None:
    chance = random.Random(7)  # noqa: S311
    for _ in range(3000):
        data = chance.randbytes(chance.randrange(60))
        with contextlib.suppress(lzo.LzoError, snappy.SnappyError):
            assert len(expand(data, 4096)) <= 4096
