"""Killed, cut off from power or made to fail at each step, the applier ends whole or undone."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need
from tests.host.applier_run import Appliers, Bench, mounted, wait_until_gone
from tests.host.applier_world import (
    RESERVED,
    SAME_LATE,
    World,
    everything,
    inodes,
    paths,
    snapshot,
)

from ouassister.model import Kind
from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.host

STAGING = (
    "journal-create",
    "stage-create",
    "stage-write",
    "stage-attributes",
    "stage-directory",
    "journal-plan",
    "stage-sync",
)
COMMITTING = ("commit-rename", "commit-directory", "commit-time", "verify", "attest-write",
              "marker-write", "marker-rename")  # fmt: skip
AFTER_MARKER = (
    "attest-rename",
    "marker-sync",
    "keep-folder",
    "keep-rename",
    "directory-time",
    "journal-keep",
    "end",
)
DROPPING = ("cleanup-remove", "prune-remove")
UNDOING = ("undo-mark", "undo-rename", "undo-directory", "undo-time", "undo-remove",
           "directory-time", "undo-sync", "journal-remove")  # fmt: skip
# Of test_applier_rollback.py.
ROLLBACK = ("rollback-begin", "rollback-mark", "rollback-rename", "rollback-time",
            "rollback-verify", "rollback-remove")  # fmt: skip
STAYING = ("stay-mark", "stay-rename", "stay-time", "stay-sync")


class Lab:
    """Makes the same world again and again."""

    def __init__(self, appliers: Appliers, folder: Path) -> None:
        self.appliers = appliers
        self.folder = folder
        self.count = 0

    def fresh(self) -> tuple[World, Bench]:
        shutil.rmtree(self.folder / f"{self.count}", ignore_errors=True)
        self.count += 1
        here = self.folder / f"{self.count}"
        (here / "root").mkdir(parents=True)
        world = everything(World.make(here / "root"))
        return world, Bench.make(self.appliers, world, here)

    def steps(self) -> list[str]:
        _, bench = self.fresh()
        return bench.steps(self.folder / "trace")


@pytest.fixture
def lab(appliers: Appliers, tmp_path: Path) -> Lab:
    return Lab(appliers, tmp_path)


def name_of(step: str) -> str:
    return step.partition(":")[0]


def ends(steps: list[str]) -> list[str]:
    """The first and the last time of each step."""
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for step in steps:
        first.setdefault(name_of(step), step)
        last[name_of(step)] = step
    return list(dict.fromkeys([*first.values(), *last.values()]))


def only_reserved_names_are_new(before: set[bytes], now: set[bytes]) -> bool:
    return before <= now and all(b"/" + RESERVED in path for path in now - before)


def assert_clean(root: Path) -> None:
    """No reserved name and no journal is left, but for the folders of old files."""
    assert not [path for path in paths(root) if RESERVED in path]
    assert not list((root / "var/lib/ouassister").glob("journal-*"))


def test_every_step_of_success_is_listed(lab: Lab) -> None:
    listed = subprocess.run(
        [lab.appliers.faults, "steps"], capture_output=True, text=True, check=True
    ).stdout.split()
    boot = {"boot-leave", "boot-sync", "boot-remove"}  # of test_applier_boot.py
    known = {*boot, *STAGING, *COMMITTING, *AFTER_MARKER, *DROPPING, *UNDOING, *ROLLBACK, *STAYING}
    assert set(listed) == known
    assert {name_of(step) for step in lab.steps()} == {*STAGING, *COMMITTING, *AFTER_MARKER}


def test_shipped_program_has_no_faults(appliers: Appliers) -> None:
    assert b"OUA_" not in appliers.shipped.read_bytes()
    assert b"OUA_KILL_AT" in appliers.faults.read_bytes()
    assert subprocess.run([appliers.shipped, "steps"], capture_output=True).returncode == 2


def test_killed_at_every_step_then_run_again_is_applied(lab: Lab) -> None:
    for step in lab.steps():
        world, bench = lab.fresh()
        after, before, old = world.after(), set(paths(world.root)), snapshot(world.root)
        old_inodes = inodes(world.root)
        bench.killed_at(step)
        if name_of(step) in STAGING or step == "commit-rename:1":
            assert only_reserved_names_are_new(before, set(paths(world.root))), step
            here = snapshot(world.root)
            assert {path: here[path] for path in old} == old, step
            now = inodes(world.root)
            assert {path: now[path] for path in old_inodes} == old_inodes, step
        result = bench.run()
        whole = Outcome.ALREADY_APPLIED if name_of(step) == "end" else Outcome.APPLIED
        assert result.outcome is whole, (step, result)
        assert snapshot(world.root, world.timed) == after, step
        assert_clean(world.root)
        assert bench.run().outcome is Outcome.ALREADY_APPLIED, step


def test_killed_twice_then_run_again_is_applied(lab: Lab) -> None:
    for first in (
        "stage-attributes:5",
        "stage-sync",
        "commit-rename:6",
        "commit-directory:1",
        "commit-time:2",
    ):
        for second in ("undo-time", "undo-remove", "undo-directory", "stage-create:3",
                       "journal-remove", "commit-rename:2", "marker-rename",
                       "keep-rename:2"):  # fmt: skip
            world, bench = lab.fresh()
            after = world.after()
            bench.killed_at(first)
            bench.raw(bench.command(lab.appliers.faults), {"OUA_KILL_AT": second})
            assert bench.run().outcome in (Outcome.APPLIED, Outcome.ALREADY_APPLIED)
            assert snapshot(world.root, world.timed) == after, (first, second)
            assert_clean(world.root)


def test_failure_in_staging_is_refused_and_leaves_nothing(lab: Lab) -> None:
    steps = [step for step in lab.steps() if name_of(step) in STAGING]
    for step in steps:
        world, bench = lab.fresh()
        before, names = inodes(world.root), snapshot(world.root, world.timed)
        name, nth = step.split(":")
        number = errno.ENOSPC if name == "stage-write" else errno.EIO
        result = bench.run(OUA_FAIL_AT=f"{name}:{number}:{nth}")
        assert result.outcome is Outcome.REFUSED, (step, result)
        assert result.code == ("space" if name == "stage-write" else "io")
        assert inodes(world.root) == before, step
        assert snapshot(world.root, world.timed) == names, step
        assert_clean(world.root)


def test_failure_in_commit_is_undone_to_the_last_inode(lab: Lab) -> None:
    for step in [step for step in lab.steps() if name_of(step) in COMMITTING]:
        world, bench = lab.fresh()
        before, names = inodes(world.root), snapshot(world.root, world.timed)
        name, nth = step.split(":")
        result = bench.run(OUA_FAIL_AT=f"{name}:{errno.EIO}:{nth}")
        assert result.outcome is Outcome.UNDONE, (step, result)
        assert result.code == "io"
        assert inodes(world.root) == before, step
        assert snapshot(world.root, world.timed) == names, step
        assert_clean(world.root)


def test_killed_while_undoing_then_run_again_is_undone(lab: Lab, tmp_path: Path) -> None:
    world, bench = lab.fresh()
    trace = tmp_path / "undo"
    bench.run(OUA_FAIL_AT=f"verify:{errno.EIO}", OUA_TRACE=str(trace))
    taken = trace.read_text().split()
    undo = taken[taken.index("verify") + 1 :]
    assert set(undo) == set(UNDOING)
    for position, name in enumerate(undo):
        world, bench = lab.fresh()
        before, names = inodes(world.root), snapshot(world.root, world.timed)
        after = world.after()
        nth = undo[:position].count(name) + 1
        done = bench.raw(
            bench.command(lab.appliers.faults),
            {"OUA_FAIL_AT": f"verify:{errno.EIO}", "OUA_KILL_AT": f"{name}:{nth}"},
        )
        assert done.returncode < 0
        result = bench.run()
        if name == "undo-mark":  # nothing says yet that it failed: forward is whole as well
            assert result.outcome is Outcome.APPLIED
            assert snapshot(world.root, world.timed) == after
            continue
        assert result.outcome is Outcome.UNDONE, (name, nth, result)
        assert result.code == "io"
        assert inodes(world.root) == before, (name, nth)
        assert snapshot(world.root, world.timed) == names, (name, nth)
        assert_clean(world.root)


@pytest.mark.parametrize(
    "name", ["undo-rename", "undo-directory", "undo-time", "undo-remove", "undo-sync"]
)
def test_failed_undo_needs_a_person_and_the_next_run_undoes(lab: Lab, name: str) -> None:
    world, bench = lab.fresh()
    before, names = inodes(world.root), snapshot(world.root, world.timed)
    result = bench.run(OUA_FAIL_AT=f"verify:{errno.EROFS},{name}:{errno.EIO}:0")
    assert result.outcome is Outcome.NEEDS_PERSON
    assert result.code == "system"  # of the first failure, which started the undo
    assert list((world.root / "var/lib/ouassister").glob("journal-*"))
    result = bench.run()
    assert result.outcome is Outcome.UNDONE
    assert result.code == "system"
    assert inodes(world.root) == before
    assert snapshot(world.root, world.timed) == names
    assert_clean(world.root)
    # Renaming changed the files' ctime: an undone change set is not for this suspension any more.
    assert bench.run().code == "conflict"


def test_conflict_after_the_check_is_undone(lab: Lab) -> None:
    """The guest's programs are not locked out: what they do meanwhile must not be lost."""

    def appears(world: World) -> bytes:
        world.put(b"/usr/bin/capable", b"the guest was faster")
        return b"/usr/bin/capable"

    def is_written(world: World) -> bytes:
        with world.host(b"/usr/bin/tool").open("ab") as tool:
            tool.write(b"!")
        return b"/usr/bin/tool"

    def is_replaced(world: World) -> bytes:
        world.put(b"/usr/bin/other", b"old tool", 0o755)
        world.host(b"/usr/bin/other").rename(world.host(b"/usr/bin/tool"))
        return b"/usr/bin/tool"

    def goes(world: World) -> bytes:
        world.host(b"/usr/bin/gone").unlink()
        return b"/usr/bin/gone"

    def fills(world: World) -> bytes:
        world.put(b"/usr/share/doc/old/more", b"more")
        return b"/usr/share/doc/old"

    for change in (appears, is_written, is_replaced, goes, fills):
        world, bench = lab.fresh()
        with bench.stopped_at("stage-sync") as stopped:
            path = change(world)
            before = inodes(world.root)
        result = stopped.result
        assert (result.outcome, result.code, result.path) == (Outcome.UNDONE, "conflict", path)
        kept = {p: i for p, i in before.items() if RESERVED not in p}
        assert inodes(world.root) == kept, change
        assert_clean(world.root)


