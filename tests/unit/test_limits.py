"""Whose script a process is, where control groups can be made, what is left of a disk."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ouassister.shadow import cgroups, limits, room, scripts
from ouassister.shadow.cgroups import Place
from ouassister.shadow.limits import Limits
from ouassister.shadow.output import CUT, Output
from ouassister.shadow.scripts import (
    Expired,
    Process,
    ScriptWatch,
    UncontainedError,
    find_scripts,
    members,
)
from ouassister.shadow.watch import FULL, TIMED_OUT, UNCONTAINED, Watch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FIRST, SHELL, DPKG, SCRIPT, CHILD, AWAY, OLDER = 10, 11, 12, 20, 21, 22, 13
POSTINST = b"PATH=/bin\0DPKG_MAINTSCRIPT_PACKAGE=bcc\0DPKG_MAINTSCRIPT_NAME=postinst\0"


def table(*more: Process) -> dict[int, Process]:
    """A first process, a shell, dpkg, its script with a child, and what went to the background."""
    every = [
        Process(FIRST, 2, 90, b"S"),
        Process(SHELL, FIRST, 100, b"S"),
        Process(DPKG, SHELL, 110, b"S"),
        Process(OLDER, FIRST, 150, b"S"),
        Process(SCRIPT, DPKG, 200, b"S"),
        Process(CHILD, SCRIPT, 210, b"S"),
        Process(AWAY, FIRST, 211, b"S"),
        Process(3, 2, 300, b"S"),  # not a program's
        *more,
    ]
    return {one.pid: one for one in every}


def environment(*pids: int) -> dict[int, bytes]:
    return dict.fromkeys(pids, POSTINST)


def found(every: dict[int, Process], told: dict[int, bytes]) -> list[tuple[int, str, str]]:
    scripts_ = find_scripts(every, FIRST, lambda pid: told.get(pid, b"PATH=/bin\0"))
    return [(process.pid, caller.package, caller.script) for process, caller in scripts_]


def test_script_is_the_topmost_that_says_so() -> None:
    assert found(table(), environment(SCRIPT, CHILD)) == [(SCRIPT, "bcc", "postinst")]
    assert found(table(), {}) == []


def test_what_a_script_left_behind_is_none_and_neither_are_its_children() -> None:
    child = Process(30, AWAY, 230, b"S")
    assert found(table(child), environment(AWAY, 30)) == []


def test_script_that_has_ended_is_none() -> None:
    ended = Process(SCRIPT, DPKG, 200, b"Z")
    assert found({**table(), SCRIPT: ended}, environment(SCRIPT)) == []


@pytest.mark.parametrize(
    "words",
    [
        b"DPKG_MAINTSCRIPT_PACKAGE=../x\0DPKG_MAINTSCRIPT_NAME=postinst",
        b"DPKG_MAINTSCRIPT_PACKAGE=bcc\0DPKG_MAINTSCRIPT_NAME=\x1b[2J",
        b"DPKG_MAINTSCRIPT_PACKAGE=bcc",
    ],
)
def test_words_that_dpkg_does_not_write_make_no_script(words: bytes) -> None:
    assert found(table(), {SCRIPT: words}) == []


def test_what_belongs_to_a_script_is_below_it_or_left_behind_since() -> None:
    script = table()[SCRIPT]
    grandchild = Process(31, AWAY, 240, b"S")
    gone = Process(32, CHILD, 250, b"Z")
    pids = {one.pid for one in members(table(grandchild, gone), script, FIRST)}
    assert pids == {SCRIPT, CHILD, AWAY, 31}


def test_pid_that_was_used_again_is_not_the_script() -> None:
    every = {**table(), SCRIPT: Process(SCRIPT, DPKG, 999, b"S")}
    script = Process(SCRIPT, DPKG, 200, b"S")
    pids = {one.pid for one in members(every, script, FIRST)}
    assert SCRIPT not in pids


def watching(
    monkeypatch: pytest.MonkeyPatch, limit_s: float, *, stops: bool = True
) -> tuple[ScriptWatch, list[tuple[list[int], signal.Signals]], list[dict[str, object]]]:
    sent: list[tuple[list[int], signal.Signals]] = []
    records: list[dict[str, object]] = []

    def send(targets: Iterable[Process], number: signal.Signals) -> None:
        if pids := sorted(one.pid for one in targets):
            sent.append((pids, number))

    def processes() -> dict[int, Process]:
        state = b"T" if sent and stops else b"R"
        return {pid: replace(one, state=state) for pid, one in table().items()}

    monkeypatch.setattr(scripts, "processes", processes)
    monkeypatch.setattr(scripts, "_environment", lambda pid: environment(SCRIPT).get(pid, b""))
    monkeypatch.setattr(scripts, "send", send)
    return ScriptWatch(limit_s, records.append, 0.1), sent, records


def test_all_are_stopped_before_any_is_killed_and_the_script_goes_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch, sent, records = watching(monkeypatch, 0)
    watch.look(FIRST)
    every = [SCRIPT, CHILD, AWAY]
    others = [CHILD, AWAY]
    assert sent == [
        (every, signal.SIGSTOP),
        (others, signal.SIGKILL),
        ([SCRIPT], signal.SIGKILL),
    ]
    assert watch.expired == [Expired("bcc", "postinst", 0)]
    assert [(one["outcome"], one["package"]) for one in records] == [("expired", "bcc")]


def test_script_within_its_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, sent, records = watching(monkeypatch, 1000)
    watch.look(FIRST)
    watch.look(FIRST)
    assert (sent, records, watch.expired) == ([], [], [])


def test_script_that_does_not_stop_takes_the_program_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripts_, sent, _records = watching(monkeypatch, 0, stops=False)
    with pytest.raises(UncontainedError):
        scripts_.look(FIRST)
    assert [number for _pids, number in sent] == [signal.SIGSTOP]
    monkeypatch.setattr("ouassister.shadow.watch.LOOK_S", -1)
    watch = Watch(1000, scripts_, room.Room((str(tmp_path),)))
    assert watch.look(FIRST)
    assert watch.answer(0)["over"] == UNCONTAINED


def test_program_is_over_when_its_time_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scripts_, _sent, _records = watching(monkeypatch, 1000)
    place = room.Room((str(tmp_path),))
    assert not Watch(1000, scripts_, place).look(FIRST)
    watch = Watch(-1, scripts_, place)
    assert watch.look(FIRST)
    assert (watch.answer(0)["over"], watch.answer(0)["status"]) == (TIMED_OUT, 124)


def disk(monkeypatch: pytest.MonkeyPatch, *, free: int, inodes: int = 500) -> None:
    """1000 MiB, of which so many are free."""
    values = (1 << 20, 1 << 20, 1000, free, free, 1000, inodes, inodes, 0, 255)
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(values))


def test_reserve_of_a_disk_is_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    place = room.Room(("work",))
    for free, inodes, full in ((51, 500, None), (50, 500, "work"), (500, 50, "work")):
        disk(monkeypatch, free=free, inodes=inodes)
        assert place.full() == full, (free, inodes)
    assert room.reserve_bytes(1 << 50) == 512 << 20


def test_disk_is_looked_at_more_often_the_fuller_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    place = room.Room(("work",))
    waits = []
    for free in (900, 200, 51):
        disk(monkeypatch, free=free)
        waits.append(place.next_look_s())
    assert waits == sorted(waits, reverse=True)
    assert len(set(waits)) == 3


def test_write_of_ours_that_finds_no_room_ends_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk(monkeypatch, free=900)
    watch = Watch(1000, ScriptWatch(1000, lambda _record: None), room.Room(("work", "cache")))
    watch.check_room()
    assert watch.over == ""
    watch.check_room(refused=True)
    assert (watch.over, watch.where) == (FULL, "cache")


def test_output_is_kept_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "out"
    one = Output(str(path), 10)
    os.write(one.writer, b"123456")
    assert one.take()
    os.write(one.writer, b"789abcdef")
    one.started()
    one.finish()
    assert path.read_bytes() == b"123456789a" + CUT


def test_output_tells_when_nobody_writes_any_more(tmp_path: Path) -> None:
    one = Output(str(tmp_path / "out"), 10)
    assert one.take()  # nothing yet
    one.started()
    assert not one.take()
    one.finish()


def test_memory_is_half_of_the_hosts_and_never_little(monkeypatch: pytest.MonkeyPatch) -> None:
    for pages, expected in ((1 << 22, 1 << 33), (1 << 10, 1 << 30)):
        monkeypatch.setattr(
            os, "sysconf", lambda name, n=pages: {"SC_PAGE_SIZE": 4096}.get(name, n)
        )
        assert Limits().memory() == expected
    assert Limits(memory_bytes=5).memory() == 5


# --- control groups: the trees are made by hand, since a host has one kind ---


def proc(folder: Path, own: str, *mounts: str) -> Path:
    lines = [
        f"{30 + n} 23 0:{n} {mount} rw - {kind}"
        for n, (mount, kind) in enumerate(one.split(" - ") for one in mounts)
    ]
    (folder / "proc").mkdir()
    (folder / "proc" / "mountinfo").write_text("\n".join(lines) + "\n")
    (folder / "proc" / "cgroup").write_text(own)
    return folder / "proc"


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, content in {"cgroup.procs": "", **files}.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_version_1_has_a_group_below_the_callers(tmp_path: Path) -> None:
    pids = group(tmp_path / "pids" / "job")
    memory = group(tmp_path / "memory" / "job")
    place = proc(
        tmp_path,
        "8:pids:/job\n4:memory:/outer/job\n0::/\n",
        f"/ {tmp_path}/pids - cgroup cgroup rw,pids",
        f"/outer {tmp_path}/memory - cgroup cgroup rw,memory",
        f"/ {tmp_path}/cpu - cgroup cgroup rw,cpu",
    )
    assert cgroups.find(place) == (Place("memory", 1, memory), Place("pids", 1, pids))


def test_version_2_goes_up_to_who_passes_the_controllers_on(tmp_path: Path) -> None:
    top = group(tmp_path / "top", cgroup__subtree_control="pids")
    slice_ = group(top / "slice", cgroup__subtree_control="memory pids", pids__max="9")
    scope = group(slice_ / "scope", cgroup__subtree_control="", memory__max="500", pids__max="max")
    group(scope / "own", cgroup__subtree_control="", memory__max="max", pids__max="700")
    place = proc(tmp_path, "0::/slice/scope/own\n", f"/ {top} - cgroup2 cgroup2 rw")
    assert cgroups.find(place) == (Place("memory", 2, slice_, 500), Place("pids", 2, slice_, 700))


def test_group_that_is_closed_or_not_shown_is_none(tmp_path: Path) -> None:
    closed = group(tmp_path / "closed" / "job")
    closed.chmod(0o555)
    place = proc(
        tmp_path,
        "8:pids:/job\n4:memory:/elsewhere\n0::/../other\n",
        f"/ {tmp_path}/closed - cgroup cgroup rw,pids",
        f"/outer {tmp_path}/memory - cgroup cgroup rw,memory",
        f"/ {tmp_path}/top - cgroup2 cgroup2 rw",
    )
    assert cgroups.find(place) == ()


def test_host_without_the_controllers_has_none(tmp_path: Path) -> None:
    top = group(tmp_path / "top", cgroup__subtree_control="cpu")
    place = proc(tmp_path, "0::/\n", f"/ {top} - cgroup2 cgroup2 rw,nsdelegate")
    assert cgroups.find(place) == ()


def test_group_that_cannot_be_limited_is_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It could be made, but is none: a folder of some other file system."""
    monkeypatch.setattr(cgroups, "find", lambda: (Place("pids", 2, tmp_path),))
    monkeypatch.setattr(limits, "find", cgroups.find)
    monkeypatch.setattr(limits, "_WHO_ENDS_FIRST", str(tmp_path / "oom_score_adj"))
    bounds = limits.Bounds(Limits())
    assert bounds.controllers == ()
    records: list[dict[str, object]] = []
    bounds.tell_reached(records.append)
    bounds.tell_reached(records.append)
    (record,) = records
    assert record["outcome"] == "limited"
    assert "no control group bounds programs in the shadow: pids: [Errno 2]" in str(
        record["detail"]
    )
    assert (tmp_path / "oom_score_adj").read_text() == "1000"
    bounds.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["oom_score_adj"]
