"""Our expansion of LZO and Snappy pages, against the libraries that QEMU compresses them with."""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import lacking

from ouassister.state import lzo, snappy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.host
PAGE = 4096


def library(name: str) -> ctypes.CDLL:
    path = ctypes.util.find_library(name)
    if path is None:
        lacking(f"lib{name} is not installed ('make deps' installs it)")
    return ctypes.CDLL(path)


def pages() -> Iterator[bytes]:
    """Pages as memory has them: code, text, tables, noise, and patterns with odd periods."""
    for source in (Path(sys.executable).resolve(), Path(__file__)):
        data = source.read_bytes()[: 400 * PAGE]
        for at in range(0, len(data), PAGE):
            yield data[at : at + PAGE].ljust(PAGE, b"\0")
    noise = hashlib.shake_128(b"noise").digest(PAGE)
    yield noise
    yield bytes(PAGE)
    for period in (1, 2, 3, 4, 7, 17, 64, 100, 255, 2048, 2050, 3000):
        yield (noise[:period] * (PAGE // period + 1))[:PAGE]
        yield (bytes(period) + noise[:9]).ljust(PAGE, noise[9:10])


def lzo_with(function: str) -> Callable[[bytes], bytes]:
    compress = getattr(library("lzo2"), function)
    work = ctypes.create_string_buffer(1 << 20)

    def run(page: bytes) -> bytes:
        out = ctypes.create_string_buffer(2 * PAGE)
        size = ctypes.c_size_t(len(out))
        assert compress(page, ctypes.c_size_t(len(page)), out, ctypes.byref(size), work) == 0
        return out.raw[: size.value]

    return run


@pytest.mark.parametrize("function", ["lzo1x_1_compress", "lzo1x_999_compress"])
def test_lzo_pages_are_expanded(function: str) -> None:
    compress = lzo_with(function)
    for page in pages():
        assert lzo.expand(compress(page), PAGE) == page


def test_snappy_pages_are_expanded() -> None:
    compress = library("snappy").snappy_compress
    for page in pages():
        out = ctypes.create_string_buffer(2 * PAGE)
        size = ctypes.c_size_t(len(out))
        assert compress(page, ctypes.c_size_t(PAGE), out, ctypes.byref(size)) == 0
        assert snappy.expand(out.raw[: size.value], PAGE) == page