def test_kill_then_conflict_is_undone(lab: Lab) -> None:
    world, bench = lab.fresh()
    bench.killed_at("commit-rename:9")
    world.put(b"/usr/bin/other", b"newer than both", 0o755)
    world.host(b"/usr/bin/other").rename(world.host(b"/var/lib/dpkg/status"))
    result = bench.run()
    assert (result.outcome, result.code) == (Outcome.UNDONE, "conflict")
    assert result.path == b"/var/lib/dpkg/status"
    assert world.host(b"/usr/bin/tool").read_bytes() == b"old tool"
    assert world.host(b"/var/lib/dpkg/status").read_bytes() == b"newer than both"
    assert_clean(world.root)


def test_undo_with_a_path_taken_meanwhile_needs_a_person(lab: Lab) -> None:
    world, bench = lab.fresh()
    with bench.stopped_at("verify") as stopped:
        world.put(b"/usr/bin/gone", b"made anew where the update deleted")
    result = stopped.result
    assert (result.outcome, result.code) == (Outcome.NEEDS_PERSON, "verify")
    assert b'"undo-failed"' in stopped.output
    world.host(b"/usr/bin/gone").unlink()
    assert bench.run().outcome is Outcome.UNDONE
    assert world.host(b"/usr/bin/gone").read_bytes() == b"old"


