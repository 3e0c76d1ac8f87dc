"""The way from the save file to the served /proc: what was written is read, nothing else is."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from typing import TYPE_CHECKING

import pytest

from ouassister import codec
from ouassister.errors import InternalError
from ouassister.shadow.events import Event, Outcome
from ouassister.shadow.procfs import record as sysctls
from ouassister.shadow.procfs import snapshot
from ouassister.shadow.procfs.filesystem import ProcFiles
from ouassister.shadow.procfs.snapshot import Node, Tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILE, FOLDER, LINK = stat.S_IFREG | 0o444, stat.S_IFDIR | 0o555, stat.S_IFLNK | 0o777


def tree() -> Tree:
    made = Tree()
    made.folder(b"1", owner=(0, 0))
    made.file(b"1/stat", b"1 (systemd) S\n")
    made.file(b"1/mountinfo", b"the guest's\n")
    made.link(b"1/exe", b"/usr/lib/systemd/systemd\xff")
    made.folder(b"1/ns")
    made.link(b"1/ns/mnt", b"mnt:[4026531841]")
    made.folder(b"1/fd")
    made.link(b"1/fd/3", b"socket:[77]")
    made.link(b"1/fd/4", b"anon_inode:[eventpoll]")
    made.folder(b"sys")
    made.file(b"sys/odd", b"5\n", 0o644)
    made.file(b"meminfo", b"MemTotal: 1 kB\n")
    made.link(b"net", b"self/net")
    return made


def test_tree_is_read_as_written(tmp_path: Path) -> None:
    made = tree()
    assert snapshot.write(tmp_path / "s", made) == (tmp_path / "s").stat().st_size
    assert snapshot.read(tmp_path / "s") == made.nodes


def record(name: bytes, mode: int = FILE, content: bytes = b"") -> bytes:
    return struct.pack("<IIIHI", mode, 0, 0, len(name), len(content)) + name + content


def written(folder: Path, *records: bytes, magic: bytes = b"OUAproc\x01", count: int = -1) -> Path:
    path = folder / "hostile"
    number = len(records) if count < 0 else count
    path.write_bytes(struct.pack("<8sII", magic, number, 0) + b"".join(records))
    return path


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([record(b"../etc")], "is in no folder"),
        ([record(b"a/..", FILE)], "is no path"),
        ([record(b"")], "is no path"),
        ([record(b"/a")], "is in no folder"),
        ([record(b"a\0b")], "is no path"),
        ([record(b"a"), record(b"a")], "is there twice"),
        ([record(b"a/b")], "is in no folder"),
        ([record(b"a"), record(b"a/b")], "is in no folder"),
        ([record(b"dev", stat.S_IFCHR | 0o666)], "is of mode"),
        ([record(b"a")[:-3]], "cut short"),
        ([record(b"a")[:4]], "cut short"),
        ([record(b"a") + b"rest"], "bytes, not"),
    ],
)
def test_hostile_snapshot_is_refused(tmp_path: Path, records: list[bytes], words: str) -> None:
    with pytest.raises(InternalError, match=words):
        snapshot.read(written(tmp_path, *records))


def test_other_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="no such file"):
        snapshot.read(written(tmp_path, magic=b"OUAview\x01"))
    with pytest.raises(InternalError, match="no such file"):
        snapshot.read(written(tmp_path, count=1 << 21))
    (tmp_path / "short").write_bytes(b"OUA")
    with pytest.raises(InternalError, match="3 bytes"):
        snapshot.read(tmp_path / "short")


def test_more_than_can_be_shown_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_BYTES", 64)
    made = Tree()
    made.file(b"small", b"x")
    made.file(b"large", b"x" * 64)
    made.file(b"n" * 4097, b"")
    assert set(made.nodes) == {b"small"}
    assert len(made.left_out) == 2


@pytest.mark.parametrize(
    "name", [b"..", b"sys/../x", b"sys/odd/below", b"sys/odd", b"a\0b", b"no/x"]
)
def test_what_a_guest_names_oddly_is_left_out(tmp_path: Path, name: bytes) -> None:
    made = tree()
    before = dict(made.nodes)
    made.file(name, b"hostile")
    assert made.nodes == before
    assert len(made.left_out) == 1
    snapshot.write(tmp_path / "s", made)
    assert snapshot.read(tmp_path / "s") == before


# --- the file system, with an ordinary folder as the procfs of the own processes ---


class World:
    def __init__(self, folder: Path) -> None:
        own = folder / "4000001"
        own.mkdir()
        for name in ("stat", "mountinfo", "mounts"):
            (own / name).write_text("own\n")
        (own / "fd").mkdir()
        (own / "net").mkdir()
        (own / "cwd").symlink_to("/var/lib")
        (own / "exe").symlink_to("/usr/bin/dpkg (deleted)")
        (folder / "1").mkdir()
        (folder / "1" / "mem").write_text("of the shadow's first process\n")
        self.writes: list[tuple[str, bytes]] = []
        self.real = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.files = ProcFiles(tree().nodes, self.real, lambda *one: self.writes.append(one))

    def mode(self, path: str) -> int:
        return int(self.files.getattr(path)["st_mode"])

    def refuses(self, path: str) -> int | None:
        with pytest.raises(OSError, match=r".") as caught:
            self.files.getattr(path)
        return caught.value.errno


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    os.close(made.real)


def test_listing_has_the_guest_and_the_own_processes(world: World) -> None:
    found = {name: entry["st_mode"] for name, entry, _ in world.files.readdir("/", 0)}
    assert set(found) == {".", "..", "1", "sys", "meminfo", "net", "self", "thread-self", "4000001"}
    assert found["4000001"] == stat.S_IFDIR
    assert all(entry["st_ino"] for _, entry, _ in world.files.readdir("/", 0))
    names = {name for name, _, _ in world.files.readdir("/4000001", 0)}
    assert names == {"stat", "mountinfo", "mounts", "fd", "net", "cwd", "exe"}


def test_guest_is_what_was_rendered(world: World) -> None:
    assert world.mode("/1/stat") == FILE
    assert world.files.read("/1/stat", 4096, 2, 0) == b"(systemd) S\n"
    assert os.fsencode(world.files.readlink("/1/exe")) == b"/usr/lib/systemd/systemd\xff"
    assert world.files.getattr("/1/stat")["st_size"] == 0
    with pytest.raises(OSError, match=r".") as caught:
        world.files.readlink("/1/stat")
    assert caught.value.errno == errno.EINVAL


def test_own_process_is_the_real_one(world: World) -> None:
    assert stat.S_ISDIR(world.mode("/4000001"))
    assert world.mode("/4000001/fd") == LINK
    assert world.files.readlink("/4000001/fd") == "../.own/4000001/fd"
    assert world.files.readlink("/4000001/cwd") == "/var/lib"
    assert world.files.readlink("/4000001/exe") == "../.own/4000001/exe"  # it can be opened
    assert world.files.readlink("/4000001/net") == "../1/net"
    assert stat.S_ISREG(world.mode("/4000001/mountinfo"))
    assert world.files.read("/4000001/mountinfo", 4096, 0, 0) == b"the guest's\n"


def test_what_has_no_path_tells_type_and_number(world: World) -> None:
    namespace = world.files.getattr("/1/ns/mnt:[4026531841]")
    assert (namespace["st_ino"], stat.S_ISREG(namespace["st_mode"])) == (4026531841, True)
    held = world.files.getattr("/1/fd/socket:[77]")
    assert (held["st_ino"], stat.S_ISSOCK(held["st_mode"])) == (77, True)
    assert [name for name, _, _ in world.files.readdir("/1/fd", 0)] == [".", "..", "3", "4"]
    assert world.refuses("/1/fd/socket:[78]") == errno.ENOENT
    assert stat.S_ISREG(world.mode("/1/fd/anon_inode:[eventpoll]"))
    assert world.refuses("/1/fd/anon_inode:[eventfd]") == errno.ENOENT
    with pytest.raises(OSError, match=r".") as caught:
        world.files.open("/1/ns/mnt:[4026531841]", os.O_RDONLY)
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize("path", ["/1/mem", "/4000002", "/4000001/none", "/none", "/4000001/fd/0"])
def test_what_is_not_there_is_not_found(world: World, path: str) -> None:
    assert world.refuses(path) == errno.ENOENT


def test_value_is_taken_and_told(world: World) -> None:
    assert world.files.open("/sys/odd", os.O_WRONLY | os.O_TRUNC) == 0
    assert world.files.truncate("/sys/odd", 0) == 0
    assert world.files.write("/sys/odd", b"37\n", 0, 0) == 3
    assert world.files.write("/sys/odd", b"behind\n", 3, 0) == 7
    assert world.files.read("/sys/odd", 4096, 0, 0) == b"37\n"
    assert world.writes == [("odd", b"37")]


def test_nothing_else_is_written(world: World) -> None:
    for path in ("/meminfo", "/1/stat"):
        with pytest.raises(OSError, match=r".") as caught:
            world.files.open(path, os.O_WRONLY)
        assert caught.value.errno == errno.EACCES
        with pytest.raises(OSError, match=r".") as caught:
            world.files.truncate(path, 0)
        assert caught.value.errno == errno.EACCES
    with pytest.raises(OSError, match=r".") as caught:
        world.files.write("/sys/odd", b"x" * 70000, 0, 0)
    assert caught.value.errno == errno.EINVAL
    assert world.writes == []


def test_node_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Node(FILE, 0, 0).mode = 0  # type: ignore[misc]


# --- what programs write ---


def test_values_are_recorded_in_order_and_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysctls, "_MAX_BYTES", 250)
    wrote = sysctls.recorder(tmp_path / "sysctls")
    for value in range(5):
        wrote("net/ipv4/conf/eth0.7/forwarding", b"%d\n\x1b" % value)
    lines = (tmp_path / "sysctls").read_bytes().splitlines()
    found = [codec.from_value(Event, json.loads(line)) for line in lines]
    assert [event.outcome for event in found] == [Outcome.DEFERRED] * 2 + [Outcome.LOST]
    assert found[1].words == ("sysctl", "-w", "net/ipv4/conf/eth0.7/forwarding=1\\x0a\\x1b")
