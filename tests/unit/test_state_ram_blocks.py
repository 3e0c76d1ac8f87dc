"""Which blocks are base memory: told by names, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.unit.state_samples import PAGE, content, stream

from ouassister.errors import UnsupportedStateError
from ouassister.memory import open_save
from ouassister.memory.physical import FOUR_GIB, around_hole
from ouassister.model import PhysAddr
from ouassister.state.ram_blocks import base_memory
from ouassister.state.ram_table import FixedPages, RamBlock

if TYPE_CHECKING:
    from pathlib import Path

DEVICES = (
    b"pc.bios",
    b"pc.rom",
    b"/rom@etc/acpi/tables",
    b"0000:00:02.0/vga.vram",
    b"0000:00:1e.0:01.0/virtio-net-pci.rom",
    b"system.flash0",
)


def blocks(*names: bytes, pages: int = 4) -> dict[bytes, RamBlock]:
    return {
        name: RamBlock(name, pages * PAGE, FixedPages(None, pages, PAGE))
        for name in (*names, *DEVICES)
    }


@pytest.mark.parametrize(
    ("names", "base"),
    [
        ((b"pc.ram",), (b"pc.ram",)),
        ((b"my-memory",), (b"my-memory",)),
        ((b"/objects/ram0",), (b"/objects/ram0",)),
        ((b"ram-node1", b"ram-node0"), (b"ram-node0", b"ram-node1")),
        (tuple(b"m%d" % n for n in range(11)), tuple(b"m%d" % n for n in range(11))),
        (tuple(b"m%d" % n for n in range(10, -1, -1)), tuple(b"m%d" % n for n in range(11))),
    ],
)
def test_names_tell_base_memory(names: tuple[bytes, ...], base: tuple[bytes, ...]) -> None:
    assert tuple(block.name for block in base_memory(blocks(*names))) == base


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "base memory is not among them"),
        ((b"pc.ram", b"dimm1"), "dimm1"),
        ((b"pc.ram", b"0000:00:02/odd"), "odd"),
        ((b"ram-node0", b"dimm1"), "in which order"),
        ((b"ram-node0", b"ram-node2"), "in which order"),
        ((b"ram-node1", b"ram-node2"), "in which order"),
        ((b"a", b"b"), "in which order"),
        ((b"n0", b"n00"), "in which order"),
    ],
)
def test_names_that_do_not_tell_are_refused(names: tuple[bytes, ...], words: str) -> None:
    with pytest.raises(UnsupportedStateError, match=words):
        base_memory(blocks(*names))


def test_caller_who_knows_is_believed() -> None:
    known = blocks(b"b", b"a", b"nvdimm")
    assert [one.name for one in base_memory(known, (b"b", b"a"))] == [b"b", b"a"]
    with pytest.raises(UnsupportedStateError, match="'c'"):
        base_memory(known, (b"a", b"c"))


def test_nodes_are_read_one_behind_the_other(tmp_path: Path) -> None:
    sizes = {b"ram-node1": 6 * PAGE, b"ram-node0": 2 * PAGE, b"pc.bios": PAGE}
    pages = {
        b"ram-node0": {0: content(10), 1: content(11)},
        b"ram-node1": {page: content(20 + page) for page in range(6)},
    }
    (tmp_path / "save").write_bytes(stream(pages, sizes))
    with open_save(tmp_path / "save") as save:
        assert save.ram_bytes == 8 * PAGE
        want = [10, 11, *range(20, 26)]
        for page, number in enumerate(want):
            assert save.memory.read(PhysAddr(page * PAGE), PAGE) == content(number)
        assert save.memory.read(PhysAddr(2 * PAGE - 8), 16) == content(11)[:8] + content(20)[:8]
        assert sorted(save.memory.find(content(23)[:16]))[0] == 5 * PAGE
    with open_save(tmp_path / "save", ram=(b"ram-node1", b"ram-node0")) as save:
        assert save.memory.read(PhysAddr(6 * PAGE), PAGE) == content(10)


@pytest.mark.parametrize(
    ("hole", "places"),
    [
        (12, [(0, 0, 4, 0), (4, 1, 4, 0), (8, 2, 4, 0)]),
        (20, [(0, 0, 4, 0), (4, 1, 4, 0), (8, 2, 4, 0)]),
        (6, [(0, 0, 4, 0), (4, 1, 2, 0), (-1, 1, 2, 2), (1, 2, 4, 0)]),
        (4, [(0, 0, 4, 0), (-1, 1, 4, 0), (3, 2, 4, 0)]),
        (1, [(0, 0, 1, 0), (-1, 0, 3, 1), (2, 1, 4, 0), (6, 2, 4, 0)]),
    ],
)
def test_nodes_lie_around_the_hole(hole: int, places: list[tuple[int, int, int, int]]) -> None:
    """Places are (page, block, pages, page in the block); from -1 on they count from 4 GiB."""
    base = base_memory(blocks(b"n0", b"n1", b"n2"))
    found = around_hole(base, hole * PAGE)
    above = False
    want = []
    for page, block, pages, inside in places:
        above = above or page == -1
        start = FOUR_GIB + (page + 1) * PAGE if above else page * PAGE
        want.append((start, base[block], pages * PAGE, inside * PAGE))
    assert [(one.address, one.block, one.size_bytes, one.block_offset) for one in found] == want