def test_other_change_set_is_refused_while_one_is_half_applied(lab: Lab) -> None:
    world, bench = lab.fresh()
    other = Bench.make(lab.appliers, world, lab.folder, number=2)
    bench.killed_at("commit-rename:5")
    half = inodes(world.root)
    result = other.run()
    assert (result.outcome, result.code) == (Outcome.REFUSED, "unfinished")
    assert inodes(world.root) == half


def test_interrupted_run_is_ended_after_a_reboot(lab: Lab) -> None:
    """A power cut changes the boot id; the journal itself proves the guest."""
    world, bench = lab.fresh()
    after = world.after()
    bench.killed_at("commit-rename:5")
    world.host(b"/proc/sys/kernel/random/boot_id").write_bytes(b"another\n")
    assert bench.run().outcome is Outcome.APPLIED
    here = snapshot(world.root, world.timed)
    del here[b"/proc/sys/kernel/random/boot_id"], after[b"/proc/sys/kernel/random/boot_id"]
    assert here == after


def test_staging_cut_short_by_a_reboot_is_removed_and_refused(lab: Lab) -> None:
    for step in ("stage-attributes:7", "stage-sync"):
        world, bench = lab.fresh()
        world.host(b"/proc/sys/kernel/random/boot_id").write_bytes(b"another\n")
        before = inodes(world.root)
        world.host(b"/proc/sys/kernel/random/boot_id").write_bytes(world.boot_id.encode())
        bench.killed_at(step)
        world.host(b"/proc/sys/kernel/random/boot_id").write_bytes(b"another\n")
        result = bench.run()
        assert (result.outcome, result.code) == (Outcome.REFUSED, "identity")
        assert before.keys() == inodes(world.root).keys()
        assert_clean(world.root)


