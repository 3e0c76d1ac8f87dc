"""The layer's tar, read back by the standard library."""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
from typing import TYPE_CHECKING

import pytest

from ouassister.changeset.layer import LayerWriter, decimal_seconds
from ouassister.errors import InternalError, UnsupportedGuestError, WorkDiskFullError
from ouassister.model import Entry, Kind

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, *entries: tuple[Entry, bytes]) -> tuple[list[Entry], str, int]:
    written = []
    with LayerWriter(path) as writer:
        for entry, content in entries:
            source = path.with_name("content")
            source.write_bytes(content)
            with source.open("rb", buffering=0) as file:
                written.append(writer.add(entry, file.fileno()))
        digest, size = writer.finish()
    return written, digest, size


def file(path: bytes, content: bytes = b"", **more: object) -> tuple[Entry, bytes]:
    entry = Entry(path, Kind.FILE, None, mode=0o4755, uid=33, gid=65534, size=len(content), **more)  # type: ignore[arg-type]
    return entry, content


def test_layer_file_comes_back_with_every_attribute(tmp_path: Path) -> None:
    path = b"/\xff\n" + b"d" * 250 + b"/" + b"n" * 250
    xattrs = (("user.a=b%", b"\0\xff\n=1"), ("security.capability", bytes(range(20))))
    entries, digest, size = write(
        tmp_path / "l", file(path, b"x" * 513, mtime_ns=-1_500_000_001, xattrs=xattrs)
    )
    raw = (tmp_path / "l").read_bytes()
    assert (hashlib.sha256(raw).hexdigest(), len(raw)) == (digest, size)
    assert raw[entries[0].offset :][:513] == b"x" * 513
    assert entries[0].offset % 512 == 0
    assert entries[0].sha256 == hashlib.sha256(b"x" * 513).hexdigest()
    with tarfile.open(tmp_path / "l") as tar:
        (member,) = tar.getmembers()
    assert b"/" + os.fsencode(member.name) == path
    assert (member.mode, member.uid, member.gid) == (0o4755, 33, 65534)
    headers = {key: os.fsencode(value) for key, value in member.pax_headers.items()}
    assert headers["mtime"] == b"-1.500000001"
    assert headers["SCHILY.xattr.user.a%3Db%25"] == b"\0\xff\n=1"
    assert headers["SCHILY.xattr.security.capability"] == bytes(range(20))


def test_layer_deletion_is_a_whiteout_beside_its_name(tmp_path: Path) -> None:
    entries = [Entry(path, Kind.DELETE, None) for path in (b"/top", b"/a/b/gone")]
    write(tmp_path / "l", *((entry, b"") for entry in entries))
    with tarfile.open(tmp_path / "l") as tar:
        assert [(m.name, m.size, m.isreg()) for m in tar] == [
            (".wh.top", 0, True),
            ("a/b/.wh.gone", 0, True),
        ]


def test_layer_other_kinds_come_back(tmp_path: Path) -> None:
    write(
        tmp_path / "l",
        (Entry(b"/d", Kind.DIRECTORY, None, mode=0o1777), b""),
        file(b"/d/f", b"1"),
        (Entry(b"/d/h", Kind.HARDLINK, None, target=b"/d/f"), b""),
        (Entry(b"/d/s", Kind.SYMLINK, None, mode=0o777, target=b"\xfe" * 300), b""),
        (Entry(b"/p", Kind.FIFO, None), b""),
        (Entry(b"/c", Kind.CHAR, None, major=4095, minor=1048575), b""),
        (Entry(b"/b", Kind.BLOCK, None, major=8, minor=1), b""),
    )
    with tarfile.open(tmp_path / "l") as tar:
        members = {member.name: member for member in tar}
    assert members["d"].isdir()
    assert members["d"].mode == 0o1777
    assert members["d/h"].linkname == "d/f"
    assert os.fsencode(members["d/s"].linkname) == b"\xfe" * 300
    assert members["p"].isfifo()
    assert (members["c"].devmajor, members["c"].devminor) == (4095, 1048575)
    assert members["b"].isblk()


def test_layer_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    same = file(b"/x" * 90, b"abc", mtime_ns=5, xattrs=(("user.x", b"1"),))
    results = [write(tmp_path / name, same)[1:] for name in ("one", "two")]
    assert results[0] == results[1]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("size", [2, 4])
def test_layer_content_of_another_size_is_refused_and_leaves_nothing(
    tmp_path: Path, size: int
) -> None:
    entry = Entry(b"/f", Kind.FILE, None, size=size)
    with pytest.raises(InternalError, match="size of /f changed"):
        write(tmp_path / "l", (entry, b"abc"))
    assert [path.name for path in tmp_path.iterdir()] == ["content"]


def test_layer_file_without_content_is_refused(tmp_path: Path) -> None:
    with LayerWriter(tmp_path / "l") as writer, pytest.raises(InternalError, match="no content"):
        writer.add(Entry(b"/f", Kind.FILE, None))


@pytest.mark.parametrize("kind", [Kind.FILE, Kind.DIRECTORY, Kind.DELETE])
def test_layer_name_that_means_deletion_is_refused(tmp_path: Path, kind: Kind) -> None:
    with (
        pytest.raises(UnsupportedGuestError, match=r"/a/\.wh\.x: a layer cannot carry"),
        LayerWriter(tmp_path / "l") as writer,
    ):
        writer.add(Entry(b"/a/.wh.x", kind, None))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_layer_full_disk_is_named_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(WorkDiskFullError, match="no room for the layer"),
        LayerWriter(tmp_path / "l"),
    ):
        raise OSError(number, "full")
    assert not [*tmp_path.iterdir()]


def test_layer_unfinished_leaves_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(b"before")
    (tmp_path / ".l.partial").write_bytes(b"of a crash")
    with LayerWriter(tmp_path / "l"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["l"]
    assert (tmp_path / "l").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "0"),
        (1, "0.000000001"),
        (-1, "-0.000000001"),
        (10**9, "1"),
        (1_700_000_000_120_000_000, "1700000000.12"),
        (-1_500_000_000, "-1.5"),
    ],
)
def test_decimal_seconds_is_exact(time_ns: int, text: str) -> None:
    assert decimal_seconds(time_ns) == text
