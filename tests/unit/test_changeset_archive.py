"""Change sets on disk: what was saved comes back, and nothing else does."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from ouassister import codec
from ouassister.changeset import archive
from ouassister.changeset.extract import Extraction
from ouassister.errors import InternalError, TamperedError, WorkDiskFullError
from ouassister.model import (
    Action,
    Changeset,
    Entry,
    Expected,
    Fence,
    FileStamp,
    Identity,
    Kind,
    LeftOut,
    PackageChange,
)

if TYPE_CHECKING:
    from pathlib import Path

LAYER = b"layer" * 300
STATE = Expected(12, 0o100644, 3, -5, 7)
CONTENT = hashlib.sha256(LAYER[512:515]).hexdigest()
ENTRIES = (
    Entry(b"/a", Kind.DIRECTORY, None, mode=0o755),
    Entry(b"/a/1\xff\n", Kind.FILE, STATE, size=3, sha256=CONTENT, offset=512),
    Entry(b"/a/link", Kind.HARDLINK, None, target=b"/a/1\xff\n"),
    Entry(b"/a-b", Kind.DELETE, STATE, below=((b"/a-b/c", STATE),)),
    Entry(b"/s", Kind.SYMLINK, None, target=b"\x1b[31m"),
)


def extraction(*entries: Entry) -> Extraction:
    digest = hashlib.sha256(LAYER).hexdigest()
    return Extraction(entries or ENTRIES, (b"/run/x",), ("noted",), 3, digest, len(LAYER))


def build(*entries: Entry, **more: Any) -> Changeset:  # noqa: ANN401 - fields of any type
    fields: dict[str, Any] = {
        "vm": "web1",
        "created_at_s": 1,
        "fence": Fence(FileStamp("save", 1, 2, 3, 4, 5, ""), ()),
        "identity": Identity("boot", "machine"),
        "changes": (
            PackageChange("bcc", "amd64", "", "0.16"),
            PackageChange("old", "amd64", "1", ""),
            PackageChange("both", "all", "1", "2"),
        ),
        "left_out": (LeftOut("gone", "404"),),
        "actions": (Action(("systemctl", "daemon-reload")),),
        "lock_paths": (b"/var/lib/dpkg/lock",),
        "reboot_needed": True,
    }
    return archive.build(extraction(*entries), **(fields | more))


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    path = tmp_path / "made.tar"
    path.write_bytes(LAYER)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store" / "changesets"


def test_save_then_load_gives_the_same_record(folder: Path, layer: Path) -> None:
    made = build()
    target = archive.save(made, layer, folder)
    loaded, found = archive.load(folder, made.changeset_id)
    assert loaded == made
    assert found == target / "layer.tar"
    assert found.read_bytes() == LAYER
    archive.verify_layer(loaded, found)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [target, *target.iterdir()]}
    assert modes == {made.changeset_id: 0o500, "manifest.json": 0o400, "layer.tar": 0o400}
    assert [path.name for path in folder.iterdir()] == [made.changeset_id]


def test_id_follows_from_everything(folder: Path) -> None:
    made = build()
    assert made.changeset_id == codec.digest(made, without="changeset_id")
    assert build().changeset_id == made.changeset_id
    assert build(created_at_s=2).changeset_id != made.changeset_id
    assert build(*ENTRIES[:-1]).changeset_id != made.changeset_id


def test_save_twice_keeps_the_first(folder: Path, layer: Path) -> None:
    made = build()
    first = archive.save(made, layer, folder).stat().st_ino
    assert archive.save(made, layer, folder).stat().st_ino == first
    assert len([*folder.iterdir()]) == 1


def test_save_clears_what_a_crash_left(folder: Path, layer: Path) -> None:
    stale = folder / ".partial-crashed"
    stale.mkdir(parents=True)
    (stale / "layer.tar").write_bytes(b"half")
    archive.save(build(), layer, folder)
    assert not stale.exists()


def test_save_under_a_wrong_id_is_refused(folder: Path, layer: Path) -> None:
    with pytest.raises(InternalError, match="does not have the id"):
        archive.save(dataclasses.replace(build(), created_at_s=9), layer, folder)


def test_save_with_another_layer_is_refused_and_leaves_nothing(folder: Path, layer: Path) -> None:
    layer.write_bytes(LAYER[:-1] + b"?")
    with pytest.raises(InternalError, match="is not the layer"):
        archive.save(build(), layer, folder)
    assert not [*folder.iterdir()]


def test_save_follows_no_link_to_a_layer(folder: Path, layer: Path) -> None:
    link = layer.with_name("link")
    link.symlink_to(layer)
    with pytest.raises(OSError, match="symbolic link") as caught:
        archive.save(build(), link, folder)
    assert caught.value.errno == errno.ELOOP


def test_save_on_a_full_disk_is_named_and_leaves_nothing(
    folder: Path, layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkDiskFullError, match="no room for a change set"):
        archive.save(build(), layer, folder)
    assert not [*folder.iterdir()]


def test_load_with_any_one_bit_of_the_manifest_flipped_is_refused(
    folder: Path, layer: Path
) -> None:
    made = build()
    manifest = archive.save(made, layer, folder) / "manifest.json"
    raw = manifest.read_bytes()
    manifest.chmod(0o600)
    for position in range(0, len(raw), 7):
        for bit in (0, 5):
            spoilt = bytearray(raw)
            spoilt[position] ^= 1 << bit
            manifest.write_bytes(spoilt)
            with pytest.raises(TamperedError, match=r"manifest\.json"):
                archive.load(folder, made.changeset_id)


def test_load_of_a_manifest_spelt_otherwise_is_refused(folder: Path, layer: Path) -> None:
    made = build()
    manifest = archive.save(made, layer, folder) / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()), indent=1))
    with pytest.raises(TamperedError, match=r"manifest\.json is not the manifest"):
        archive.load(folder, made.changeset_id)


def test_load_of_one_change_set_under_anothers_id_is_refused(folder: Path, layer: Path) -> None:
    one, two = build(), build(created_at_s=2)
    archive.save(one, layer, folder).rename(folder / two.changeset_id)
    with pytest.raises(TamperedError, match="is not the manifest"):
        archive.load(folder, two.changeset_id)


def test_load_of_a_manifest_that_claims_another_id_is_refused(folder: Path, layer: Path) -> None:
    made = build()
    target = archive.save(made, layer, folder)
    claim = dataclasses.replace(made, vm="other")
    (target / "manifest.json").chmod(0o600)
    (target / "manifest.json").write_bytes(codec.canonical(claim))
    with pytest.raises(TamperedError, match="does not hash to its id"):
        archive.load(folder, made.changeset_id)


def test_load_of_a_huge_or_deep_manifest_is_refused(folder: Path, layer: Path) -> None:
    made = build()
    manifest = archive.save(made, layer, folder) / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_bytes(b"[" * 100_000)
    with pytest.raises(TamperedError, match="is not the manifest"):
        archive.load(folder, made.changeset_id)
    with manifest.open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(TamperedError, match="larger than any manifest"):
        archive.load(folder, made.changeset_id)


@pytest.mark.parametrize("name", ["manifest.json", "layer.tar"])
def test_load_without_a_file_names_it(folder: Path, layer: Path, name: str) -> None:
    made = build()
    target = archive.save(made, layer, folder)
    target.chmod(0o700)
    (target / name).unlink()
    with pytest.raises(TamperedError, match=f"{name} is missing"):
        archive.load(folder, made.changeset_id)


def test_load_with_a_link_for_a_layer_is_refused(folder: Path, layer: Path) -> None:
    made = build()
    target = archive.save(made, layer, folder)
    target.chmod(0o700)
    (target / "layer.tar").unlink()
    (target / "layer.tar").symlink_to(layer)
    with pytest.raises(TamperedError, match=r"layer\.tar is missing"):
        archive.load(folder, made.changeset_id)


@pytest.mark.parametrize("name", ["", "..", "../x", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_load_of_what_is_no_id_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(TamperedError, match="is not the id"):
        archive.load(folder, name)


def test_verify_layer_with_a_bit_flipped_or_cut_names_it(folder: Path, layer: Path) -> None:
    made = build()
    stored = archive.save(made, layer, folder) / "layer.tar"
    stored.chmod(0o600)
    spoilt = bytearray(LAYER)
    spoilt[700] ^= 1
    stored.write_bytes(spoilt)
    with pytest.raises(TamperedError, match=r"layer\.tar has the SHA-256"):
        archive.verify_layer(made, stored)
    stored.write_bytes(LAYER[:-1])
    with pytest.raises(TamperedError, match=r"layer\.tar has 1499 bytes instead of 1500"):
        archive.verify_layer(made, stored)


FILE = ENTRIES[1]
BIG = Entry(b"/b", Kind.FIFO, None, size=4096)
SAME = Entry(b"/b", Kind.FILE, STATE, mode=0o644, mtime_ns=1, size=3, sha256=CONTENT, same=True)


@pytest.mark.parametrize(
    ("entries", "defect"),
    [
        ((Entry(b"relative", Kind.DELETE, STATE),), "is not an absolute, normal path"),
        ((Entry(b"/", Kind.DIRECTORY, STATE),), "is not an absolute, normal path"),
        ((Entry(b"/a/../b", Kind.DELETE, STATE),), "is not an absolute, normal path"),
        ((Entry(b"/a\0b", Kind.DELETE, STATE),), "is not an absolute, normal path"),
        ((Entry(b"/a/", Kind.DELETE, STATE),), "is not an absolute, normal path"),
        ((ENTRIES[3], ENTRIES[0]), "/a is out of order"),
        ((ENTRIES[0], ENTRIES[0]), "/a is out of order"),
        ((ENTRIES[0], ENTRIES[2]), "/a/link links to no earlier entry"),
        ((dataclasses.replace(FILE, offset=1498),), "is outside of the layer"),
        ((dataclasses.replace(FILE, offset=-1),), "is outside of the layer"),
        ((dataclasses.replace(FILE, size=-600),), "is outside of the layer"),
        ((dataclasses.replace(SAME, expected=None),), "changes in more than its time"),
        ((dataclasses.replace(SAME, mtime_ns=-5),), "changes in more than its time"),
        ((dataclasses.replace(SAME, mode=0o640),), "changes in more than its time"),
        ((dataclasses.replace(SAME, size=4),), "changes in more than its time"),
        ((dataclasses.replace(SAME, kind=Kind.SYMLINK),), "changes in more than its time"),
        ((dataclasses.replace(SAME, kind=Kind.FIFO),), "changes in more than its time"),
        ((dataclasses.replace(FILE, holes=1),), "has more holes than bytes"),
        ((dataclasses.replace(FILE, holes=4096),), "has more holes than bytes"),
        ((dataclasses.replace(FILE, holes=-4096),), "has more holes than bytes"),
        ((dataclasses.replace(BIG, holes=4096),), "has holes and no content"),
        ((SAME, Entry(b"/c", Kind.HARDLINK, None, target=b"/b")), "links to no earlier entry"),
    ],
)
def test_entries_that_contradict_each_other_are_refused(
    folder: Path, layer: Path, entries: tuple[Entry, ...], defect: str
) -> None:
    with pytest.raises(InternalError, match=defect):
        build(*entries)
    # The same when somebody with the right hash wrote them.
    draft = dataclasses.replace(build(), entries=entries)
    forged = dataclasses.replace(draft, changeset_id=codec.digest(draft, without="changeset_id"))
    archive.save(forged, layer, folder)
    with pytest.raises(TamperedError, match=defect):
        archive.load(folder, forged.changeset_id)


def test_discard_removes_all_and_may_be_repeated(folder: Path, layer: Path) -> None:
    target = archive.save(build(), layer, folder)
    archive.discard(target)
    archive.discard(target)
    assert not [*folder.iterdir()]


def test_describe_is_safe_for_a_terminal() -> None:
    made = build(vm="we\x1bb", notes=("odd\r\u202e",))
    lines = [*archive.describe(made), *archive.describe_entries(made)]
    assert all(line.isprintable() for line in lines)
    text = "\n".join(lines)
    assert "install 0.16" in text
    assert "remove 1" in text
    assert "1 -> 2" in text
    assert "4 paths written, 1 deleted, 3 bytes" in text
    assert "but for their time" not in text
    assert "needs a reboot" in text
    assert "~ /a/1\\xff\\x0a" in text
    assert "- /a-b" in text
    assert "+ /s -> \\x1b[31m" in text


def test_describe_tells_what_only_gets_another_time() -> None:
    text = "\n".join(archive.describe(build(*ENTRIES[:4], SAME)))
    assert "3 paths written, 1 deleted, 3 bytes" in text
    assert "1 paths as they are but for their time" in text
