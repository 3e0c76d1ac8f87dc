"""libvirt's header, and compressed images that are expanded once."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import shutil
import struct
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.unit.state_samples import (
    COOKIE,
    PAGE,
    XML,
    content,
    libvirt_header,
    mapped_ram,
    plain_stream,
)

from ouassister.errors import (
    HostNotReadyError,
    OUassisterError,
    StateError,
    TruncatedStateError,
    UnsupportedStateError,
    WorkDiskFullError,
)
from ouassister.memory import open_save
from ouassister.model import PhysAddr
from ouassister.state import expand
from ouassister.state.libvirt_save import FORMATS, LibvirtHeader

if TYPE_CHECKING:
    from collections.abc import Callable

STREAM = plain_stream()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ouassister" / "spool"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "save.img"
        path.write_bytes(data)
        return path

    return write


def image(method: str, stream: bytes = STREAM, xml: bytes = XML) -> bytes:
    return libvirt_header(FORMATS.index(method), xml=xml) + COMPRESS[method](stream)


def test_raw_image_is_read_in_place(write: Callable[[bytes], Path]) -> None:
    with open_save(write(libvirt_header(0) + STREAM)) as save:
        assert save.format.name == "libvirt-raw"
        assert save.libvirt is not None
        assert (save.libvirt.xml, save.libvirt.cookie) == (XML, COOKIE)
        assert save.libvirt.was_running
        assert save.libvirt.memory_bytes() == 48 * PAGE
        assert save.memory.read(PhysAddr(7 * PAGE), PAGE) == content(7)
        assert next(iter(save.memory.find(content(8)[:16]))) == 8 * PAGE


def test_image_without_cookie_has_none(write: Callable[[bytes], Path]) -> None:
    with open_save(write(libvirt_header(0, cookie=b"", running=0) + STREAM)) as save:
        assert save.libvirt is not None
        assert (save.libvirt.xml, save.libvirt.cookie) == (XML, b"")
        assert not save.libvirt.was_running


def test_image_that_libvirt_did_not_finish_is_refused(write: Callable[[bytes], Path]) -> None:
    unfinished = libvirt_header(0, magic=b"LibvirtQemudPart") + STREAM
    with pytest.raises(TruncatedStateError, match="never finished"):
        open_save(write(unfinished))


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [
        (16, 1, "version"),
        (16, 3, "version"),
        (16, 2 << 24, "version"),  # written on a big-endian host
        (20, 0, "data_len"),
        (20, 1 << 30, "data_len"),
        (24, 2, "was_running"),
        (28, 7, "format"),
        (28, 6, "format"),  # sparse, but no mapped-ram in the stream
        (32, 1 << 20, "cookieOffset"),
        (32, 10, "cookie"),  # in the middle of the XML: no cookie that ends once
        (88, 1, "unused"),
    ],
)
def test_field_unseen_is_refused_by_name(
    write: Callable[[bytes], Path], at: int, value: int, field: str
) -> None:
    data = bytearray(libvirt_header(0) + STREAM)
    struct.pack_into("<I", data, at, value)
    with pytest.raises(UnsupportedStateError) as caught:
        open_save(write(bytes(data)))
    assert caught.value.field == field


def test_stream_of_another_format_than_said_is_refused(write: Callable[[bytes], Path]) -> None:
    header = libvirt_header(0)
    with pytest.raises(UnsupportedStateError, match="format at offset 0x1c is 'raw'"):
        open_save(write(header + mapped_ram({b"pc.ram": 20 * PAGE}, before=len(header))))


def test_image_cut_in_its_header_is_truncated(write: Callable[[bytes], Path]) -> None:
    whole = libvirt_header(0) + STREAM
    for size in (*range(1, len(libvirt_header(0)) + 8), len(whole) - 1):
        with pytest.raises(TruncatedStateError):
            open_save(write(whole[:size]))


# --- compressed ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", COMPRESS)
def test_compressed_image_leaves_nothing_behind(
    write: Callable[[bytes], Path], cache: Path, method: str
) -> None:
    with open_save(write(image(method))) as save:
        assert save.format.name == f"libvirt-{method}"
        assert list(cache.iterdir()) == []  # nameless while it is open, too
        assert cache.stat().st_mode & 0o777 == 0o700
        assert save.memory.read(PhysAddr(7 * PAGE), PAGE) == content(7)
        assert save.memory.read(PhysAddr(6 * PAGE), PAGE) == bytes(PAGE)


@pytest.mark.parametrize("method", COMPRESS)
def test_spool_of_the_caller_is_found_again(
    write: Callable[[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    spool = tmp_path / "spool"
    path = write(image(method))
    open_save(path, spool=spool).close()
    (kept,) = spool.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.read_bytes() == STREAM

    with monkeypatch.context() as patch:
        patch.setattr(expand, "_write", None)
        with open_save(path, spool=spool) as save:
            assert save.memory.read(PhysAddr(7 * PAGE), PAGE) == content(7)
    os.utime(path, ns=(1, 1))  # another image now
    open_save(path, spool=spool).close()
    assert len(list(spool.iterdir())) == 2


def test_zeros_of_the_stream_are_holes_in_the_spool(
    write: Callable[[bytes], Path], tmp_path: Path
) -> None:
    stream = STREAM.replace(content(7), bytes(PAGE))
    zeros = bytes(4 << 20)
    tail = libvirt_header(1) + gzip.compress(stream + zeros)
    with contextlib.suppress(OUassisterError):  # the stream ends elsewhere
        open_save(write(tail), spool=tmp_path / "spool").close()
    (kept,) = (tmp_path / "spool").iterdir()
    assert kept.stat().st_size == len(stream + zeros)
    assert kept.stat().st_blocks * 512 < len(stream) + (1 << 20)


def test_members_behind_one_another_are_one_stream(write: Callable[[bytes], Path]) -> None:
    for method, pack in COMPRESS.items():
        half = len(STREAM) // 2
        data = libvirt_header(FORMATS.index(method)) + pack(STREAM[:half]) + pack(STREAM[half:])
        with open_save(write(data)) as save:
            assert save.memory.read(PhysAddr(47 * PAGE), PAGE) == content(47)


@pytest.mark.parametrize("method", COMPRESS)
def test_compressed_image_cut_or_spoilt_is_refused(
    write: Callable[[bytes], Path], tmp_path: Path, method: str
) -> None:
    whole = image(method)
    start = len(libvirt_header(1))
    spool = tmp_path / "spool"
    for size in (start, start + 1, (start + len(whole)) // 2, len(whole) - 1):
        with pytest.raises((StateError, UnsupportedStateError)):
            open_save(write(whole[:size]), spool=spool)
    for spoilt in (whole[:start] + b"rubbish" + whole[start:], whole + b"rubbish"):
        with pytest.raises((TruncatedStateError, UnsupportedStateError), match=method):
            open_save(write(spoilt), spool=spool)
    assert list(spool.iterdir()) == []


@pytest.mark.parametrize("method", COMPRESS)
def test_image_that_expands_to_more_than_memory_is_refused(
    write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    monkeypatch.setattr(expand, "_SLACK", 1 << 20)
    spool = tmp_path / "spool"
    bomb = image(method, bytes(8 << 20))
    assert len(bomb) < 1 << 20
    with pytest.raises(UnsupportedStateError, match="expanded size"):
        open_save(write(bomb), spool=spool)
    assert list(spool.iterdir()) == []


@pytest.mark.parametrize("xml", [b"<domain/>", b"<memory unit='KiB'>many</memory>"])
def test_image_whose_memory_is_unknown_is_not_expanded(
    write: Callable[[bytes], Path], xml: bytes
) -> None:
    with pytest.raises(UnsupportedStateError, match="no size of memory"):
        open_save(write(image("gzip", xml=xml)))


def test_full_disk_is_told_before_it_is_full(
    write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(WorkDiskFullError, match="no room"):
        open_save(write(image("gzip")), spool=tmp_path / "spool")
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize("method", ["lzop", "zstd"])
def test_program_that_is_missing_is_named(
    write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostNotReadyError, match=method):
        open_save(write(libvirt_header(FORMATS.index(method)) + b"rubbish"))


def test_default_spool_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the specification
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand.default_spool() == Path("/somewhere/.cache/ouassister/spool")


def test_header_is_hostile_text_until_it_is_checked() -> None:
    header = LibvirtHeader(b"<memory unit='KiB'>" + b"9" * 400 + b"</memory>", b"", False, "raw", 0)
    with pytest.raises(UnsupportedStateError):
        header.memory_bytes()
