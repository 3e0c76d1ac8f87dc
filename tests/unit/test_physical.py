"""Guest-physical and virtual memory over a small stream, and the proof of the PCI hole."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import (
    CorruptGuestError,
    PageAbsentError,
    UnsupportedGuestError,
    UnsupportedStateError,
)
from ouassister.kernel import e820, open_guest
from ouassister.memory import NotMappedError, PhysicalMemory, VirtualMemory, open_save
from ouassister.model import PhysAddr, VirtAddr

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ouassister.memory import SaveFile

PAGE = 4096
GIB = 1 << 30
FOUR_GIB = 4 * GIB


def stream(size: int, pages: dict[int, bytes]) -> bytes:
    """Write a whole stream of one block in which only some pages were sent."""
    footer = struct.pack(">QBI", 16, 0x7E, 2)
    out = b"QEVM" + struct.pack(">I", 3) + b"\x07" + struct.pack(">I3s", 3, b"q35")
    out += b"\x01" + struct.pack(">IB3sII", 2, 3, b"ram", 0, 4)
    out += struct.pack(">QB6sQ", size | 4, 6, b"pc.ram", size) + footer
    out += b"\x03" + struct.pack(">I", 2)
    for number, (page, data) in enumerate(pages.items()):
        flags = 8 | (32 if number else 0)
        out += struct.pack(">Q", page * PAGE | flags)
        out += b"" if number else b"\x06pc.ram"
        out += data.ljust(PAGE, b"\0")
    text = b'{"page_size": 4096, "devices": []}'
    return out + footer + b"\0\x06" + struct.pack(">I", len(text)) + text


def opened(path: Path, size: int, pages: dict[int, bytes]) -> SaveFile:
    path.write_bytes(stream(size, pages))
    return open_save(path)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[PhysicalMemory]:
    pages = {1: b"one", 2: b"a" * 4090 + b"needle", 3: b"needle, and needle", 5: b"five"}
    with opened(tmp_path / "save", 8 * PAGE, pages) as save:
        yield save.memory


def test_read_across_pages_is_joined(small: PhysicalMemory) -> None:
    data = small.read(PhysAddr(PAGE), 3 * PAGE)
    assert len(data) == 3 * PAGE
    assert data[:3] == b"one"
    assert data[2 * PAGE : 2 * PAGE + 6] == b"needle"
    assert small.read(PhysAddr(3 * PAGE - 6), 12) == b"needleneedle"
    assert small.read(PhysAddr(PAGE), 0) == b""


@pytest.mark.parametrize(
    ("address", "size", "absent"),
    [
        (0, 1, 0),
        (3 * PAGE + 100, PAGE, 4 * PAGE),
        (5 * PAGE, 2 * PAGE, 6 * PAGE),
        (8 * PAGE, 1, 8 * PAGE),
        (FOUR_GIB, 1, FOUR_GIB),
        (1 << 63, 8, 1 << 63),
        (-8, 8, -8),
    ],
)
def test_read_of_absent_page_names_it(
    small: PhysicalMemory, address: int, size: int, absent: int
) -> None:
    with pytest.raises(PageAbsentError) as caught:
        small.read(PhysAddr(address), size)
    assert caught.value.address == absent
    assert isinstance(caught.value, LookupError)


def test_find_yields_physical_addresses(small: PhysicalMemory) -> None:
    assert list(small.find(b"needle")) == [3 * PAGE - 6, 3 * PAGE, 3 * PAGE + 12]
    assert list(small.find(b"needle", limit=2)) == [3 * PAGE - 6, 3 * PAGE]
    assert list(small.find(b"nothing")) == []


def test_find_does_not_take_record_headers_for_memory(small: PhysicalMemory) -> None:
    assert list(small.find(struct.pack(">Q", 3 * PAGE | 8 | 32))) == []
    assert list(small.find(b"pc.ram")) == []


def test_memory_behind_a_hole_moves_to_4_gib(tmp_path: Path) -> None:
    size, hole = 3 * GIB, 2 * GIB
    pages = {0: b"zero", hole // PAGE - 1: b"last", hole // PAGE: b"first high", size // PAGE - 1:
             b"end"}  # fmt: skip
    with opened(tmp_path / "save", size, pages) as save:
        memory = save.layout(hole)
        assert memory.read(PhysAddr(hole - PAGE), 4) == b"last"
        assert memory.read(PhysAddr(FOUR_GIB), 10) == b"first high"
        assert memory.read(PhysAddr(FOUR_GIB + GIB - PAGE), 3) == b"end"
        assert list(memory.find(b"first high")) == [FOUR_GIB]
        assert [(one.address, one.size_bytes, one.block_offset) for one in memory.segments] == [
            (0, hole, 0),
            (FOUR_GIB, GIB, hole),
        ]
        for wrong in (hole, FOUR_GIB - 1, FOUR_GIB + GIB):
            with pytest.raises(PageAbsentError):
                memory.read(PhysAddr(wrong), 1)


def test_large_memory_is_not_readable_until_proven(tmp_path: Path) -> None:
    with opened(tmp_path / "save", 3 * GIB, {0: b"zero"}) as save:
        with pytest.raises(UnsupportedStateError, match="not proven"):
            _ = save.memory
        candidates = save.candidates()
        assert [one.hole for one in candidates] == [3 * GIB, 0xB0000000, 0x80000000, 0x40000000]
        save.proven(candidates[2])
        assert save.memory is candidates[2]


def test_memory_beyond_the_amd_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedStateError, match="not seen so large"):
        opened(tmp_path / "save", 1 << 40, {0: b"zero"})


# --- e820 ----------------------------------------------------------------------------------

SMALL = [(0, 0x9FC00), (0x100000, 512 * 2**20 - 0x23000)]
Q35_4G = [(0, 0x9FC00), (0x100000, 0x7FFDD000), (FOUR_GIB, FOUR_GIB + 2 * GIB)]


@pytest.mark.parametrize(
    ("ranges", "ram", "hole"),
    [
        (SMALL, 512 << 20, 512 << 20),
        (Q35_4G, 4 * GIB, 2 * GIB),
        (Q35_4G, 8 * GIB, None),  # the map of another size
        (Q35_4G, 3 * GIB, None),
        (SMALL, 1 * GIB, None),
        (SMALL, 256 << 20, None),
        ([*SMALL, (3 * GIB, 5 * GIB)], 4 * GIB, None),  # RAM where PCI has to be
        ([*Q35_4G, (3 * GIB, 3 * GIB + PAGE)], 4 * GIB, None),
        ([], 512 << 20, None),
        ([(0, 1 << 60)], 512 << 20, None),
    ],
)
def test_hole_is_told_only_by_a_map_that_fits(
    ranges: list[tuple[int, int]], ram: int, hole: int | None
) -> None:
    assert e820.hole_start(ranges, ram) == hole


# --- page walk -----------------------------------------------------------------------------


def table(entries: dict[int, int]) -> bytes:
    words = [0] * 512
    for index, entry in entries.items():
        words[index] = entry
    return struct.pack("<512Q", *words)


KERNEL = 0xFFFF888000000000


@pytest.fixture
def space(tmp_path: Path) -> Iterator[VirtualMemory]:
    """Four levels: tables in pages 1 to 4, data in 5 and 6, one 2 MiB page at 2 MiB."""
    present = 1
    pages = {
        1: table({0: 2 * PAGE | present, 0x111: 2 * PAGE | present | 1 << 63}),
        2: table({0: 3 * PAGE | present, 1: 64 * PAGE | present, 2: 1 << 30 | present | 0x80}),
        3: table({0: 4 * PAGE | present, 1: 2 << 20 | present | 0x80}),
        4: table({0: 5 * PAGE | present, 1: 6 * PAGE | present, 2: 7 * PAGE | present, 3: 2}),
        5: b"five",
        6: b"six",
        512 + 3: b"large",
    }
    with opened(tmp_path / "save", 16 << 20, pages) as save:
        yield VirtualMemory(save.memory, PhysAddr(PAGE), 4)


def test_walk_reaches_small_and_large_pages(space: VirtualMemory) -> None:
    assert space.read(VirtAddr(0), 4) == b"five"
    assert space.read(VirtAddr(PAGE), 3) == b"six"
    assert space.read(VirtAddr(PAGE - 2), 5) == b"\0\0six"
    assert space.read(VirtAddr((2 << 20) + 3 * PAGE), 5) == b"large"
    assert space.read(VirtAddr(KERNEL), 4) == b"five"
    assert space.translate((2 << 30) + 5) == (1 << 30) + 5


@pytest.mark.parametrize(
    "address",
    [3 * PAGE, 1 << 39, 0x0000_8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF, 1 << 63, 4 << 20],
)
def test_walk_of_unmapped_or_uncanonical_address_fails(space: VirtualMemory, address: int) -> None:
    with pytest.raises(NotMappedError) as caught:
        space.read(VirtAddr(address), 1)
    assert caught.value.address == address


def test_walk_through_absent_pages_names_them(space: VirtualMemory) -> None:
    with pytest.raises(PageAbsentError) as caught:
        space.read(VirtAddr(2 * PAGE), 1)  # mapped, never saved
    assert caught.value.address == 7 * PAGE
    with pytest.raises(PageAbsentError) as caught:
        space.read(VirtAddr(1 << 30), 1)  # its table was never saved
    assert caught.value.address == 64 * PAGE


# --- memory that holds no kernel, or one that must not be read --------------------------------

NOTE = b"""OSRELEASE=6.1.0-test
PAGESIZE=4096
SYMBOL(init_uts_ns)=ffffffff80000000
OFFSET(uts_namespace.name)=0
SYMBOL(swapper_pg_dir)=ffffffff80001000
NUMBER(phys_base)=0
NUMBER(pgtable_l5_enabled)=0
"""


def kernel_pages(note: bytes, release: bytes) -> dict[int, bytes]:
    """Page tables in pages 1 to 4 map page 5, which names a release, at init_uts_ns."""
    return {
        1: table({511: 2 * PAGE | 1}),
        2: table({510: 3 * PAGE | 1}),
        3: table({0: 4 * PAGE | 1}),
        4: table({0: 5 * PAGE | 1}),
        5: bytes(130) + release,
        6: note,
    }


@pytest.mark.parametrize(
    ("pages", "error", "words"),
    [
        ({1: b"nothing"}, UnsupportedGuestError, "no Linux kernel"),
        ({6: NOTE}, PageAbsentError, "absent"),
        ({1: table({}), 6: NOTE}, CorruptGuestError, "leads nowhere"),
        (kernel_pages(NOTE, b"5.10.0-other"), CorruptGuestError, "6.1.0-test, the kernel itself"),
        (kernel_pages(NOTE, b"6.1.0-test"), UnsupportedGuestError, "symbol table"),
        (
            kernel_pages(NOTE + b"NUMBER(sme_mask)=140737488355328\n", b"6.1.0-test"),
            UnsupportedGuestError,
            "encrypted",
        ),
        (kernel_pages(NOTE.replace(b"OFFSET", b"SIZE"), b""), CorruptGuestError, "itself another"),
        (
            kernel_pages(NOTE.replace(b"SYMBOL(init_uts_ns)", b"SYMBOL(x)"), b""),
            UnsupportedGuestError,
            "init_uts_ns",
        ),
    ],
)
def test_memory_without_readable_kernel_is_refused(
    tmp_path: Path, pages: dict[int, bytes], error: type[Exception], words: str
) -> None:
    with (
        opened(tmp_path / "save", 64 * PAGE, pages) as save,
        pytest.raises(error, match=words),
    ):
        open_guest(save)
