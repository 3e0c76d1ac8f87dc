"""Snappy expansion of one page, for dumps; in Python, because no kept library does it.

Source: google/snappy ``format_description.txt`` (2011-10-05): the length, then literals and
copies with offsets of 11, 16 and 32 bits.
"""

from __future__ import annotations

from ouassister.state.lzo import LzoError, copy


class SnappyError(ValueError):
    """The bytes are no Snappy stream, or expand to more than was said."""


def expand(source: bytes, limit: int) -> bytes:
    """Expand a stream to exactly the length that it tells.

    Raises:
        SnappyError: See there.
    """
    try:
        return _expand(source, limit)
    except (IndexError, LzoError) as error:
        raise SnappyError(str(error)) from error


def _expand(source: bytes, limit: int) -> bytes:
    size, at, shift = 0, 0, 0
    while True:
        byte = source[at]
        at += 1
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift > 28:
            raise SnappyError("its length has too many bytes")
    if size > limit:
        raise SnappyError("expands to too much")
    out = bytearray()
    while at < len(source):
        tag = source[at]
        at += 1
        kind = tag & 3
        if kind == 0:
            length = (tag >> 2) + 1
            if length > 60:
                more = length - 60
                length = int.from_bytes(source[at : at + more], "little") + 1
                at += more
            if at + length > len(source) or len(out) + length > size:
                raise SnappyError("a literal is too long")
            out += source[at : at + length]
            at += length
        elif kind == 1:
            copy(out, (tag >> 5) << 8 | source[at], (tag >> 2 & 7) + 4, size)
            at += 1
        else:
            width = 2 if kind == 2 else 4
            distance = int.from_bytes(source[at : at + width], "little")
            copy(out, distance, (tag >> 2) + 1, size)
            at += width
    if len(out) != size:
        raise SnappyError("the stream ends early")
    return bytes(out)
