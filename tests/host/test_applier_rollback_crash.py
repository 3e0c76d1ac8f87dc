"""Killed, cut off from power or made to fail on the way back, the applier ends it whole or not."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.host.applier_run import Appliers, Bench
from tests.host.applier_world import World, inodes, snapshot
from tests.host.rollback_lab import META, Applied, Back, assert_nothing_kept, back_of, state
from tests.host.test_applier_crash import ROLLBACK, STAYING, Disks, ends, fsync, name_of
from tests.host.test_applier_hostile import SEED, beside, mutate, seal, table_inside

from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host

MUTATIONS = 200
TURNING = (
    "rollback-rename",
    "rollback-time",
    "undo-directory",
    "rollback-verify",
    "marker-write",
    "marker-rename",
)


@pytest.fixture
def lab(appliers: Appliers, tmp_path: Path) -> Applied:
    return Applied(appliers, tmp_path)


def test_steps_of_the_way_back_are_all_taken(lab: Applied) -> None:
    after = {"marker-sync", "directory-time", "journal-remove", "prune-remove", "end"}
    names = {name_of(step) for step in lab.back_steps()}
    assert names == {*ROLLBACK, *TURNING, *after}


def test_killed_at_every_step_then_run_again_is_taken_back(lab: Applied) -> None:
    for step in lab.back_steps():
        world, back = lab.applied()
        back.killed_at(step)
        if name_of(step) in ("rollback-begin", "rollback-mark"):
            assert snapshot(world.root, world.timed) == lab.after, step
        result = back.run()
        whole = Outcome.ALREADY_ROLLED_BACK if name_of(step) == "end" else Outcome.ROLLED_BACK
        assert result.outcome is whole, (step, result)
        lab.is_as_before(world, step)


def test_failure_on_the_way_is_undone_and_the_update_stays(lab: Applied) -> None:
    for step in [step for step in lab.back_steps() if name_of(step) in TURNING]:
        world, back = lab.applied()
        name, nth = step.split(":")
        result = back.run(OUA_FAIL_AT=f"{name}:{errno.EIO}:{nth}")
        assert (result.outcome, result.code) == (Outcome.UNDONE, "io"), (step, result)
        lab.is_updated(world, step)
        assert back.run().outcome is Outcome.ROLLED_BACK, step
        lab.is_as_before(world, step)


def test_failure_before_the_mark_is_refused(lab: Applied) -> None:
    for name in ("rollback-begin", "rollback-mark"):
        world, back = lab.applied()
        result = back.run(OUA_FAIL_AT=f"{name}:{errno.ENOSPC}")
        assert (result.outcome, result.code) == (Outcome.REFUSED, "space")
        lab.is_updated(world, name)
        assert back.run().outcome is Outcome.ROLLED_BACK


def test_killed_while_it_is_undone_then_run_again_ends_whole(lab: Applied) -> None:
    fault = {"OUA_FAIL_AT": f"rollback-verify:{errno.EIO}"}
    world, back = lab.applied()
    trace = lab.folder / "undo"
    back.run(OUA_TRACE=str(trace), **fault)
    taken = trace.read_text().split()
    undo = taken[taken.index("rollback-verify") + 1 :]
    assert {*STAYING, "commit-directory", "directory-time", "journal-keep"} <= set(undo)
    for position, name in enumerate(undo):
        world, back = lab.applied()
        nth = taken[: taken.index("rollback-verify") + 1 + position].count(name) + 1
        done = back.raw(
            back.command(lab.appliers.faults), {**fault, "OUA_KILL_AT": f"{name}:{nth}"}
        )
        assert done.returncode < 0, (name, nth)
        result = back.run()
        if name == "stay-mark":  # nothing says yet that it failed: back is whole as well
            assert result.outcome is Outcome.ROLLED_BACK
            lab.is_as_before(world, name)
            continue
        assert (result.outcome, result.code) == (Outcome.UNDONE, "io"), (name, nth, result)
        lab.is_updated(world, (name, nth))
        assert back.run().outcome is Outcome.ROLLED_BACK, (name, nth)
        lab.is_as_before(world, (name, nth))


def test_undo_of_the_way_back_that_fails_needs_a_person_and_the_next_run_ends_it(
    lab: Applied,
) -> None:
    world, back = lab.applied()
    fault = f"rollback-verify:{errno.EROFS},stay-rename:{errno.EIO}:0"
    result = back.run(OUA_FAIL_AT=fault)
    assert result.outcome is Outcome.NEEDS_PERSON
    assert back.run().outcome is Outcome.UNDONE
    lab.is_updated(world)


def test_failure_after_the_marker_leaves_work_for_the_next_run(lab: Applied) -> None:
    for name in ("rollback-remove", "prune-remove", "directory-time", "journal-remove"):
        world, back = lab.applied()
        result = back.run(OUA_FAIL_AT=f"{name}:{errno.EIO}:1")
        assert (result.outcome, result.code) == (Outcome.ROLLED_BACK, "leftover"), name
        assert back.run().outcome is Outcome.ROLLED_BACK, name
        lab.is_as_before(world, name)


def test_change_in_the_middle_is_undone_and_the_update_stays(lab: Applied) -> None:
    def fills(world: World) -> None:
        world.put(b"/usr/lib/new/sub/log", b"of a service")

    def replaces(world: World) -> None:
        world.put(b"/usr/bin/other", b"newer", 0o755)
        world.host(b"/usr/bin/other").rename(world.host(b"/usr/bin/tool"))

    def writes(world: World) -> None:
        with world.host(b"/usr/bin/tool").open("ab") as tool:
            tool.write(b"!")

    for change in (fills, replaces, writes):
        world, back = lab.applied()
        with back.stopped_at("rollback-mark") as stopped:
            change(world)
            here = inodes(world.root)
        assert (stopped.result.outcome, stopped.result.code) == (Outcome.UNDONE, "conflict")
        assert inodes(world.root) == here, change


def test_update_whose_cleanup_was_cut_short_is_taken_back(lab: Applied) -> None:
    for step in ("marker-sync", "keep-folder", "keep-rename:3", "directory-time", "journal-keep"):
        world, bench = lab.fresh()
        before, lab.inodes = snapshot(world.root, META), inodes(world.root)
        lab.before = before
        bench.killed_at(step)
        assert back_of(bench).run().outcome is Outcome.ROLLED_BACK, step
        lab.is_as_before(world, step)


class BackDisks(Disks):
    """The same two disks, cut off on the way back."""

    def cut_back(self, step: str, durable: str) -> tuple[World, Back]:
        """Apply, run back to a step, and keep the disks as they are then."""
        for image in self.images.values():
            shutil.copyfile(self.empty, image)
        with self.mounted(self.images) as root:
            world = self.world(root)
            (root / "usr/unrelated").write_bytes(b"")
            (root / "boot/unrelated").write_bytes(b"")
            self.before = snapshot(root)
            bench = Bench.make(self.lab.appliers, world, self.here)
            assert bench.run().outcome is Outcome.APPLIED
            for top in (root, root / "boot"):
                subprocess.run(["sync", "-f", str(top)], check=True)
            back = back_of(bench)
            with back.stopped_at(step) as stopped:
                if durable in ("root", "boot"):
                    fsync(root / "usr/unrelated" if durable == "root" else root / "boot/unrelated")
                for name, image in self.images.items():
                    shutil.copyfile(image, self.cuts[name])
                stopped.process.kill()
        return world, back


@pytest.mark.parametrize("durable", ["synced", "root", "boot"])
def test_power_cut_then_run_again_is_taken_back(lab: Applied, durable: str) -> None:
    """On disk is what was synced; or also all names of one file system."""
    disks = BackDisks(lab)
    for step in ends(lab.back_steps()):
        _world, back = disks.cut_back(step, durable)
        with disks.mounted(disks.cuts) as root:
            back.root = root
            result = back.run()
            assert result.outcome in (Outcome.ROLLED_BACK, Outcome.ALREADY_ROLLED_BACK), (
                step,
                result,
            )
            assert snapshot(root) == disks.before, step
            assert_nothing_kept(root)
        disks.check()


def test_flipped_bit_in_the_kept_journal_is_refused(lab: Applied) -> None:
    world, back = lab.applied()
    (undo,) = state(world).glob("undo-*")
    whole = undo.read_bytes()
    before = inodes(world.root)
    for place in (0, 9, 20, 60, len(whole) // 2, len(whole) - 33, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        undo.write_bytes(flipped)
        result = back.run()
        assert (result.outcome, result.code) == (Outcome.REFUSED, "no-undo"), place
        assert inodes(world.root) == before, place
    undo.write_bytes(whole[:-1])
    assert back.run().code == "no-undo"
    undo.write_bytes(whole)
    assert back.run().outcome is Outcome.ROLLED_BACK


def test_random_tables_never_crash_nor_leave_the_root(lab: Applied) -> None:
    """Hashes put right, so that only the applier's own checks stand between."""
    rng = random.Random(SEED)  # noqa: S311 - not for secrets
    outcomes: dict[str, int] = {}
    back, image = None, b""
    for turn in range(MUTATIONS):
        if back is None:  # the last one was taken back, or began to be: a fresh guest
            _, back = lab.applied()
            image = back.medium.read_bytes()
            folder = back.root.parent
        changed = bytearray(image)
        mutate(rng, changed)
        outside = beside(folder)
        sealed = seal(back, changed) if table_inside(changed) else back
        done = sealed.raw(sealed.command(lab.appliers.asan), {})
        assert done.returncode in (0, 20, 40, 41), (turn, done.returncode, done.stderr.decode())
        result = Bench.result(done)
        assert beside(folder) == outside, turn
        key = f"{result.outcome} {result.code}".strip()
        outcomes[key] = outcomes.get(key, 0) + 1
        if result.outcome is not Outcome.REFUSED:
            back = None
    # The fuzzing reached past the table's checks, not only into them.
    assert outcomes["refused medium"] > MUTATIONS // 4, outcomes
    assert sum(n for key, n in outcomes.items() if key != "refused medium") > 40, outcomes
