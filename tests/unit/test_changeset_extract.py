"""Extraction from plain directories: marks of the union are made by hand."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from pathlib import Path

import pytest
from tests.conftest import lacking

from ouassister.changeset import walk
from ouassister.changeset.extract import TRUSTED_PREFIX, Extraction, Trees, collect, extract, run
from ouassister.changeset.filter import Filter, Rule
from ouassister.changeset.node import _guest_value
from ouassister.errors import (
    InternalError,
    UnsupportedGuestError,
    UsageError,
    WorkDiskFullError,
)
from ouassister.model import Kind


class Union:
    """An upper and a lower directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.upper = folder / "upper"
        self.lower = folder / "lower"
        self.upper.mkdir()
        self.lower.mkdir()

    def extract(self, **more: object) -> Extraction:
        return extract((Trees(self.upper, self.lower),), self.folder / "layer.tar", **more)  # type: ignore[arg-type]

    def write(self, path: str, content: str = "x") -> Path:
        """Write a file in one of the trees, with its directories."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return file

    def copy_up(self, path: str) -> Path:
        """Copy a lower file as overlayfs does."""
        lower, upper = self.lower / path, self.upper / path
        upper.parent.mkdir(parents=True, exist_ok=True)
        upper.write_bytes(lower.read_bytes())
        status = lower.stat()
        os.utime(upper, ns=(status.st_atime_ns, status.st_mtime_ns))
        return upper


@pytest.fixture
def trees(tmp_path: Path) -> Union:
    return Union(tmp_path)


@pytest.fixture
def marks(trees: Union) -> Union:
    """Union on a file system that has extended attributes."""
    try:
        os.setxattr(trees.upper, "user.probe", b"")
        os.removexattr(trees.upper, "user.probe")
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        lacking("no extended attributes here")
    return trees


def kinds(result: Extraction) -> list[tuple[bytes, Kind]]:
    return [(entry.path, entry.kind) for entry in result.entries]


def test_extract_of_nothing_is_empty(trees: Union) -> None:
    result = trees.extract()
    assert not [*result.entries, *result.filtered, *result.notes]
    assert (trees.folder / "layer.tar").stat().st_size == result.layer_size == 1024


def test_extract_orders_by_components_not_by_bytes(trees: Union) -> None:
    for name in ("a/z", "a-b", "a.c/x", "a!"):
        trees.write(f"upper/{name}")
    paths = [entry.path for entry in trees.extract().entries]
    assert paths == [b"/a", b"/a/z", b"/a!", b"/a-b", b"/a.c", b"/a.c/x"]


def test_extract_expects_the_lower_object(trees: Union) -> None:
    status = trees.write("lower/f", "before").stat()
    trees.write("upper/f", "after")
    (entry,) = trees.extract().entries
    assert entry.expected is not None
    assert (entry.expected.inode, entry.expected.mode) == (status.st_ino, status.st_mode)
    assert (entry.expected.size, entry.expected.ctime_ns) == (6, status.st_ctime_ns)


@pytest.mark.parametrize("change", ["mtime", "mode", "content", "size"])
def test_extract_keeps_a_copy_with_one_change(trees: Union, change: str) -> None:
    trees.write("lower/f", "content")
    copy = trees.copy_up("f")
    assert trees.extract().entries == ()
    status = copy.stat()
    match change:
        case "mtime":
            os.utime(copy, ns=(0, status.st_mtime_ns + 1))
        case "mode":
            copy.chmod(0o4711)
        case "content":
            copy.write_text("Content")
            os.utime(copy, ns=(0, status.st_mtime_ns))
        case "size":
            copy.write_text("contents")
            os.utime(copy, ns=(0, status.st_mtime_ns))
    assert kinds(trees.extract()) == [(b"/f", Kind.FILE)]


def rewritten(trees: Union) -> None:
    """A file and a symbolic link, replaced by their like a second later."""
    for tree, when in ((trees.lower, 10**9 + 5), (trees.upper, 2 * 10**9)):
        trees.write(f"{tree.name}/f", "content")
        (tree / "l").symlink_to("f")
        for name in ("f", "l"):
            os.utime(tree / name, ns=(0, when), follow_symlinks=False)


def test_extract_of_a_rewritten_file_and_link_carries_their_time_alone(trees: Union) -> None:
    rewritten(trees)
    result = trees.extract()
    file, link = result.entries
    assert (file.same, link.same, result.content_bytes, result.layer_size) == (True, True, 0, 1024)
    assert (file.size, file.sha256) == (7, hashlib.sha256(b"content").hexdigest())
    assert file.expected is not None
    assert file.expected.inode == (trees.lower / "f").stat().st_ino
    assert (file.expected.mtime_ns, file.mtime_ns) == (10**9 + 5, 2 * 10**9)


@pytest.mark.parametrize(
    "change", ["content", "size", "mode", "attribute", "link", "lower link", "target", "kind"]
)
def test_extract_of_more_than_a_new_time_carries_all(marks: Union, change: str) -> None:
    rewritten(marks)
    file, link = marks.upper / "f", marks.upper / "l"
    match change:
        case "content":
            file.write_text("Content")
        case "size":
            file.write_text("content ")
        case "mode":
            file.chmod(0o600)
        case "attribute":
            os.setxattr(file, "user.x", b"")
        case "link":
            os.link(file, marks.upper / "g")
        case "lower link":
            os.link(marks.lower / "f", marks.lower / "g")
        case "target":
            link.unlink()
            link.symlink_to("g")
        case "kind":
            file.unlink()
            file.symlink_to("l")
    same = {entry.path: entry.same for entry in marks.extract().entries}
    assert (same[b"/f"], same[b"/l"]) == (change == "target", change != "target")


def test_extract_drops_a_directory_that_only_was_written_to(trees: Union) -> None:
    trees.write("lower/d/old")
    trees.write("upper/d/new")
    assert kinds(trees.extract()) == [(b"/d/new", Kind.FILE)]
    (trees.upper / "d").chmod(0o700)
    assert kinds(trees.extract()) == [(b"/d", Kind.DIRECTORY), (b"/d/new", Kind.FILE)]


def test_extract_new_link_to_an_unchanged_file_carries_both(trees: Union) -> None:
    trees.write("lower/z", "same")
    copy = trees.copy_up("z")
    os.link(copy, trees.upper / "a")
    result = trees.extract()
    assert kinds(result) == [(b"/a", Kind.FILE), (b"/z", Kind.HARDLINK)]
    assert result.entries[1].target == b"/a"


def test_extract_unchanged_links_of_one_file_are_dropped(trees: Union) -> None:
    os.link(trees.write("lower/a"), trees.lower / "b")
    os.link(trees.copy_up("a"), trees.upper / "b")
    assert trees.extract().entries == ()


def test_extract_two_equal_files_made_one_are_carried(trees: Union) -> None:
    for name in ("a", "b"):
        os.utime(trees.write(f"lower/{name}"), ns=(5, 5))
    os.link(trees.copy_up("a"), trees.upper / "b")
    assert kinds(trees.extract()) == [(b"/a", Kind.FILE), (b"/b", Kind.HARDLINK)]


def test_extract_first_name_filtered_makes_the_second_the_file(trees: Union) -> None:
    os.link(trees.write("upper/run/a", "data"), trees.upper / "z")
    result = trees.extract()
    assert kinds(result) == [(b"/z", Kind.FILE)]
    assert result.filtered == (b"/run", b"/run/a")


def test_extract_directory_replaced_lists_what_was_below(trees: Union) -> None:
    trees.write("lower/d/sub/f")
    (trees.upper / "d").symlink_to("elsewhere")
    (entry,) = trees.extract().entries
    assert (entry.kind, entry.target) == (Kind.SYMLINK, b"elsewhere")
    assert [path for path, _ in entry.below] == [b"/d/sub", b"/d/sub/f"]


def test_extract_file_replaced_by_directory_expects_nothing_below(trees: Union) -> None:
    trees.write("lower/d")
    trees.write("upper/d/f")
    directory, file = trees.extract().entries
    assert directory.expected is not None
    assert file.expected is None


def test_extract_opaque_directory_hides_all_levels(marks: Union) -> None:
    for name in ("d/gone", "d/sub/gone", "d/sub/kept"):
        marks.write(f"lower/{name}")
    marks.write("upper/d/sub/kept", "new")
    os.setxattr(marks.upper / "d", "user.overlay.opaque", b"y")
    assert kinds(marks.extract()) == [
        (b"/d/gone", Kind.DELETE),
        (b"/d/sub/gone", Kind.DELETE),
        (b"/d/sub/kept", Kind.FILE),
    ]


def test_extract_whiteout_deletes_what_is_there_and_else_nothing(marks: Union) -> None:
    marks.write("lower/gone")
    for name in ("gone", "never"):
        os.setxattr(marks.write(f"upper/{name}", ""), "user.overlay.whiteout", b"y")
    assert kinds(marks.extract()) == [(b"/gone", Kind.DELETE)]


def test_extract_whiteout_mark_on_a_file_with_content_is_no_whiteout(marks: Union) -> None:
    marks.write("lower/f")
    os.setxattr(marks.write("upper/f", "new"), "user.overlay.whiteout", b"y")
    assert kinds(marks.extract()) == [(b"/f", Kind.FILE)]


def test_extract_overlay_attributes_stay_and_others_travel(marks: Union) -> None:
    file = marks.write("upper/f")
    os.setxattr(file, "user.overlay.origin", b"")
    os.setxattr(file, "user.overlay.overlay.opaque", b"the guest's own")
    os.setxattr(file, "user.other", b"1")
    (entry,) = marks.extract().entries
    assert entry.xattrs == (("user.other", b"1"), ("user.overlay.opaque", b"the guest's own"))


def test_extract_for_a_mount_without_userxattr_leaves_user_attributes_alone(marks: Union) -> None:
    os.setxattr(marks.write("upper/f"), "user.overlay.redirect", b"the guest's own")
    (entry,) = marks.extract(prefix=TRUSTED_PREFIX).entries
    assert entry.xattrs == (("user.overlay.redirect", b"the guest's own"),)


@pytest.mark.parametrize(
    ("mark", "value"), [("redirect", b"/x"), ("metacopy", b""), ("opaque", b"z"), ("new", b"")]
)
def test_extract_mark_not_seen_before_is_refused(marks: Union, mark: str, value: bytes) -> None:
    marks.write("upper/d/f")
    os.setxattr(marks.upper / "d", f"user.overlay.{mark}", value)
    with pytest.raises(UnsupportedGuestError, match=f"overlayfs marked /d with {mark}"):
        marks.extract()
    assert not (marks.folder / "layer.tar").exists()


def test_extract_attribute_name_that_is_not_utf8_is_refused(marks: Union) -> None:
    os.setxattr(marks.write("upper/f"), b"user.\xff", b"")
    with pytest.raises(UnsupportedGuestError, match="has a name that is not UTF-8"):
        marks.extract()


def test_extract_socket_stays_behind(trees: Union, monkeypatch: pytest.MonkeyPatch) -> None:
    (trees.upper / "opt").mkdir()
    monkeypatch.chdir(trees.upper / "opt")  # the address has 108 bytes at most
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
    trees.write("upper/opt/f")
    result = trees.extract()
    assert kinds(result) == [(b"/opt", Kind.DIRECTORY), (b"/opt/f", Kind.FILE)]
    assert result.filtered == (b"/opt/s",)


def test_extract_new_directory_of_filtered_paths_alone_stays_behind(trees: Union) -> None:
    trees.write("upper/opt/a/lock")
    trees.write("upper/opt/b/lock")
    trees.write("upper/opt/b/data")
    (trees.upper / "opt/empty").mkdir()
    result = trees.extract(filters=Filter((Rule(b"/opt/*/lock", "a lock"),)))
    assert kinds(result) == [
        (b"/opt", Kind.DIRECTORY),
        (b"/opt/b", Kind.DIRECTORY),
        (b"/opt/b/data", Kind.FILE),
        (b"/opt/empty", Kind.DIRECTORY),
    ]
    assert result.filtered == (b"/opt/a", b"/opt/a/lock", b"/opt/b/lock")


def test_extract_unchanged_path_below_a_filter_is_not_listed(trees: Union) -> None:
    trees.write("lower/run/f")
    trees.copy_up("run/f")
    assert trees.extract().filtered == ()


def test_extract_more_paths_than_the_limit_is_refused(
    trees: Union, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "ENTRY_LIMIT", 3)
    for number in range(4):
        trees.write(f"upper/{number}")
    with pytest.raises(UnsupportedGuestError, match="more than 3 paths"):
        trees.extract()


def test_extract_of_an_unknown_owner_is_refused(
    trees: Union, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the namespace has no 65534 of its own: then that number is nobody known."""
    monkeypatch.setattr("ouassister.changeset.node._overflow", lambda _: (os.getuid(), False))
    with pytest.raises(InternalError, match="outside of the user namespace"):
        trees.extract()


