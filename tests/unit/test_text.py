"""Bytes of a guest as text: reversible, and nothing in it that a terminal would act on."""

from __future__ import annotations

import random
import unicodedata

import pytest

from ouassister.text import from_text, plain, to_text

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
INVISIBLE = "\u00ad\u200b\u200c\u200d\u2028\u2029\u2060\ufeff\ufff9\U000e0041"
CONTROLS = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0))))
SAMPLES = (
    b"",
    b"/var/lib/dpkg/status",
    b"\\",
    b"\\x41",
    b"\\\\x41\\",
    b"a\x1b]0;title\x07",
    "naïve 日本 😀".encode(),
    b"\xed\xa0\x80",  # UTF-8 of a lone surrogate is no UTF-8
    b"\xf4\x90\x80\x80",  # beyond Unicode
    b"\xc0\xaf",  # overlong
    b"\xff\xfe",
    (BIDI + INVISIBLE + CONTROLS).encode(),
)


def is_safe(text: str) -> bool:
    """Neither control, format, surrogate, private nor line separating characters."""
    return all(
        char == " " or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        for char in text
    )


@pytest.mark.parametrize("raw", SAMPLES)
def test_samples_come_back_and_are_safe(raw: bytes) -> None:
    assert from_text(to_text(raw)) == raw
    assert is_safe(to_text(raw))


def test_every_byte_and_its_pairs_come_back_and_are_safe() -> None:
    for first in range(256):
        raw = bytes((first,))
        assert from_text(to_text(raw)) == raw
        for second in (0x00, 0x1B, 0x41, 0x5C, 0x78, 0x7F, 0x80, 0x9B, 0xA9, 0xBF, 0xC3, 0xFF):
            pair = bytes((first, second))
            text = to_text(pair)
            assert from_text(text) == pair
            assert text.isprintable()


def test_random_bytes_come_back_and_are_safe() -> None:
    chance = random.Random(1)  # noqa: S311 - the same bytes in each run
    pieces = [*SAMPLES, *(bytes((byte,)) for byte in range(256))]
    for _ in range(2000):
        raw = b"".join(chance.choices(pieces, k=6))
        assert from_text(to_text(raw)) == raw
        assert is_safe(to_text(raw))


def test_different_bytes_have_different_texts() -> None:
    assert to_text(b"\x1b") == "\\x1b"
    assert to_text(b"\\x1b") == "\\\\x1b"


def test_printable_text_stays_readable() -> None:
    assert to_text("/srv/Müller's files/日本".encode()) == "/srv/Müller's files/日本"


def test_what_a_terminal_acts_on_is_escaped() -> None:
    for char in BIDI + INVISIBLE + CONTROLS:
        assert char not in to_text(char.encode())
        assert char not in plain(f"a{char}b")
        assert is_safe(plain(f"a{char}b"))


@pytest.mark.parametrize("text", ["\\", "a\\", "\\x", "\\x1", "\\xg0", "\\X41", "\\n", "\\\\\\"])
def test_a_stray_backslash_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="stray backslash"):
        from_text(text)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        from_text("\ud800")


def test_plain_leaves_escaped_paths_alone_and_takes_surrogates() -> None:
    assert plain("/a\\x1b: it's “gone”") == "/a\\x1b: it's “gone”"
    assert plain("\ud800\udcff\x1b[2J") == "\\u{d800}\\u{dcff}\\u{1b}[2J"