def test_failure_after_the_marker_leaves_work_for_the_next_run(lab: Lab) -> None:
    for name in ("directory-time", "journal-keep"):
        world, bench = lab.fresh()
        after = world.after()
        result = bench.run(OUA_FAIL_AT=f"{name}:{errno.EIO}:1")
        assert result.outcome is Outcome.APPLIED
        assert result.code == "leftover"
        assert bench.run().outcome is Outcome.APPLIED
        assert snapshot(world.root, world.timed) == after
        assert_clean(world.root)
        assert bench.run().outcome is Outcome.ALREADY_APPLIED


@pytest.mark.parametrize("name", ["attest-rename", "marker-sync"])
def test_marker_that_cannot_be_written_out_needs_a_person(lab: Lab, name: str) -> None:
    world, bench = lab.fresh()
    after = world.after()
    result = bench.run(OUA_FAIL_AT=f"{name}:{errno.EIO}")
    assert result.outcome is Outcome.NEEDS_PERSON
    result = bench.run()
    assert result.outcome is Outcome.APPLIED
    assert "attest" not in dict(result.phases_ms)
    assert snapshot(world.root, world.timed) == after


def test_attestation_is_never_there_before_the_marker(lab: Lab) -> None:
    """Who takes up a run that was killed attests nothing: it has not seen every byte."""
    for step in lab.steps():
        world, bench = lab.fresh()
        folder = world.root / "var/lib/ouassister"
        bench.killed_at(step)
        attested = (folder / "attestation.json").exists()
        assert not attested or (folder / "applied").exists(), step
        assert attested == (step.partition(":")[0] in AFTER_MARKER[1:]), step
        result = bench.run()
        fresh = "stage" in dict(result.phases_ms)
        assert ("attest" in dict(result.phases_ms)) == fresh, step
        assert (folder / "attestation.json").exists() == (attested or fresh), step


