"""What the applier leaves for a boot ends what was interrupted, and is gone afterwards."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from typing import TYPE_CHECKING

import pytest
from tests.host import boot_unit
from tests.host.applier_world import RESERVED, World, inodes, paths, snapshot
from tests.host.boot_unit import CONTROL, assert_nothing_left, is_left
from tests.host.rollback_lab import META, Applied
from tests.host.test_applier_crash import (
    COMMITTING,
    STAGING,
    Disks,
    assert_clean,
    ends,
    name_of,
)

from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from tests.host.applier_run import Appliers, Bench

    from ouassister.reflect.applier_protocol import ApplierResult

pytestmark = pytest.mark.host


def with_systemd(world: World) -> World:
    """It was booted by systemd, as sd_booted(3) sees it."""
    for name in ("run/systemd/system", "etc/systemd"):
        (world.root / name).mkdir(parents=True)
    return world


class Systemd(Applied):
    """The same guests, with a service manager."""

    def fresh(self) -> tuple[World, Bench]:
        world, bench = super().fresh()
        return with_systemd(world), bench


@pytest.fixture
def lab(appliers: Appliers, tmp_path: Path) -> Systemd:
    return Systemd(appliers, tmp_path)


def at_boot(bench: Bench, root: Path) -> ApplierResult:
    """Do what the unit says."""
    return bench.result(bench.raw(boot_unit.command(root), {}))


def test_killed_at_every_step_then_booted_is_before_or_after_without_the_medium(
    lab: Systemd,
) -> None:
    seen = set()
    for step in lab.steps():
        world, bench = lab.fresh()
        after, before, old = world.after(), snapshot(world.root), inodes(world.root)
        bench.killed_at(step)
        bench.medium.unlink()
        if not is_left(world.root):
            # Nothing is staged yet, or nothing is left to be ended.
            assert name_of(step) in ("boot-leave", "boot-remove", "end"), step
            assert not [path for path in paths(world.root) if RESERVED in path], step
            continue
        result = at_boot(bench, world.root)
        if result.outcome is Outcome.UNDONE:
            assert name_of(step) in (*STAGING, "boot-sync", "boot-leave") or (
                step == "commit-rename:1"
            ), step
            # The times of directories are in the plan, which may not have been written yet.
            assert snapshot(world.root) == before, step
            assert inodes(world.root) == old, step
        else:
            assert result.outcome in (Outcome.APPLIED, Outcome.ALREADY_APPLIED), (step, result)
            assert snapshot(world.root, world.timed) == after, step
        seen.add(result.outcome)
        assert_clean(world.root)
        assert_nothing_left(world.root, step)
    assert seen == {Outcome.UNDONE, Outcome.APPLIED, Outcome.ALREADY_APPLIED}


def test_killed_at_every_step_then_applied_again_leaves_nothing(lab: Systemd) -> None:
    for step in [s for s in lab.steps() if name_of(s).startswith(("boot-", "journal-"))]:
        world, bench = lab.fresh()
        after = world.after()
        bench.killed_at(step)
        assert bench.run().outcome in (Outcome.APPLIED, Outcome.ALREADY_APPLIED), step
        assert snapshot(world.root, world.timed) == after, step
        assert_nothing_left(world.root, step)


def test_killed_while_it_boots_then_booted_again_is_whole(lab: Systemd) -> None:
    for first in ("stage-attributes:5", "commit-rename:6", "marker-rename", "keep-rename:2"):
        for second in ("undo-remove:3", "journal-remove", "commit-rename:4", "marker-rename",
                       "keep-rename:4", "journal-keep", "boot-remove:1"):  # fmt: skip
            world, bench = lab.fresh()
            after, before = world.after(), snapshot(world.root)
            bench.killed_at(first)
            again = boot_unit.command(world.root, lab.appliers.faults)
            bench.raw(again, {"OUA_KILL_AT": second})
            if is_left(world.root):
                at_boot(bench, world.root)
            if first.startswith("stage"):
                assert snapshot(world.root) == before, (first, second)
            else:
                assert snapshot(world.root, world.timed) == after, (first, second)
            assert_clean(world.root)
            assert_nothing_left(world.root, (first, second))


def test_update_that_failed_and_was_killed_while_undone_is_undone_at_boot(lab: Systemd) -> None:
    for name in ("undo-rename:2", "undo-remove:1", "undo-sync"):
        world, bench = lab.fresh()
        before, old = snapshot(world.root, world.timed), inodes(world.root)
        faults = {"OUA_FAIL_AT": f"verify:{errno.EIO}", "OUA_KILL_AT": name}
        assert bench.raw(bench.command(lab.appliers.faults), faults).returncode < 0
        result = at_boot(bench, world.root)
        assert (result.outcome, result.code) == (Outcome.UNDONE, "io"), name
        assert snapshot(world.root, world.timed) == before
        assert inodes(world.root) == old
        assert_nothing_left(world.root, name)


def test_nothing_is_left_where_it_ended_by_itself(lab: Systemd) -> None:
    for step in ("stage-write", "journal-plan", "verify", "marker-write", "keep-rename"):
        world, bench = lab.fresh()
        time = (world.root / "etc/systemd").stat().st_mtime_ns
        bench.run(OUA_FAIL_AT=f"{step}:{errno.EIO}")
        assert_nothing_left(world.root, step)
        assert (world.root / "etc/systemd").stat().st_mtime_ns == time


def test_rollback_killed_at_every_step_then_booted_is_whole(lab: Systemd) -> None:
    for step in lab.back_steps():
        world, back = lab.applied()
        back.killed_at(step)
        if not is_left(world.root):
            assert name_of(step) in ("boot-leave", "boot-remove", "end"), step
            continue
        result = at_boot(back, world.root)
        if result.outcome in (Outcome.ALREADY_APPLIED, Outcome.APPLIED):
            assert name_of(step) in ("boot-leave", "boot-sync", "rollback-begin", "rollback-mark")
            assert snapshot(world.root, world.timed) == lab.after, step
        else:
            assert result.outcome in (Outcome.ROLLED_BACK, Outcome.ALREADY_ROLLED_BACK), step
            assert snapshot(world.root, META) == lab.before, step
            assert inodes(world.root) == lab.inodes, step
        assert_nothing_left(world.root, step)


def test_guest_that_has_no_room_or_no_systemd_goes_without(lab: Systemd) -> None:
    leaves = [step for step in lab.steps() if name_of(step) in ("boot-leave", "boot-sync")]
    assert len(leaves) == 7
    for step in leaves:
        world, bench = lab.fresh()
        after = world.after()
        name, nth = step.split(":")
        done = bench.raw(
            bench.command(lab.appliers.faults), {"OUA_FAIL_AT": f"{name}:{errno.ENOSPC}:{nth}"}
        )
        assert b'"no-boot-unit"' in done.stdout, step
        assert bench.result(done).outcome is Outcome.APPLIED, step
        assert snapshot(world.root, world.timed) == after
        assert_nothing_left(world.root, step)
    for missing in ("run/systemd/system", "etc/systemd"):
        world, bench = lab.fresh()
        shutil.rmtree(world.root / missing)
        bench.killed_at("commit-rename:3")
        assert not is_left(world.root), missing
        assert bench.run().outcome is Outcome.APPLIED


def test_what_others_have_there_stays(lab: Systemd) -> None:
    world, bench = lab.fresh()
    theirs = world.root / CONTROL / "sysinit.target.wants/other.service"
    theirs.parent.mkdir(parents=True)
    theirs.symlink_to("../other.service")
    bench.killed_at("commit-rename:3")
    assert at_boot(bench, world.root).outcome is Outcome.APPLIED
    assert theirs.is_symlink()
    assert not is_left(world.root)
    assert not list((world.root / "var/lib/ouassister").glob("boot-*"))


def test_link_in_the_way_is_not_followed(lab: Systemd, tmp_path: Path) -> None:
    world, bench = lab.fresh()
    (tmp_path / "elsewhere").mkdir()
    (world.root / CONTROL).symlink_to(tmp_path / "elsewhere")
    done = bench.raw(bench.command(), {})
    assert b'"no-boot-unit"' in done.stdout or b'"leftover"' in done.stdout
    assert bench.result(done).outcome is Outcome.APPLIED
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_medium_that_was_left_and_damaged_is_refused_and_the_real_one_goes_on(
    lab: Systemd,
) -> None:
    world, bench = lab.fresh()
    after = world.after()
    bench.killed_at("commit-rename:3")
    left = world.root / "var/lib/ouassister/boot-medium"
    raw = bytearray(left.read_bytes())
    raw[bench.info.applier_blocks * 4096 + 4096 + 100] ^= 1  # the table
    left.write_bytes(raw)
    result = at_boot(bench, world.root)
    assert (result.outcome, result.code) == (Outcome.REFUSED, "medium")
    assert is_left(world.root)
    assert bench.run().outcome is Outcome.APPLIED
    assert snapshot(world.root, world.timed) == after
    assert_nothing_left(world.root)


class SystemdDisks(Disks):
    """Two disks of a guest with a service manager."""

    def world(self, root: Path) -> World:
        return with_systemd(super().world(root))


@pytest.mark.parametrize("durable", ["synced", "root", "boot"])
def test_power_cut_then_booted_is_before_or_after(lab: Systemd, durable: str) -> None:
    disks = SystemdDisks(lab)
    outcomes = set()
    torn = 0
    for step in ends(lab.steps()):
        world, bench = disks.cut(step, durable)
        with disks.mounted(disks.cuts) as root:
            if not is_left(root):
                assert name_of(step) in ("boot-leave", "boot-sync", "boot-remove", "end",
                                         "journal-create", *STAGING), step  # fmt: skip
                continue
            if not boot_unit.starts(root):  # what lies there is not whole
                assert name_of(step) in (*STAGING, "boot-sync", "boot-leave"), step
                torn += 1
                again = dataclasses.replace(bench, root=root)
                assert again.run().outcome is Outcome.APPLIED, step
                assert_clean(root)
                assert_nothing_left(root, step)
                continue
            result = at_boot(bench, root)
            outcomes.add(result.outcome)
            now = {
                p: s
                for p, s in snapshot(root, world.timed).items()
                if not p.endswith(b"/unrelated")
            }
            if result.outcome is Outcome.UNDONE:
                # A rename that no sync followed may be lost with all that came after it.
                assert name_of(step) in (*STAGING, *COMMITTING, "boot-sync", "marker-sync"), step
                assert now.keys() == disks.before.keys(), step
            else:
                assert now == disks.after, step
            assert_clean(root)
            assert_nothing_left(root, step)
        disks.check()
    assert Outcome.APPLIED in outcomes
    # Data that waits for its allocation is not there yet when the names are.
    assert torn or durable != "root"


def test_unit_asks_for_the_applier_as_it_was(lab: Systemd) -> None:
    world, bench = lab.fresh()
    bench.killed_at("commit-rename:3")
    assert boot_unit.starts(world.root)
    program = world.root / "var/lib/ouassister/boot-applier"
    whole = program.read_bytes()
    half = len(whole) // 2
    for torn in (b"", whole[:-1], whole[:half] + bytes(len(whole) - half)):
        program.write_bytes(torn)
        assert not boot_unit.starts(world.root)
    program.write_bytes(whole)
    assert boot_unit.starts(world.root)
