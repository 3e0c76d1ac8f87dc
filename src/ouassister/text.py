r"""Bytes of a guest as text, reversibly and safe for a terminal.

Printable UTF-8 stays as it is; a backslash becomes ``\\``; every other byte becomes ``\xNN``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_ESCAPE = re.compile(r"\\(\\|x[0-9a-f]{2})|\\")


def to_text(raw: bytes) -> str:
    r"""Escape guest bytes: ``b"a\\x1b" -> "a\\x1b"``."""
    parts: list[str] = []
    for char in raw.decode("utf-8", "surrogateescape"):
        if char == "\\":
            parts.append("\\\\")
        elif char.isprintable():
            parts.append(char)
        else:
            parts += [f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape")]
    return "".join(parts)


def plain(text: str) -> str:
    """Escape what a terminal would act on; for text that is shown and never read back.

    Unlike `to_text` it leaves backslashes alone: paths inside a message are escaped already.
    """
    return "".join(char if char.isprintable() else f"\\u{{{ord(char):x}}}" for char in text)


def from_text(text: str) -> bytes:
    r"""Undo `to_text`.

    Raises:
        ValueError: A backslash starts neither ``\\`` nor ``\xNN``.
    """

    def decode(match: re.Match[str]) -> str:
        escape = match[1]
        if escape is None:
            raise ValueError(f"stray backslash at {match.start()} in {text!r}")
        if escape == "\\":
            return "\\"
        byte = int(escape[1:], 16)
        return chr(byte) if byte < 0x80 else chr(0xDC00 + byte)

    return _ESCAPE.sub(decode, text).encode("utf-8", "surrogateescape")


def table(rows: Sequence[tuple[str, ...]], indent: str = "") -> str:
    """Align columns for a person."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def size(number: int) -> str:
    """Bytes for a person: 2.1 MB."""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{number} B"
