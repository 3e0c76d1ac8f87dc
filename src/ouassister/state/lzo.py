"""LZO1X expansion of one page, for dumps; in Python, because no kept library does it.

Source: Linux v6.1 ``Documentation/staging/lzo.rst`` (version 0 of the stream, which liblzo
writes): byte classes, distances and lengths.
"""

from __future__ import annotations

from typing import Final

_END: Final = 16384  # the distance that ends a stream


class LzoError(ValueError):
    """The bytes are no LZO1X stream, or expand to more than was said."""


def expand(source: bytes, limit: int) -> bytes:
    """Expand a stream.

    Args:
        source: The stream, its end marker included.
        limit: Most bytes that may come out.

    Raises:
        LzoError: See there.
    """
    try:
        return _expand(source, limit)
    except IndexError as error:
        raise LzoError("the stream ends early") from error


def _expand(source: bytes, limit: int) -> bytes:
    out = bytearray()
    at = 0
    state = 0  # literals copied by the instruction before, 4 for a long run
    if source[0] > 17:
        state = min(source[0] - 17, 4)
        at = _literals(source, 1, source[0] - 17, out)
    while True:
        if len(out) > limit:
            raise LzoError("expands to too much")
        code = source[at]
        at += 1
        if code < 16 and state == 0:
            length, at = _length(source, at, code, 15)
            at = _literals(source, at, length + 3, out)
            state = 4
            continue
        if code < 16:
            distance = (source[at] << 2) + (code >> 2) + (2049 if state == 4 else 1)
            length = 3 if state == 4 else 2
            state = code & 3
            at += 1
        elif code >= 64:
            distance = (source[at] << 3) + (code >> 2 & 7) + 1
            length = (code >> 5) + 1
            state = code & 3
            at += 1
        else:
            mask = 31 if code >= 32 else 7
            length, at = _length(source, at, code & mask, mask)
            length += 2
            word = source[at] | source[at + 1] << 8
            at += 2
            state = word & 3
            distance = (word >> 2) + 1
            if code < 32:
                distance += _END - 1 + ((code & 8) << 11)
                if distance == _END:
                    if at != len(source) or len(out) > limit:
                        raise LzoError("bytes behind its end")
                    return bytes(out)
        copy(out, distance, length, limit)
        at = _literals(source, at, state, out)


def _length(source: bytes, at: int, value: int, base: int) -> tuple[int, int]:
    """A length that did not fit its bits goes on in bytes, zeros counting 255."""
    if value:
        return value, at
    zeros = at
    while source[at] == 0:
        at += 1
    return base + (at - zeros) * 255 + source[at], at + 1


def _literals(source: bytes, at: int, count: int, out: bytearray) -> int:
    if at + count > len(source):
        raise LzoError("the stream ends early")
    out += source[at : at + count]
    return at + count


def copy(out: bytearray, distance: int, length: int, limit: int) -> None:
    """Append ``length`` bytes that start ``distance`` before the end; they may overlap it.

    Raises:
        LzoError: They start before the beginning, or there are too many.
    """
    start = len(out) - distance
    if start < 0 or distance == 0 or len(out) + length > limit:
        raise LzoError("a copy from before the beginning, or too long")
    while length > 0:
        piece = out[start : start + length]
        out += piece
        start += len(piece)
        length -= len(piece)