def test_capability_of_the_namespaces_root_becomes_the_guests() -> None:
    body = bytes(range(16))
    v2 = (0x02000001).to_bytes(4, "little") + body
    v3 = (0x03000001).to_bytes(4, "little") + body
    assert _guest_value("security.capability", v3 + bytes(4)) == v2
    assert _guest_value("security.capability", v2) == v2
    inner = v3 + (100000).to_bytes(4, "little")  # of a container in the guest
    assert _guest_value("security.capability", inner) == inner
    assert _guest_value("user.x", v3 + bytes(4)) == v3 + bytes(4)


def request(trees: Union, **more: object) -> dict[str, object]:
    return {
        "trees": [{"upper": str(trees.upper), "lower": str(trees.lower)}],
        "layer": str(trees.folder / "layer.tar"),
        "record": str(trees.folder / "record.json"),
    } | more


def test_file_systems_stand_where_they_are_mounted(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("root", "store")]
    for folder in folders:
        folder.mkdir()
    root, store = (Union(folder) for folder in folders)
    root.write("upper/z")
    root.write("upper/opt/x")
    root.write("upper/store/covered")
    store.write("upper/people/ann/file", "abc")
    store.write("upper/tmp/file")
    store.write("lower/people/bob/old")
    store.write("upper/people/ann/link")
    (store.upper / "people/ann/again").hardlink_to(store.upper / "people/ann/file")
    places = ((b"/people", b"/store"), (b"/tmp", b"/tmp"))
    trees = (Trees(root.upper, root.lower), Trees(store.upper, store.lower, places))
    result = extract(trees, tmp_path / "layer.tar")
    assert [entry.path for entry in result.entries] == [
        b"/opt",
        b"/opt/x",
        b"/store",
        b"/store/ann",
        b"/store/ann/again",
        b"/store/ann/file",
        b"/store/ann/link",
        b"/store/covered",
        b"/z",
    ]
    assert result.entries[5].target == b"/store/ann/again"
    assert result.filtered == (b"/tmp", b"/tmp/file")


