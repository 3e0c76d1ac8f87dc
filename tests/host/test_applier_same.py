"""What the guest has but for its time keeps its inode, and gets that time wholly or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need
from tests.host.applier_run import Appliers, Bench, mounted, traced, wait_until_gone
from tests.host.applier_world import NS, RESERVED, World, inodes, snapshot
from tests.host.rollback_lab import back_of

from ouassister.model import Kind
from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.host

FILE, LINK, LATE = b"/usr/bin/same", b"/usr/lib/same-link", b"/var/lib/dpkg/info/same.list"


def small(root: Path) -> World:
    """A change set that only sets times."""
    root.mkdir(parents=True)
    world = World.make(root)
    world.put(FILE, b"a program", 0o4755)
    world.put(LATE, b"/.\n")
    world.host(LINK).parent.mkdir()
    world.host(LINK).symlink_to("nowhere")
    for path in (FILE, LINK, LATE):
        world.same(path)
    return world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return small(tmp_path / "root")


def _state(world: World) -> list[str]:
    return sorted(path.name for path in world.host(b"/var/lib/ouassister").iterdir())


def test_inode_stays_and_nothing_is_staged_or_kept(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    after, before = world.after(), inodes(world.root)
    bench = Bench.make(appliers, world, tmp_path)
    with world.host(FILE).open("rb") as running:
        result = bench.run()
        assert (result.outcome, result.files, result.size_bytes) == (Outcome.APPLIED, 3, 0)
        assert running.read() == b"a program"
        assert os.fstat(running.fileno()).st_ino == world.host(FILE).stat().st_ino
    assert snapshot(world.root) == after
    assert {p: i[0] for p, i in inodes(world.root).items()} == {p: i[0] for p, i in before.items()}
    assert [name.partition("-")[0] for name in _state(world)] == [
        "applied",
        "attestation.json",
        "lock",
        "undo",
    ]
    back = back_of(bench)
    assert back.run().outcome is Outcome.ROLLED_BACK
    assert inodes(world.root) == before
    assert _state(world) == ["applied", "attestation.json", "lock"]


def _appends(world: World) -> None:
    with world.host(FILE).open("ab") as file:
        file.write(b"!")


def _rewrites_with_the_old_time(world: World) -> None:
    status = world.host(FILE).stat()
    world.host(FILE).write_bytes(b"A PROGRAM")
    os.utime(world.host(FILE), ns=(status.st_atime_ns, status.st_mtime_ns))


def _replaces_with_a_twin(world: World) -> None:
    status = world.host(FILE).stat()
    world.host(FILE).rename(world.host(b"/usr/bin/twin"))
    world.put(FILE, b"a program", 0o4755)
    os.utime(world.host(FILE), ns=(status.st_atime_ns, status.st_mtime_ns))


def _links(world: World) -> None:
    os.link(world.host(FILE), world.host(b"/usr/bin/other"))


def _chmods(world: World) -> None:
    world.host(FILE).chmod(0o755)


def _removes(world: World) -> None:
    world.host(FILE).unlink()


CHANGES = [_appends, _rewrites_with_the_old_time, _replaces_with_a_twin, _links, _chmods, _removes]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_file_is_refused(
    appliers: Appliers, world: World, tmp_path: Path, change: Callable[[World], None]
) -> None:
    bench = Bench.make(appliers, world, tmp_path)
    change(world)
    before = inodes(world.root)
    result = bench.run()
    assert (result.outcome, result.code, result.path) == (Outcome.REFUSED, "conflict", FILE)
    assert inodes(world.root) == before


def test_file_with_another_name_is_refused(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    """The host never says so of one: in place, the other name would change with it."""
    os.link(world.host(FILE), world.host(b"/usr/bin/other"))
    world.entries.clear()
    world.same(FILE)
    result = Bench.make(appliers, world, tmp_path).run()
    assert (result.outcome, result.code, result.path) == (Outcome.REFUSED, "conflict", FILE)
    assert "another name" in result.reason


@pytest.mark.parametrize("change", CHANGES)
def test_file_that_changes_after_the_check_is_left_to_the_guest(
    appliers: Appliers, world: World, tmp_path: Path, change: Callable[[World], None]
) -> None:
    """Before its time was set, and after."""
    for number, step in enumerate(("stage-sync", "verify")):
        world = small(tmp_path / f"{number}")
        old = inodes(world.root)
        bench = Bench.make(appliers, world, tmp_path, number + 1)
        with bench.stopped_at(step) as stopped:
            change(world)
            there = inodes(world.root)
        result = stopped.result
        if step == "verify" and change in (_links, _rewrites_with_the_old_time):
            # The same inode, size and time: in place, nothing of the guest's is lost.
            assert result.outcome is Outcome.APPLIED
            assert world.host(FILE).stat().st_size == len(b"a program")
            continue
        assert (result.outcome, result.code) == (Outcome.UNDONE, "conflict"), (step, result)
        assert result.path == FILE
        here = inodes(world.root)
        wanted = {**there, LINK: old[LINK], LATE: old[LATE]}
        if change is _chmods:
            wanted[FILE] = old[FILE]
        assert here == wanted, step


def test_killed_at_every_step_then_run_again_is_applied(appliers: Appliers, tmp_path: Path) -> None:
    """The time alone is proof that the commit began: forward it goes, without staging again."""
    trace = tmp_path / "trace"
    first = small(tmp_path / "first")
    for step in Bench.make(appliers, first, tmp_path).steps(trace):
        world = small(tmp_path / step)
        after = world.after()
        bench = Bench.make(appliers, world, tmp_path)
        bench.killed_at(step)
        result = bench.run(OUA_TRACE=str(trace))
        assert result.outcome in (Outcome.APPLIED, Outcome.ALREADY_APPLIED), (step, result)
        assert snapshot(world.root) == after, step
        taken = {name.partition(":")[0] for name in traced(trace)} if trace.exists() else set()
        if step in ("commit-time:2", "commit-time:3", "verify:1", "marker-write:1"):
            assert "journal-create" not in taken, step
        assert bench.run().outcome is Outcome.ALREADY_APPLIED
        assert not any(RESERVED in path for path in inodes(world.root))


def test_kill_then_writing_is_undone(appliers: Appliers, tmp_path: Path) -> None:
    for place in ("commit-time:1", "commit-time:3"):
        world = small(tmp_path / place)
        world.put(b"/usr/bin/tool", b"old")
        world.add(b"/usr/bin/added", Kind.FILE, b"new")
        old = inodes(world.root)
        bench = Bench.make(appliers, world, tmp_path)
        bench.killed_at(place)
        _appends(world)
        there = inodes(world.root)
        result = bench.run()
        assert (result.outcome, result.code) == (Outcome.UNDONE, "conflict"), (place, result)
        assert inodes(world.root) == {**old, FILE: there[FILE]}, place


def test_failed_rollback_leaves_the_new_times(appliers: Appliers, tmp_path: Path) -> None:
    for name in ("rollback-time:2", "rollback-verify:1"):
        world = small(tmp_path / name)
        after = world.after()
        bench = Bench.make(appliers, world, tmp_path)
        assert bench.run().outcome is Outcome.APPLIED
        step, nth = name.split(":")
        result = back_of(bench).run(OUA_FAIL_AT=f"{step}:{errno.EIO}:{nth}")
        assert (result.outcome, result.code) == (Outcome.UNDONE, "io"), name
        assert snapshot(world.root) == after, name


def test_content_that_changed_under_its_time_stays_when_the_update_is_taken_back(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    """Only the time goes back: the content is nobody's but the guest's, so it is not hashed."""
    bench = Bench.make(appliers, world, tmp_path)
    old = inodes(world.root)
    assert bench.run().outcome is Outcome.APPLIED
    _rewrites_with_the_old_time(world)
    assert back_of(bench).run().outcome is Outcome.ROLLED_BACK
    assert inodes(world.root) == old
    assert world.host(FILE).read_bytes() == b"A PROGRAM"


def test_change_while_it_is_taken_back_keeps_the_update(appliers: Appliers, tmp_path: Path) -> None:
    for step in ("rollback-time:1", "rollback-verify"):
        world = small(tmp_path / step)
        bench = Bench.make(appliers, world, tmp_path)
        after = world.after()
        assert bench.run().outcome is Outcome.APPLIED
        with back_of(bench).stopped_at(step) as stopped:
            _appends(world)
        result = stopped.result
        assert (result.outcome, result.code, result.path) == (Outcome.UNDONE, "conflict", FILE)
        here = snapshot(world.root)
        assert {p: s for p, s in here.items() if p != FILE} == {
            p: s for p, s in after.items() if p != FILE
        }


def test_file_system_of_whole_seconds(appliers: Appliers, tmp_path: Path) -> None:
    """Old and new time may be the same there; nothing takes one for the other."""
    need("mkfs.ext4")
    image = tmp_path / "small.img"
    for kill in ("", "commit-time:2", "verify"):
        with image.open("wb") as file:
            file.truncate(16 << 20)
        make = ["mkfs.ext4", "-q", "-I", "128", "-F", str(image)]
        subprocess.run(make, check=True, capture_output=True)
        with mounted(tmp_path, "-o", "loop", str(image)) as mount:
            world = small(mount / "root")
            second = world.host(FILE).stat().st_mtime_ns
            assert second % NS == 0, "the file system keeps more than seconds"
            world.entries.clear()
            world.add(FILE, Kind.FILE, b"a program", 0o4755, same=True, mtime_ns=second + 5)
            world.same(LINK)
            old = inodes(world.root)
            bench = Bench.make(appliers, world, tmp_path)
            if kill:
                bench.killed_at(kill)
            result = bench.run()
            assert result.outcome is Outcome.APPLIED, (kill, result)
            assert world.host(FILE).stat().st_mtime_ns == second
            entry = world.entries[1]
            assert world.host(LINK).lstat().st_mtime_ns == entry.mtime_ns // NS * NS
            assert back_of(bench).run().outcome is Outcome.ROLLED_BACK
            assert inodes(world.root) == old
        wait_until_gone(image)
