"""The medium's encoder: what it writes is what guest/medium.h describes."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import TYPE_CHECKING

import pytest

from ouassister.changeset.medium import BLOCK, MediumInfo, compile_table, write_medium
from ouassister.errors import InternalError, TamperedError
from ouassister.model import (
    Changeset,
    Entry,
    Expected,
    Fence,
    FileStamp,
    Identity,
    Kind,
)

if TYPE_CHECKING:
    from pathlib import Path

SHA256 = hashlib.sha256(b"new").hexdigest()
HERE = Expected(12, 0o100644, 3, -5, 7)
HEADER = struct.Struct("<8sIIQQQ32sQQ32sQQ32s40s40s")
COUNTS = struct.Struct("<IIIIIIQ")
ENTRY_SIZE = 168


def changeset(*entries: Entry, layer_size: int = 1024, **more: object) -> Changeset:
    made = Changeset(
        changeset_id="ab" * 32,
        vm="web1",
        created_at_s=1,
        fence=Fence(FileStamp("save", 1, 2, 3, 4, 5, ""), ()),
        identity=Identity("boot", "machine"),
        changes=(),
        left_out=(),
        entries=entries,
        actions=(),
        lock_paths=(b"/var/lib/dpkg/lock-frontend", b"/var/lib/dpkg/lock"),
        layer_sha256="",
        layer_size=layer_size,
        reboot_needed=False,
        filtered=(),
    )
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def file(path: bytes, **more: object) -> Entry:
    entry = Entry(path, Kind.FILE, HERE, mode=0o644, size=3, sha256=SHA256, offset=512)
    return dataclasses.replace(entry, **more)  # type: ignore[arg-type]


def paths(table: bytes) -> list[bytes]:
    """The entries' paths in the table's order."""
    dirs, entries, xattrs, below, locks, _, strings = COUNTS.unpack_from(table)
    blob = table[-strings:] if strings else b""
    start = COUNTS.size + 8 * dirs
    size = start + ENTRY_SIZE * entries + 16 * xattrs + 48 * below + 8 * locks + strings
    assert size == len(table)
    found = []
    for i in range(entries):
        offset, length = struct.unpack_from("<II", table, start + ENTRY_SIZE * i)
        assert blob[offset + length] == 0
        found.append(blob[offset : offset + length])
    return found


def test_medium_holds_all_parts_where_the_header_says(tmp_path: Path) -> None:
    layer, applier, out = tmp_path / "layer", tmp_path / "applier", tmp_path / "out"
    layer.write_bytes(bytes(512) + b"new".ljust(512, b"\0"))
    applier.write_bytes(b"\x7fELF" + b"x" * 5000)
    change = changeset(file(b"/etc/new"))
    out.write_bytes(b"an older, longer image" * 10_000)
    info = write_medium(change, layer, applier, out)
    image = out.read_bytes()
    header = HEADER.unpack_from(image)
    table = compile_table(change)
    assert info == MediumInfo(2, hashlib.sha256(image[:BLOCK]).hexdigest(), len(image))
    assert len(image) % BLOCK == 0
    assert header[:6] == (b"OUAMEDIA", 1, BLOCK, len(image), BLOCK, 5004)
    assert image[BLOCK : BLOCK + 5004] == applier.read_bytes()
    assert header[6] == hashlib.sha256(applier.read_bytes()).digest()
    assert image[header[7] : header[7] + header[8]] == table
    assert header[9] == hashlib.sha256(table).digest()
    assert image[header[10] : header[10] + header[11]] == layer.read_bytes()
    assert header[12] == bytes.fromhex(change.changeset_id)
    assert header[13].rstrip(b"\0") == b"boot"
    assert header[14].rstrip(b"\0") == b"machine"
    assert not any(image[HEADER.size : BLOCK])


def test_empty_layer_is_written(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(b"")
    (tmp_path / "applier").write_bytes(b"elf")
    info = write_medium(
        changeset(layer_size=0), tmp_path / "layer", tmp_path / "applier", tmp_path / "out"
    )
    assert info.size == (tmp_path / "out").stat().st_size == 3 * BLOCK


def test_layer_of_another_size_is_tampered(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(b"short")
    (tmp_path / "applier").write_bytes(b"elf")
    with pytest.raises(TamperedError, match="5 bytes"):
        write_medium(changeset(), tmp_path / "layer", tmp_path / "applier", tmp_path / "out")


def test_parents_come_first_and_links_last() -> None:
    table = compile_table(
        changeset(
            file(b"/a/hard", kind=Kind.HARDLINK, target=b"/z"),
            file(b"/z"),
            file(b"/a.b"),
            file(b"/a/b"),
            Entry(b"/a", Kind.DIRECTORY, None),
        )
    )
    assert paths(table) == [b"/a", b"/a/b", b"/a.b", b"/z", b"/a/hard"]


def test_same_change_set_gives_the_same_table() -> None:
    entries = [file(b"/b"), file(b"/a", xattrs=(("user.x", b"1"),))]
    assert compile_table(changeset(*entries)) == compile_table(changeset(*entries[::-1]))


def test_hard_link_through_a_hard_link_names_the_file() -> None:
    table = compile_table(
        changeset(
            file(b"/a", kind=Kind.HARDLINK, target=b"/b"),
            file(b"/b", kind=Kind.HARDLINK, target=b"/c"),
            file(b"/c"),
        )
    )
    assert paths(table) == [b"/c", b"/a", b"/b"]
    links = [
        struct.unpack_from("<I", table, COUNTS.size + 8 + ENTRY_SIZE * i + 20)[0] for i in range(3)
    ]
    assert links == [0xFFFFFFFF, 0, 0]


@pytest.mark.parametrize("target", [b"/missing", b"/a"])
def test_hard_link_to_nothing_is_our_defect(target: bytes) -> None:
    with pytest.raises(InternalError):
        compile_table(changeset(file(b"/a", kind=Kind.HARDLINK, target=target)))


def test_package_database_is_late() -> None:
    table = compile_table(
        changeset(file(b"/etc/x"), file(b"/var/lib/dpkg/status"), file(b"/var/lib/dpkg-not/x"))
    )
    late = [table[COUNTS.size + 8 * 3 + ENTRY_SIZE * i + 26] for i in range(3)]
    assert dict(zip(paths(table), late, strict=True)) == {
        b"/etc/x": 0,
        b"/var/lib/dpkg/status": 1,
        b"/var/lib/dpkg-not/x": 0,
    }


def test_what_only_gets_another_time_has_no_attributes_in_the_table() -> None:
    """They stay as they are: the applier refuses any."""
    attributes = (("user.x", b"1"),)
    entry = file(b"/a", offset=0, xattrs=attributes, mtime_ns=1)
    for same in (False, True):
        table = compile_table(changeset(dataclasses.replace(entry, same=same)))
        assert COUNTS.unpack_from(table)[2] == (not same)
        assert table[COUNTS.size + 8 + 27] == same


@pytest.mark.parametrize(
    "entry",
    [
        file(b"/a", uid=1 << 32),
        file(b"/a", mtime_ns=1 << 63),
        file(b"/a", size=-1),
        file(b"/a", expected=Expected(-1, 0, 0, 0, 0)),
    ],
)
def test_field_out_of_range_is_our_defect(entry: Entry) -> None:
    with pytest.raises(InternalError, match="does not fit"):
        compile_table(changeset(entry))


def test_long_identity_is_our_defect(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(b"")
    (tmp_path / "applier").write_bytes(b"elf")
    change = changeset(layer_size=0, identity=Identity("b" * 40, ""))
    with pytest.raises(InternalError, match="longer"):
        write_medium(change, tmp_path / "layer", tmp_path / "applier", tmp_path / "out")