@pytest.mark.parametrize(
    ("places", "path", "guest"),
    [
        (((b"/", b"/"),), b"/a/b", b"/a/b"),
        (((b"/", b"/boot"),), b"/a", b"/boot/a"),
        (((b"/", b"/boot"),), b"/", b"/boot"),
        (((b"/@", b"/"), (b"/@store", b"/store")), b"/@store/ann", b"/store/ann"),
        (((b"/@", b"/"), (b"/@store", b"/store")), b"/@/etc", b"/etc"),
        (((b"/@", b"/"), (b"/@store", b"/store")), b"/@", b"/"),
        (((b"/a", b"/x"),), b"/ab", b"/x"),
    ],
)
def test_path_in_the_guest(
    places: tuple[tuple[bytes, bytes], ...], path: bytes, guest: bytes
) -> None:
    assert Trees(Path(), Path(), places).guest(path) == guest


def test_run_leaves_what_collect_reads(trees: Union) -> None:
    trees.write("upper/f\udcff\n", "abc")
    trees.write("upper/opt/left")
    rules = [["/opt/left", "why"]]
    summary = run(request(trees, extra_rules=rules))
    record = trees.folder / "record.json"
    result = collect(summary, record)
    assert kinds(result) == [(b"/f\xff\n", Kind.FILE)]
    assert result.filtered == (b"/opt", b"/opt/left")
    assert (summary["entries"], summary["filtered"], summary["content_bytes"]) == (1, 2, 3)
    assert (trees.folder / "layer.tar").stat().st_mode & 0o777 == 0o644
    assert record.stat().st_mode & 0o777 == 0o644
    record.write_bytes(record.read_bytes() + b" ")
    with pytest.raises(InternalError, match="is not what the extraction"):
        collect(summary, record)


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ([], "a request has the keys"),
        ({"other": 1}, "a request has the keys"),
        ({}, "the request lacks trees"),
        ({"trees": [{}], "layer": "", "record": ""}, "the request lacks upper"),
        ({"trees": [{"upper": 1, "lower": ""}], "layer": "", "record": ""}, "does not fit"),
        ({"trees": [], "layer": "", "record": "", "extra_rules": [1]}, "does not fit"),
    ],
)
def test_run_with_another_request_is_refused(argument: object, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        run(argument)


def test_run_without_room_for_the_record_leaves_none(
    trees: Union, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if "record" in path.name:
            raise OSError(errno.ENOSPC, "full")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(WorkDiskFullError, match="no room for"):
        run(request(trees))
    assert not [path for path in trees.folder.iterdir() if "record" in path.name]


def test_a_marked_file_is_the_device_node_that_the_shadow_made_it_for(marks: Union) -> None:
    inodes = {}
    for name, mark in (("char", "c 10 229"), ("block", "b 8 1"), ("forged", "c 1 1")):
        file = marks.write(f"upper/{name}")
        os.setxattr(file, "user.ouassister.device", mark.encode())
        if name != "forged":
            inodes[file.stat().st_ino] = mark
    result = marks.extract(devices=inodes)
    found = {e.path: (e.kind, e.major, e.minor, e.size, e.xattrs) for e in result.entries}
    assert found == {
        b"/char": (Kind.CHAR, 10, 229, 0, ()),
        b"/block": (Kind.BLOCK, 8, 1, 0, ()),
        b"/forged": (Kind.FILE, 0, 0, 1, ()),
    }
    assert result.notes == ("/forged has a mark of a device node that the shadow did not make",)
