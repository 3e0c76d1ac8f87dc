"""Frames of a capture are counted, whole ones only; what is no capture proves nothing."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from ouassister.demo.frames import count_frames
from ouassister.errors import InternalError

if TYPE_CHECKING:
    from pathlib import Path

# pcap-savefile(5): magic, version 2.4, zone, accuracy, snapshot length, link type Ethernet
HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65536, 1)


def frame(size: int, captured: int | None = None) -> bytes:
    taken = size if captured is None else captured
    return struct.pack("<IIII", 1, 2, taken, size) + bytes(taken)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "frames.pcap"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("sizes", [(), (42,), (60, 0, 1514, 65536)])
def test_frames_are_counted(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    assert count_frames(write(tmp_path, HEADER + b"".join(map(frame, sizes)))) == len(sizes)


def test_frame_cut_by_the_snapshot_length_counts_once(tmp_path: Path) -> None:
    assert count_frames(write(tmp_path, HEADER + frame(1514, 96) + frame(60))) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        HEADER[:23],
        HEADER[:4],
        b"\xa1\xb2\xc3\xd4" + HEADER[4:],
        b"\x0a\x0d\x0d\x0a" + bytes(40),
    ],
)
def test_what_is_no_capture_is_an_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InternalError, match="is no capture"):
        count_frames(write(tmp_path, data))


def test_missing_capture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        count_frames(tmp_path / "nothing")