def test_package_database_is_committed_last(lab: Lab) -> None:
    database = (b"/var/lib/dpkg/info/bcc.list", b"/var/lib/dpkg/status")
    renames = [step for step in lab.steps() if name_of(step) == "commit-rename"]
    world, bench = lab.fresh()
    before, after = snapshot(world.root), world.after()
    bench.killed_at(renames[-len(database)])
    here = snapshot(world.root)
    for path, seen in after.items():
        if path in (*database, SAME_LATE):
            assert here.get(path) == before.get(path)
        elif seen.kind is not Kind.DIRECTORY:
            assert here[path] == seen


def fsync(path: Path) -> None:
    with path.open("ab") as file:
        os.fsync(file.fileno())


class Disks:
    """A guest on two ext4 images, ``/`` and ``/boot``, and what a power cut leaves of them."""

    def __init__(self, lab: Lab) -> None:
        for tool in ("losetup", "mkfs.ext4", "e2fsck", "nsenter"):
            need(tool)
        self.lab = lab
        self.here = lab.folder / "disks"
        self.here.mkdir()
        self.empty = self.here / "empty.img"
        with self.empty.open("wb") as image:
            image.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-I", "256", str(self.empty)], check=True)
        self.images = {name: self.here / f"{name}.img" for name in ("root", "boot")}
        self.cuts = {name: self.here / f"{name}-cut.img" for name in ("root", "boot")}

    @contextlib.contextmanager
    def mounted(self, images: dict[str, Path]) -> Iterator[Path]:
        """Mount both; yields the guest's root."""
        with mounted(self.here, "-o", "loop", str(images["root"])) as mount:
            (mount / "guest/boot").mkdir(parents=True, exist_ok=True)
            enter = ["nsenter", "--target", mount.parts[2], "--mount"]
            boot = self.here / "mount/guest/boot"
            subprocess.run([*enter, "mount", "-o", "loop", images["boot"], boot], check=True)
            yield mount / "guest"
        for image in images.values():
            wait_until_gone(image)

    def world(self, root: Path) -> World:
        """A guest with something to do on both."""
        world = everything(World.make(root))
        world.put(b"/boot/config", b"old")
        world.put(b"/boot/gone", b"old")
        world.add(b"/boot/config", Kind.FILE, b"new")
        world.add(b"/boot/gone", Kind.DELETE)
        world.add(b"/boot/new", Kind.FILE, b"new")
        return world

    def cut(self, step: str, durable: str) -> tuple[World, Bench]:
        """Run to a step and keep the disks as they are then, without what only memory holds."""
        for image in self.images.values():
            shutil.copyfile(self.empty, image)
        with self.mounted(self.images) as root:
            world = self.world(root)
            self.before, self.after = snapshot(root, world.timed), world.after()
            bench = Bench.make(self.lab.appliers, world, self.here)
            for top in (root, root / "boot"):
                subprocess.run(["sync", "-f", str(top)], check=True)
            with bench.stopped_at(step) as stopped:
                # fsync commits ext4's journal, without the data that waits for its allocation.
                if durable in ("root", "boot"):
                    fsync(root / "usr/unrelated" if durable == "root" else root / "boot/unrelated")
                for journal in (root / "var/lib/ouassister").glob("journal-*"):
                    if durable == "journal":
                        fsync(journal)
                for name, image in self.images.items():
                    shutil.copyfile(image, self.cuts[name])
                stopped.process.kill()
        return world, bench

    def check(self) -> None:
        """The file systems are whole."""
        for cut in self.cuts.values():
            done = subprocess.run(["e2fsck", "-fn", str(cut)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("durable", ["synced", "root", "boot", "journal"])
def test_power_cut_then_run_again_is_applied(lab: Lab, durable: str) -> None:
    """On disk is what was synced; or also all names of one file system; or also the journal."""
    disks = Disks(lab)
    for step in ends(lab.steps()):
        world, bench = disks.cut(step, durable)
        with disks.mounted(disks.cuts) as root:
            bench.root = root
            result = bench.run()
            assert result.outcome in (Outcome.APPLIED, Outcome.ALREADY_APPLIED), (step, result)
            now = snapshot(root, world.timed)
            assert {p: s for p, s in now.items() if not p.endswith(b"/unrelated")} == disks.after
            assert_clean(root)
        disks.check()
