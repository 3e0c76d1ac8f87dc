"""Counts frames in a capture of QEMU's filter-dump.

Source: the pcap file format (tcpdump.org, pcap-savefile(5)); QEMU net/dump.c writes little-endian
records with microseconds on little-endian hosts, one write each, unbuffered.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ouassister.errors import InternalError

if TYPE_CHECKING:
    from pathlib import Path

_HEADER: Final = 24
_RECORD: Final = struct.Struct("<IIII")  # seconds, microseconds, captured length, length
_MAGIC: Final = b"\xd4\xc3\xb2\xa1"


def count_frames(capture: Path) -> int:
    """Frames recorded so far.

    Raises:
        InternalError: The file is no capture; counting nothing would prove nothing.
    """
    data = capture.read_bytes()
    if data[:4] != _MAGIC or len(data) < _HEADER:
        raise InternalError(f"{capture} is no capture of QEMU's filter-dump")
    offset, frames = _HEADER, 0
    while offset + _RECORD.size <= len(data):
        captured = _RECORD.unpack_from(data, offset)[2]
        offset += _RECORD.size + captured
        frames += 1
    return frames
