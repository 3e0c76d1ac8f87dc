"""libvirt's header in front of a QEMU migration stream: domain XML, cookie, format.

::

    magic 16 bytes, version u32, data_len u32, was_running u32, format u32, cookieOffset u32,
    14 unused u32, then data_len bytes: XML, NUL, cookie, NUL, padding; then the stream

Numbers are little-endian on x86-64. The magic says "Part" until the image is whole.

Source: libvirt v9.0.0 and v11.3.0, ``src/qemu/qemu_saveimage.h`` (``virQEMUSaveHeader``),
``src/qemu/qemu_saveimage.c`` (``virQEMUSaveDataWrite``, ``qemuSaveImageReadHeader``).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from ouassister.errors import TruncatedStateError, UnsupportedStateError
from ouassister.state.data import Data, Reader

HEADER: Final = struct.Struct("<16s5I56s")
MAGIC: Final = b"LibvirtQemudSave"
PARTIAL: Final = b"LibvirtQemudPart"
VERSION: Final = 2
# virQEMUSaveFormat, in its order
FORMATS: Final = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
_MAX_DATA: Final = 64 << 20  # libvirt adds 64 KiB to XML and cookie
_MEMORY: Final = re.compile(rb"<memory unit='KiB'>([0-9]{1,15})</memory>")


@dataclass(frozen=True, slots=True)
class LibvirtHeader:
    """What libvirt knew of the domain. ``xml`` and ``cookie`` are as they stand in the file.

    Attributes:
        xml: The domain's XML.
        cookie: libvirt's private state of it, as XML; empty when there is none.
        was_running: Whether the domain ran when it was saved.
        format: One of `FORMATS`.
        stream_start: Where the stream starts in the file.
    """

    xml: bytes
    cookie: bytes
    was_running: bool
    format: str
    stream_start: int

    def memory_bytes(self) -> int:
        """Return the size of memory by the XML.

        Raises:
            UnsupportedStateError: The XML does not tell it.
        """
        match = _MEMORY.search(self.xml)
        if match is None:
            raise UnsupportedStateError(
                "domain XML", HEADER.size, self.xml[:40], "no size of memory is in it"
            )
        return int(match[1]) << 10


def read_header(data: Data, name: str) -> LibvirtHeader:
    """Read the header.

    Raises:
        TruncatedStateError: libvirt did not finish the image, or it ends early.
        UnsupportedStateError: Something in it was never seen before.
    """
    reader = Reader(data, name)
    head = reader.bytes(0, HEADER.size, "libvirt header")
    magic, version, length, running, number, cookie_offset, unused = HEADER.unpack(head)
    if magic == PARTIAL:
        raise TruncatedStateError(f"{name} was never finished: libvirt calls it partial")
    if magic != MAGIC:
        raise UnsupportedStateError("magic", 0, magic)
    if version != VERSION:
        raise UnsupportedStateError("version", 16, version, f"only {VERSION} is known")
    if not 0 < length <= _MAX_DATA:
        raise UnsupportedStateError("data_len", 20, length)
    if running not in (0, 1):
        raise UnsupportedStateError("was_running", 24, running)
    if number >= len(FORMATS):
        raise UnsupportedStateError("format", 28, number)
    if cookie_offset >= length:
        raise UnsupportedStateError("cookieOffset", 32, cookie_offset)
    if unused.strip(b"\0"):
        raise UnsupportedStateError("unused", 36, unused)
    text = reader.bytes(HEADER.size, length, "domain XML")
    cut = cookie_offset or length
    return LibvirtHeader(
        xml=_text(text[:cut], "domain XML", HEADER.size),
        cookie=_text(text[cut:], "cookie", HEADER.size + cut),
        was_running=bool(running),
        format=FORMATS[number],
        stream_start=HEADER.size + length,
    )


def _text(raw: bytes, field: str, offset: int) -> bytes:
    text, _, padding = raw.partition(b"\0")
    if padding.strip(b"\0"):
        raise UnsupportedStateError(field, offset + len(text), padding[:16], "not padding")
    return text
