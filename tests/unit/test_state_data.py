"""Bytes in stretches, and files that cannot be mapped."""

from __future__ import annotations

import itertools
import os
from array import array
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import NotSuspendedError, TruncatedStateError, UnsupportedStateError
from ouassister.state.data import GAP, Data, Reader, Stretches, map_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXT = b"needle in a hay stack, needleedle, " + bytes(20) + b"the last needle"


@pytest.fixture(params=["mapped", "stretches of 1", "stretches of 3", "stretches of 40", "gap"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Data]:
    """The same bytes, however they lie in the file."""
    path = tmp_path / "file"
    if request.param == "mapped":
        path.write_bytes(TEXT)
        opened: Data = map_file(path)
    elif request.param == "gap":
        start, end = TEXT.index(0), TEXT.rindex(0) + 1
        path.write_bytes(TEXT[end:] + TEXT[:start])
        starts, places = array("Q", (0, start, end)), array("q", (len(TEXT) - end, GAP, 0))
        opened = Stretches(map_file(path), starts, places, len(TEXT))
    else:
        size = int(request.param.split()[-1])
        pieces = [TEXT[at : at + size] for at in range(0, len(TEXT), size)]
        path.write_bytes(b"".join(reversed(pieces)))
        starts = array("Q", range(0, len(TEXT), size))
        lengths = [len(piece) for piece in reversed(pieces)]
        ends = [0, *itertools.accumulate(lengths)][:-1]
        opened = Stretches(map_file(path), starts, array("q", ends[::-1]), len(TEXT))
    yield opened
    opened.close()


def test_any_cut_is_the_same_bytes(data: Data) -> None:
    assert len(data) == len(TEXT)
    for start in range(len(TEXT) + 2):
        for end in (start, start + 1, start + 7, len(TEXT), len(TEXT) + 9):
            assert data[start:end] == TEXT[start:end]


def test_search_finds_each_occurrence_once(data: Data) -> None:
    for needle in (b"needle", b"e", b"ee", b"\0\0", b"needleedle, \0", b"nothing"):
        for start, end in ((0, len(TEXT)), (1, len(TEXT)), (3, 40), (0, 5)):
            every = [i for i in range(start, end) if TEXT.startswith(needle, i, end)]
            assert list(data.search(needle, start, end)) == every, (needle, start, end)


def test_last_finds_the_last_occurrence(data: Data) -> None:
    for needle in (b"needle", b"n", b"nothing", b"\0\0t"):
        for start, end in ((0, len(TEXT)), (0, len(TEXT) - 1), (5, 9), (len(TEXT), len(TEXT))):
            assert data.last(needle, start, end) == TEXT.rfind(needle, start, end)


def test_extent_never_reaches_beyond_its_stretch(data: Data) -> None:
    for position in range(len(TEXT)):
        file, place, count = data.extent(position)
        assert count > 0
        assert file[place : place + count] == TEXT[position : position + count]
    data.trim()
    assert data[: len(TEXT)] == TEXT


def test_file_that_cannot_be_mapped_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotSuspendedError, match="no save file"):
        map_file(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    with pytest.raises(TruncatedStateError, match="empty"):
        map_file(tmp_path / "empty")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnsupportedStateError, match="not a regular file"):
        map_file(tmp_path / "fifo")


def test_number_at_the_end_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(10)))
    reader = Reader(map_file(tmp_path / "file"), "file")
    assert reader.be64(2, "word") == 0x0203040506070809
    assert reader.be32(6, "word") == 0x06070809
    for read in (reader.be64, reader.be32, reader.u8):
        with pytest.raises(TruncatedStateError, match="ends at offset 0xa, within the word"):
            read(10, "word")
