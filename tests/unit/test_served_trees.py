"""Trees that are handed over and served: what was written is read, nothing else is."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from typing import TYPE_CHECKING, Any

import pytest

from ouassister import codec
from ouassister.errors import InternalError
from ouassister.shadow.events import Event, Outcome, actions_of, read_values
from ouassister.shadow.served import snapshot
from ouassister.shadow.served.snapshot import Node
from ouassister.shadow.sysfs import record
from ouassister.shadow.sysfs.filesystem import SysFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILE, FOLDER, LINK = stat.S_IFREG | 0o444, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777

NODES = [
    Node(0, b"", FOLDER, links=3, number=1),
    Node(0, b"block", FOLDER, links=2, number=2),
    Node(1, b"size", FILE, number=3, size=4096, content=b"8388608\n"),
    Node(1, b"stat", FILE, number=4, size=4096),
    Node(1, b"uevent", stat.S_IFREG | 0o644, 0, 7, number=5, size=4096, content=b"MAJOR=1\n"),
    Node(1, b"remove", stat.S_IFREG | 0o200, number=6, size=4096),
    Node(0, b"odd\xff", LINK, number=7, content=b"block/size"),
    Node(0, b"vda", stat.S_IFBLK | 0o660, 0, 6, 1, 8, 0, os.makedev(254, 1), 5, None),
]


# --- the file ---


def test_tree_is_read_as_written(tmp_path: Path) -> None:
    snapshot.write(tmp_path / "t", snapshot.encode(NODES))
    assert snapshot.read(tmp_path / "t") == NODES


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (Node(0, b"", FILE), "is no name"),
        (Node(0, b"..", FILE), "is no name"),
        (Node(0, b"a/b", FILE), "is no name"),
        (Node(0, b"a\0b", FILE), "is no name"),
        (Node(0, b"x" * 256, FILE), "is no name"),
        (Node(0, b"block", FILE), "is there twice"),
        (Node(2, b"a", FILE), "is in no folder"),
        (Node(8, b"a", FILE), "is in no folder"),
        (Node(99, b"a", FILE), "is in no folder"),
        (Node(0, b"a", 0o444), "is of mode"),
        (Node(0, b"a", FILE, size=-1), "bytes"),
        (Node(0, b"a", LINK), "leads nowhere"),
        (Node(0, b"a", LINK, content=b"a\0b"), "is no name"),
        (Node(0, b"a", FILE, size=1 << 63), "does not fit"),
        (Node(0, b"a", FILE, links=1 << 32), "does not fit"),
    ],
)
def test_what_is_no_tree_is_not_written(node: Node, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        snapshot.encode([*NODES, node])


def test_root_has_to_be_a_folder() -> None:
    with pytest.raises(ValueError, match="no root"):
        snapshot.encode([Node(0, b"", FILE)])
    with pytest.raises(ValueError, match="no such file"):
        snapshot.encode([])


@pytest.mark.parametrize("damage", ["magic", "count", "short", "long", "length", "empty"])
def test_damaged_file_is_an_internal_error(tmp_path: Path, damage: str) -> None:
    raw = bytearray(snapshot.encode(NODES))
    if damage == "magic":
        raw[0] ^= 1
    elif damage == "count":
        raw[8:12] = struct.pack("<I", len(NODES) + 1)
    elif damage == "short":
        del raw[-3:]
    elif damage == "long":
        raw += b"rest"
    elif damage == "length":
        raw[16 + 60 : 16 + 64] = struct.pack("<I", 0x7FFF_FFFF)
    else:
        raw.clear()
    snapshot.write(tmp_path / "t", bytes(raw))
    with pytest.raises(InternalError, match="handed over of t"):
        snapshot.read(tmp_path / "t")


def test_file_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_BYTES", 200)
    with pytest.raises(ValueError, match="bytes"):
        snapshot.encode(NODES)


# --- /sys ---


class Told:
    def __init__(self) -> None:
        self.wrote: list[tuple[str, bytes]] = []
        self.untold: list[str] = []
        self.files = SysFiles(
            NODES[:1], lambda: NODES, lambda *one: self.wrote.append(one), self.untold.append
        )


def refused(call: Callable[..., Any], *arguments: object) -> int | None:
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return None


def test_files_are_as_the_guest_shows_them() -> None:
    files = Told().files
    found = files.getattr("/block/uevent")
    assert (found["st_mode"], found["st_gid"], found["st_ino"]) == (stat.S_IFREG | 0o644, 7, 5)
    assert (found["st_size"], files.getattr("/")["st_nlink"]) == (4096, 3)
    assert [name for name, _, _ in files.readdir("/", 0)] == [
        ".",
        "..",
        "block",
        "odd\udcff",
        "vda",
    ]
    assert files.readlink("/odd\udcff") == "block/size"
    assert files.open("/block/size", os.O_RDONLY) == 0
    assert files.read("/block/size", 4, 2, 0) == b"8860"
    assert files.read("/block/size", 4096, 8, 0) == b""
    for call in (files.getattr, files.readlink):
        assert refused(call, "/nothing") == errno.ENOENT
    assert refused(files.readlink, "/block/size") == errno.EINVAL
    assert refused(files.readdir, "/block/size", 0) == errno.ENOTDIR


def test_file_that_memory_does_not_tell_is_an_error_and_told_once() -> None:
    told = Told()
    for _ in range(2):
        assert refused(told.files.open, "/block/stat", os.O_RDONLY) == errno.EIO
        assert refused(told.files.read, "/block/stat", 4096, 0, 0) == errno.EIO
    assert told.untold == ["/block/stat"]


@pytest.mark.parametrize(
    ("path", "flags"),
    [("/block/size", os.O_WRONLY), ("/block/size", os.O_RDWR), ("/block/remove", os.O_RDONLY)],
)
def test_mode_binds_root_too(path: str, flags: int) -> None:
    assert refused(Told().files.open, path, flags) == errno.EACCES


def test_value_that_is_written_is_told_and_changes_nothing() -> None:
    told = Told()
    assert told.files.open("/block/uevent", os.O_WRONLY) == 0
    assert told.files.truncate("/block/uevent", 0) == 0
    assert told.files.write("/block/uevent", b"add\n", 0, 0) == 4
    assert told.wrote == [("/block/uevent", b"add")]
    assert told.files.read("/block/uevent", 99, 0, 0) == b"MAJOR=1\n"
    assert told.files.write("/block/uevent", b"x" * 5000, 0, 0) == 4096
    assert refused(told.files.truncate, "/block/size", 0) == errno.EACCES


def test_nothing_can_be_made_removed_or_changed() -> None:
    files = Told().files
    assert refused(files.create, "/new", 0o644) == errno.EACCES
    for call, arguments in (
        (files.mkdir, ("/new", 0o755)), (files.mknod, ("/new", stat.S_IFREG, 0)),
        (files.unlink, ("/block/size",)), (files.rmdir, ("/block",)),
        (files.symlink, ("/new", "block")), (files.link, ("/new", "/block/size")),
        (files.rename, ("/block", "/new")),
    ):  # fmt: skip
        assert refused(call, *arguments) == errno.EPERM
    assert refused(files.chmod, "/block/size", 0o777) == errno.EROFS
    assert refused(files.chown, "/block/size", 1, 1) == errno.EROFS


# --- records ---


def test_event_of_a_device_is_one_that_the_guest_triggers(tmp_path: Path) -> None:
    wrote, _ = record.recorders(tmp_path / "records", os.getpid)
    wrote("/devices/pci0/vda/uevent", b"change 0123 A=b")
    wrote("/power/state", b"mem\x1b")
    wrote("/devices/pci0/vda/uevent", b"explode")
    events = read_values(tmp_path / "records")
    assert events[0] == Event(
        Outcome.DEFERRED, ("udevadm", "trigger", "--action=change", "/sys/devices/pci0/vda")
    )
    assert [one.outcome for one in events[1:]] == [Outcome.WITHHELD] * 2
    assert events[1].words == ("write", "/sys/power/state", "mem\\x1b")
    actions, notes = actions_of(events)
    assert [action.argv for action in actions] == [events[0].words]
    assert len(notes) == 2


def test_a_policy_is_loaded_in_the_guest_by_the_call_that_loads_it_here(tmp_path: Path) -> None:
    process = tmp_path / "7"
    process.mkdir()
    (process / "environ").write_bytes(
        b"DPKG_MAINTSCRIPT_PACKAGE=confined\0DPKG_MAINTSCRIPT_NAME=postinst\0"
    )
    called = ("/sbin/apparmor_parser", "-r", "-T", "-W", "/etc/apparmor.d/usr.bin.confined")
    (process / "cmdline").write_bytes("\0".join((*called, "")).encode())
    event = record.loaded(tmp_path, 7)
    words = ("apparmor_parser", *called[1:])
    assert event == Event(Outcome.DEFERRED, words, "confined", "postinst")
    restart = Event(Outcome.DEFERRED, ("systemctl", "restart", "confined.service"))
    reload = Event(Outcome.DEFERRED, ("systemctl", "daemon-reload"))
    actions, _ = actions_of((restart, reload, event, event))
    assert [one.argv for one in actions] == [reload.words, words, restart.words]


@pytest.mark.parametrize(
    "called", ["", "/sbin/apparmor_parser\0-r\0", "rm\0-rf\0/\0", "snapd\0/etc/apparmor.d/x\0"]
)
def test_a_policy_that_no_call_of_the_parser_loads_from_a_file_is_told(
    called: str, tmp_path: Path
) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cmdline").write_text(called)
    event = record.loaded(tmp_path, 7)
    assert event.outcome is Outcome.WITHHELD
    actions, notes = actions_of((event,))
    assert actions == ()
    assert len(notes) == 1
    assert record.loaded(tmp_path, 8).outcome is Outcome.WITHHELD  # it is gone


def test_a_policy_of_any_size_is_taken_whole() -> None:
    writable = stat.S_IFREG | 0o644
    nodes = [
        Node(0, b"", FOLDER), Node(0, b"kernel", FOLDER), Node(1, b"security", FOLDER),
        Node(2, b"apparmor", FOLDER), Node(3, b".replace", writable),
        Node(2, b"lockdown", writable),
    ]  # fmt: skip
    seen: list[tuple[str, bytes]] = []
    files = SysFiles(nodes[:1], lambda: nodes, lambda *one: seen.append(one), lambda _: None)
    policy = b"\4\10\0version" + bytes(200_000)
    path = "/kernel/security/apparmor/.replace"
    assert files.write(path, policy, 0, 0) == len(policy)
    assert files.write("/kernel/security/lockdown", bytes(200_000), 0, 0) == 4096
    assert [name for name, _ in seen] == [path, "/kernel/security/lockdown"]


def test_what_everybody_asks_for_is_answered_without_the_rest() -> None:
    first = [Node(0, b"", FOLDER), Node(0, b"fs", FOLDER), Node(0, b"kernel", FOLDER),
             Node(1, b"cgroup", FOLDER), Node(0, b"odd", FILE)]  # fmt: skip
    whole = [*first, Node(2, b"mm", FOLDER), Node(3, b"procs", FOLDER)]
    asked: list[int] = []

    def load() -> list[Node]:
        asked.append(1)
        return whole

    files = SysFiles(first, load, lambda *_: None, lambda _: None)
    assert files.getattr("/")["st_mode"] == FOLDER
    assert files.getattr("/fs/cgroup")["st_mode"] == FOLDER
    for absent in ("/fs/selinux", "/none"):
        assert refused(files.getattr, absent) == errno.ENOENT
    assert asked == []
    assert refused(files.getattr, "/kernel/none") == errno.ENOENT  # nothing of it was known
    assert asked == [1]
    assert files.getattr("/kernel/mm")["st_mode"] == FOLDER
    assert files.getattr("/odd")["st_mode"] == FILE
    assert refused(files.getattr, "/fs/selinux") == errno.ENOENT
    assert [name for name, _, _ in files.readdir("/fs", 0)] == [".", "..", "cgroup"]
    assert asked == [1]


@pytest.mark.parametrize("names", [False, True])
def test_a_file_and_the_names_in_a_folder_are_told_by_the_whole_alone(names: bool) -> None:
    first = [Node(0, b"", FOLDER), Node(0, b"odd", FILE)]
    asked: list[int] = []

    def load() -> list[Node]:
        asked.append(1)
        return first

    files = SysFiles(first, load, lambda *_: None, lambda _: None)
    if names:
        files.readdir("/", 0)
    else:
        files.getattr("/odd")
    assert asked == [1]


def test_files_that_were_read_in_vain_are_named_up_to_a_bound(tmp_path: Path) -> None:
    _, untold = record.recorders(tmp_path / "records", os.getpid)
    for number in range(100):
        untold(f"/odd{number}")
    lines = (tmp_path / "records").read_bytes().splitlines()
    events = [codec.from_value(Event, json.loads(line)) for line in lines]
    assert len(events) == 65
    assert events[0].words == ("read", "/sys/odd0")
    assert events[-1].outcome is Outcome.LOST


def test_records_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_MAX_BYTES", 500)
    wrote, _ = record.recorders(tmp_path / "records", os.getpid)
    for number in range(100):
        wrote("/power/state", b"%d" % number)
    events = read_values(tmp_path / "records")
    assert events[-1].outcome is Outcome.LOST
    assert len(events) < 10
