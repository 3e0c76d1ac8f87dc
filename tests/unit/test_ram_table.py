"""Runs of records around the windows they are read in, and pages that start in a known way."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from tests.unit.state_samples import PAGE, content, mapped_ram, stream

from ouassister.errors import UnsupportedStateError
from ouassister.memory import open_save
from ouassister.model import PhysAddr

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.memory import SaveFile

MARK = b"MARK: 10 b"
LENGTHS = (1, 2, 15, 16, 17, 18, 143, 144, 145, 1167, 1168, 1169, 2300)


def opened(folder: Path, data: bytes) -> SaveFile:
    path = folder / "save.img"
    path.write_bytes(data)
    return open_save(path)


def zero_records(first: int, count: int, fill: int) -> bytes:
    return b"".join(
        (page * PAGE | 34).to_bytes(8, "big") + bytes((fill,))
        for page in range(first, first + count)
    )


def stored_records(pages: dict[int, bytes]) -> bytes:
    return b"".join(
        (page * PAGE | 40).to_bytes(8, "big") + data.ljust(PAGE, b"\0")
        for page, data in pages.items()
    )


def with_records(pages: int, records: bytes) -> bytes:
    """A stream whose block's records, but for the first, are these."""
    whole = stream({}, {b"pc.ram": pages * PAGE})
    start = whole.index(zero_records(1, 1, 0))
    return whole[:start] + records + whole[start + (pages - 1) * 9 :]


@pytest.mark.parametrize("fill", [0, 7, 255])
def test_run_of_filled_pages_ends_where_it_ends(tmp_path: Path, fill: int) -> None:
    """Another byte, another page, or another kind of record: each at all edges of the windows."""
    first = 1
    records = b""
    want: dict[int, int] = {}
    for length, other in itertools.product(LENGTHS, ("fill", "gap", "stored")):
        records += zero_records(first, length, fill)
        want |= dict.fromkeys(range(first, first + length), -1 - fill)
        first += length
        if other == "fill":
            records += zero_records(first, 1, fill ^ 1)
            want[first] = -1 - (fill ^ 1)
        elif other == "stored":
            records += stored_records({first: b"s" * PAGE})
        first += 1
    pages = first + 1
    records += zero_records(first, 1, 9)
    with opened(tmp_path, with_records(pages, records)) as save:
        offsets = save.blocks[b"pc.ram"].pages.offsets
        for page in range(1, pages - 1):
            if page in want:
                assert offsets[page] == want[page], page
            elif offsets[page]:
                assert save.memory.read(PhysAddr(page * PAGE), PAGE) == b"s" * PAGE
        assert sum(offsets[page] > 0 for page in range(pages)) == len(LENGTHS)
        assert sum(offsets[page] == 0 for page in range(pages)) == len(LENGTHS)
        assert offsets[pages - 1] == -10


@pytest.mark.parametrize("page", [(1 << 52) - 1, (1 << 52) - 20, 1 << 51, 1 << 40])
def test_filled_page_beyond_every_block_is_refused(tmp_path: Path, page: int) -> None:
    """Addresses that would not fit in 64 bits one page further, too."""
    count = min(64, (1 << 52) - page)
    with pytest.raises(UnsupportedStateError, match="beyond block"):
        opened(tmp_path, with_records(64, zero_records(page, count, 0)))


@pytest.mark.parametrize("count", LENGTHS)
def test_pages_are_found_by_how_they_start(tmp_path: Path, count: int) -> None:
    pages = {page: b"%d" % page for page in range(1, count + 1)}
    marked = sorted({1, 1 + count // 3, count})
    pages |= dict.fromkeys(marked, MARK + b" and more")
    pages[count + 2] = MARK[:9] + b"else"
    pages[count + 4] = b"x" + MARK  # not at its start
    with opened(tmp_path, with_records(count + 5, stored_records(pages))) as save:
        assert list(save.memory.page_starts(MARK)) == [(b"pc.ram", page * PAGE) for page in marked]
        assert list(save.memory.page_starts(b"nothing here")) == []


def test_pages_at_fixed_places_are_found_by_how_they_start(tmp_path: Path) -> None:
    with opened(tmp_path, mapped_ram({b"pc.ram": 48 * PAGE})) as save:
        assert list(save.memory.page_starts(content(8)[:16])) == [(b"pc.ram", 8 * PAGE)]
        assert list(save.memory.page_starts(b"\xdd" * 16)) == []  # no bit says that it is there


def test_page_that_was_sent_again_is_found_as_it_was_last(tmp_path: Path) -> None:
    old, new = stored_records({1: MARK}), stored_records({1: b"new"})
    for records, found in ((old + new, []), (new + old, [(b"pc.ram", PAGE)])):
        with opened(tmp_path, with_records(4, records + zero_records(2, 2, 0))) as save:
            assert list(save.memory.page_starts(MARK)) == found


def test_no_more_pages_are_told_than_a_limit(tmp_path: Path) -> None:
    pages = dict.fromkeys(range(40), MARK)
    with opened(tmp_path, stream({b"pc.ram": pages}, {b"pc.ram": 40 * PAGE})) as save:
        assert len(list(save.memory.page_starts(MARK, limit=5))) == 5
        assert len(list(save.memory.page_starts(MARK))) == 40
