"""Bytes, damaged at random where damage means something."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

_RUN: Final = re.compile(rb"(.)\1{63,}", re.DOTALL)
_EDGE: Final = 8  # bytes of a long run that count as structure
# Lengths, counts and offsets at which arithmetic goes wrong.
NUMBERS: Final = (
    0, 1, 2, 3, 7, 8, 16, 31, 32, 63, 64, 127, 128, 255, 256, 511, 512, 4095, 4096, 4097, 0x7FFF,
    0x8000, 0xFFFF, 0x10000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 32, (1 << 40) - 1,
    1 << 48, (1 << 52) - 4096, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1,
)  # fmt: skip


def structure(data: bytes) -> list[int]:
    """Positions outside of long runs of one byte: what is left are headers and tables."""
    positions: list[int] = []
    start = 0
    for match in _RUN.finditer(data):
        positions += range(start, match.start() + _EDGE)
        start = match.end() - _EDGE
    positions += range(start, len(data))
    return positions


def number(random: Random, width: int) -> bytes:
    """A number that is often a bad one, in either byte order."""
    value = random.choice(NUMBERS) if random.random() < 0.7 else random.getrandbits(8 * width)
    value += random.choice((0, 0, 0, -1, 1))
    order = random.choice(("big", "little"))
    return (value % (1 << 8 * width)).to_bytes(width, "big" if order == "big" else "little")


def damage(random: Random, data: bytes, positions: Sequence[int], others: Sequence[bytes]) -> bytes:
    """One to six changes; ``positions`` are preferred, ``others`` give pieces to splice in."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 6))):
        if not out:
            break
        at = random.choice(positions) if positions and random.random() < 0.9 else 0
        at = at if at and at < len(out) else random.randrange(len(out))
        kind = random.random()
        if kind < 0.25:
            out[at] ^= 1 << random.randrange(8)
        elif kind < 0.35:
            out[at] = random.getrandbits(8)
        elif kind < 0.75:
            width = random.choice((2, 4, 4, 8, 8))
            out[at : at + width] = number(random, width)
        elif kind < 0.83:
            del out[at : at + random.choice((1, 2, 4, 8, 64, 4096))]
        elif kind < 0.91:
            size = random.choice((1, 4, 8, 24, 256))
            out[at:at] = out[at : at + size] * random.choice((1, 1, 2, 16))
        elif kind < 0.96:
            del out[at:]
        else:
            other = random.choice(others)
            start = random.randrange(max(len(other), 1))
            size = random.choice((8, 64, 1024))
            out[at : at + size] = other[start : start + size]
    return bytes(out)
