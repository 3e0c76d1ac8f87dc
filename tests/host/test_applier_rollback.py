"""The last update is taken back to what was there before, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.host.applier_run import Appliers, Bench, mounted
from tests.host.applier_world import (
    OLD,
    SAME,
    SAME_LATE,
    SAME_LINK,
    Seen,
    World,
    everything,
    inodes,
    snapshot,
)
from tests.host.rollback_lab import META, Applied, assert_nothing_kept, back_of, state
from tests.host.test_applier_crash import name_of

from ouassister.model import Kind
from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.host

STATUS = b"/var/lib/dpkg/status"


@pytest.fixture
def lab(appliers: Appliers, tmp_path: Path) -> Applied:
    return Applied(appliers, tmp_path)


def test_update_is_taken_back_to_the_last_inode(lab: Applied) -> None:
    """Contents, modes, owners, attributes, times, hard links: of every kind of entry."""
    world, back = lab.applied()
    result = back.run()
    assert result.outcome is Outcome.ROLLED_BACK, result
    assert result.files == len(world.entries)
    assert [name for name, _ in result.phases_ms] == [
        "medium", "lock", "check", "commit", "verify", "marker", "cleanup"
    ]  # fmt: skip
    lab.is_as_before(world)
    marker = (state(world) / "applied").read_bytes().split()
    assert (marker[0].decode(), marker[2]) == (world.changeset().changeset_id, b"rolled-back")
    assert back.run().outcome is Outcome.ALREADY_ROLLED_BACK
    lab.is_as_before(world)


def test_old_files_are_renamed_not_copied_and_nobody_else_sees_them(lab: Applied) -> None:
    world, _ = lab.applied()
    (folder,) = state(world).glob("old-*")
    assert (folder.stat().st_mode & 0o7777, folder.stat().st_uid) == (0o700, 0)
    kept = {entry.stat(follow_symlinks=False).st_ino for entry in os.scandir(folder)}
    gone = {entry.expected.inode for entry in world.entries
            if entry.expected and not entry.same and entry.path not in META}  # fmt: skip
    assert kept == gone


def test_kernel_without_openat2_takes_it_back(lab: Applied) -> None:
    world, back = lab.applied()
    assert back.run(OUA_NO_OPENAT2="1").outcome is Outcome.ROLLED_BACK
    lab.is_as_before(world)


def test_guest_that_was_booted_since_can_be_taken_back(lab: Applied) -> None:
    world, back = lab.applied()
    world.host(b"/proc/sys/kernel/random/boot_id").write_bytes(b"another\n")
    assert back.run().outcome is Outcome.ROLLED_BACK


def test_checking_build_takes_it_back(lab: Applied) -> None:
    """AddressSanitizer and UBSan, on the way of success, of failure and of recovery."""
    world, back = lab.applied()
    checked = dataclasses.replace(
        back, appliers=dataclasses.replace(lab.appliers, faults=lab.appliers.asan)
    )
    assert checked.run(OUA_FAIL_AT=f"rollback-verify:{errno.EIO}").outcome is Outcome.UNDONE
    lab.is_updated(world)
    checked.killed_at("rollback-rename:7")
    assert checked.run(OUA_X="").outcome is Outcome.ROLLED_BACK
    lab.is_as_before(world)


def test_package_database_goes_back_last(lab: Applied) -> None:
    database = (b"/var/lib/dpkg/info/bcc.list", STATUS)
    renames = [step for step in lab.back_steps() if name_of(step) == "rollback-rename"]
    world, back = lab.applied()
    back.killed_at(renames[-len(database)])
    here = snapshot(world.root)
    late = (*database, SAME_LATE)
    for path in late:
        assert here[path] == lab.after[path]
    for path, seen in lab.before.items():
        if path not in late and seen.kind is not Kind.DIRECTORY:
            assert here[path] == seen, path


def _written(world: World) -> bytes:
    """Of the same size, with the time put right."""
    with world.host(b"/usr/bin/acl").open("r+b") as file:
        file.write(b"ACL")
    os.utime(world.host(b"/usr/bin/acl"), ns=(0, _time(world, b"/usr/bin/acl")))
    return b"/usr/bin/acl"


def _time(world: World, path: bytes) -> int:
    return next(entry.mtime_ns for entry in world.entries if entry.path == path)


def _touched(world: World) -> bytes:
    os.utime(world.host(b"/usr/bin/empty"))
    return b"/usr/bin/empty"


def _replaced(world: World) -> bytes:
    world.put(b"/etc/other", b"same content", 0o604)
    world.host(b"/etc/other").rename(world.host(b"/etc/rights"))
    return b"/etc/rights"


def _gone(world: World) -> bytes:
    world.host(b"/top").unlink()
    return b"/top"


def _chmodded(world: World) -> bytes:
    world.host(b"/etc/rights").chmod(0o600)
    return b"/etc/rights"


def _labelled(world: World) -> bytes:
    os.setxattr(world.host(b"/usr/bin/capable"), "user.note", b"other")
    return b"/usr/bin/capable"


def _made_again(world: World) -> bytes:
    world.put(b"/usr/bin/gone", b"made anew")
    return b"/usr/bin/gone"


def _filled(world: World) -> bytes:
    world.put(b"/usr/lib/new/sub/log", b"of a service")
    return b"/usr/lib/new/sub/log"


def _filled_empty(world: World) -> bytes:
    world.host(b"/usr/lib/new/empty/x").mkdir()
    return b"/usr/lib/new/empty/x"


def _filled_where_link_was(world: World) -> bytes:
    world.put(b"/usr/lib/was-link/more", b"more")
    return b"/usr/lib/was-link/more"


def _inside(world: World) -> bytes:
    world.host(b"/usr/lib/new/sub/link").unlink()
    return b"/usr/lib/new/sub/link"


def _whole(world: World) -> bytes:
    shutil.rmtree(world.host(b"/usr/lib/new"))
    return b"/usr/lib/new"


def _same_written(world: World) -> bytes:
    with world.host(SAME).open("ab") as file:
        file.write(b"!")
    return SAME


def _same_chmodded(world: World) -> bytes:
    world.host(SAME).chmod(0o755)
    return SAME


def _same_replaced(world: World) -> bytes:
    other = world.host(b"/usr/lib/other-link")
    other.symlink_to("kept")
    os.utime(other, ns=(0, _time(world, SAME_LINK)), follow_symlinks=False)
    other.rename(world.host(SAME_LINK))
    return SAME_LINK


def _directory(world: World) -> bytes:
    world.host(b"/usr/lib/meta").chmod(0o700)
    return b"/usr/lib/meta"


DIVERGED = [_written, _touched, _replaced, _gone, _chmodded, _labelled, _made_again, _filled,
            _filled_empty, _filled_where_link_was, _inside, _whole, _directory,
            _same_written, _same_chmodded, _same_replaced]  # fmt: skip


def test_what_diverged_is_told_and_nothing_is_done(lab: Applied) -> None:
    for change in DIVERGED:
        world, back = lab.applied()
        path = change(world)
        here = inodes(world.root)
        result, differ = back.told()
        assert (result.outcome, result.code) == (Outcome.REFUSED, "diverged"), change
        assert [os.fsencode(told) for told, _ in differ] == [path], change
        assert inodes(world.root) == here, change


def test_what_diverged_stays_when_that_is_wanted_and_the_rest_goes_back(lab: Applied) -> None:
    for change in DIVERGED:
        world, back = lab.applied()
        path = change(world)
        there = snapshot(world.root)
        back.leave = True
        result, differ = back.told()
        assert result.outcome is Outcome.ROLLED_BACK, (change, result)
        assert [os.fsencode(told) for told, _ in differ] == [path]
        here = snapshot(world.root)
        kept = next((e.path for e in world.entries if path.startswith(e.path)
                     and not e.path.startswith(b"/usr/lib/meta/")), path)  # fmt: skip
        for name in {*here, *there, *lab.before}:
            mine = name == kept or name.startswith(kept + b"/")
            if name.startswith(b"/usr/lib/meta/"):
                mine = False
            wanted = (there if mine else lab.before).get(name)
            assert _same(here.get(name), wanted), (change, name)
        left = [e for e in world.entries if (e.path + b"/").startswith(kept + b"/")]
        assert result.files == len(world.entries) - len(left if kept not in META else left[:1])
        assert_nothing_kept(world.root)


def _same(one: Seen | None, other: Seen | None) -> bool:
    """But for the time of directories and for which name of an inode is the first."""

    def plain(seen: Seen) -> Seen:
        time = 0 if seen.kind is Kind.DIRECTORY else seen.mtime_ns
        return dataclasses.replace(seen, link=b"", mtime_ns=time)

    return (one and plain(one)) == (other and plain(other))


def test_changed_package_database_is_refused_whatever_is_wanted(lab: Applied) -> None:
    world, back = lab.applied()
    world.put(STATUS, b"status: newer\n")
    here = inodes(world.root)
    for leave in (False, True):
        back.leave = leave
        result, differ = back.told()
        assert (result.outcome, result.code) == (Outcome.REFUSED, "diverged")
        assert "package database" in result.reason
        assert [path for path, _ in differ] == [STATUS.decode()]
        assert inodes(world.root) == here


def test_directory_time_stays_when_names_in_it_changed(lab: Applied) -> None:
    world, back = lab.applied()
    world.put(b"/usr/lib/meta/guests", b"own")
    os.utime(world.host(b"/usr/lib/meta"), ns=(5, 5_000_000_007))
    assert back.run().outcome is Outcome.ROLLED_BACK
    assert world.host(b"/usr/lib/meta").stat().st_mtime_ns != lab.before[b"/usr/lib/meta"].mtime_ns


def test_next_update_prunes_what_was_kept(lab: Applied) -> None:
    world, back = lab.applied()
    world.entries.clear()
    world.add(b"/usr/bin/tool", Kind.FILE, b"newest", 0o755)
    second = Bench.make(lab.appliers, world, lab.folder, number=2)
    assert second.run().outcome is Outcome.APPLIED
    assert len(list(state(world).glob("old-*"))) == 1
    refused = back.run()
    assert (refused.outcome, refused.code) == (Outcome.REFUSED, "no-undo")
    assert back_of(second).run().outcome is Outcome.ROLLED_BACK
    assert world.host(b"/usr/bin/tool").read_bytes() == b"new tool" * 200_000


def test_refused_update_prunes_nothing(lab: Applied) -> None:
    world, back = lab.applied()
    world.entries.clear()
    world.add(b"/usr/bin/tool", Kind.FILE, b"newest", 0o755)
    second = Bench.make(lab.appliers, world, lab.folder, number=2)
    os.utime(world.host(b"/usr/bin/tool"), ns=(1, _time_of_tool(lab)))
    assert second.run().code == "conflict"
    assert back.run().outcome is Outcome.ROLLED_BACK
    lab.is_as_before(world)


def _time_of_tool(lab: Applied) -> int:
    return lab.after[b"/usr/bin/tool"].mtime_ns


def test_update_after_a_rollback_may_be_applied_and_taken_back_again(lab: Applied) -> None:
    world, back = lab.applied()
    assert back.run().outcome is Outcome.ROLLED_BACK
    entries, world.entries = world.entries, []
    for entry in entries:
        here = os.lstat(world.host(entry.path)) if os.path.lexists(world.host(entry.path)) else None
        assert (here is None) == (entry.expected is None)
    world.add(b"/usr/bin/tool", Kind.FILE, b"again", 0o755)
    again = Bench.make(lab.appliers, world, lab.folder)  # under the same id
    assert again.run().outcome is Outcome.APPLIED
    assert back_of(again).run().outcome is Outcome.ROLLED_BACK
    lab.is_as_before(world)


def test_guest_without_the_update_is_refused(lab: Applied) -> None:
    world, bench = lab.fresh()
    before = inodes(world.root)
    back = back_of(bench)
    refused = back.run()
    assert (refused.outcome, refused.code) == (Outcome.REFUSED, "no-undo")
    bench.killed_at("commit-rename:5")
    refused = back.run()
    assert (refused.outcome, refused.code) == (Outcome.REFUSED, "unfinished")
    assert bench.run().outcome is Outcome.APPLIED
    back.killed_at("rollback-rename:5")
    refused = bench.run()
    assert (refused.outcome, refused.code) == (Outcome.REFUSED, "unfinished")
    assert back.run().outcome is Outcome.ROLLED_BACK
    assert inodes(world.root) == before


def test_old_file_that_somebody_removed_is_refused(lab: Applied) -> None:
    world, back = lab.applied()
    (folder,) = state(world).glob("old-*")
    next(path for path in folder.iterdir() if path.is_file()).unlink()
    here = inodes(world.root)
    result = back.run()
    assert (result.outcome, result.code) == (Outcome.REFUSED, "no-undo")
    assert inodes(world.root) == here


def test_package_manager_at_work_is_refused(lab: Applied) -> None:
    world, back = lab.applied()
    lock = world.host(b"/var/lib/dpkg/lock-frontend")
    script = (
        "import fcntl, sys; lock = open(sys.argv[1], 'r+'); fcntl.lockf(lock, fcntl.LOCK_EX);"
        " print(flush=True); input()"
    )
    with subprocess.Popen(
        ["python3", "-c", script, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        result = back.run()
        holder.communicate(b"\n")
    assert (result.outcome, result.code) == (Outcome.REFUSED, "locked")


def test_old_files_that_cannot_be_kept_are_dropped_and_the_update_stands(lab: Applied) -> None:
    for step in ("keep-folder", "keep-rename:5"):
        world, bench = lab.fresh()
        after = world.after()
        name, _, nth = step.partition(":")
        done = bench.raw(
            bench.command(lab.appliers.faults), {"OUA_FAIL_AT": f"{name}:{errno.EIO}:{nth or 1}"}
        )
        result = Bench.result(done)
        assert (result.outcome, result.code) == (Outcome.APPLIED, "")
        assert b'"no-undo"' in done.stdout
        assert snapshot(world.root, world.timed) == after
        assert_nothing_kept(world.root)
        assert back_of(bench).run().code == "no-undo"


def test_two_file_systems_and_a_bind_mount_are_taken_back(
    appliers: Appliers, tmp_path: Path
) -> None:
    """Old files stay on their file system, and on their mount: names do not change places else."""
    root = tmp_path / "root"
    (root / "boot").mkdir(parents=True)
    (root / "srv/bound").mkdir(parents=True)
    (tmp_path / "data/top").mkdir(parents=True)
    with mounted(tmp_path, "-o", "bind", str(root)) as mount:
        enter = ["nsenter", "--target", mount.parts[2], "--mount", "mount"]
        subprocess.run([*enter, "-t", "tmpfs", "boot", tmp_path / "mount/boot"], check=True)
        subprocess.run(
            [*enter, "--bind", tmp_path / "data", tmp_path / "mount/srv/bound"], check=True
        )
        world = everything(World.make(mount))
        for top in (b"/boot", b"/srv/bound/top"):
            world.put(top + b"/config", b"old")
            world.put(top + b"/gone", b"old")
            world.add(top + b"/config", Kind.FILE, b"new")
            world.add(top + b"/gone", Kind.DELETE)
            world.add(top + b"/new", Kind.DIRECTORY, mode=0o755)
            world.add(top + b"/new/file", Kind.FILE, b"new")
        before, old, after = snapshot(mount, META), inodes(mount), world.after()
        bench = Bench.make(appliers, world, tmp_path)
        assert bench.run().outcome is Outcome.APPLIED
        assert snapshot(mount, world.timed) == after
        # The one of the bind mount is at its own top.
        for place in ("boot", "srv/bound"):
            names = [os.fsencode(path.name) for path in (mount / place).iterdir()]
            assert len([name for name in names if OLD.fullmatch(name)]) == 1
        assert back_of(bench).run().outcome is Outcome.ROLLED_BACK
        assert snapshot(mount, META) == before
        assert inodes(mount) == old
        assert_nothing_kept(mount)


def test_list_of_folders_removes_nothing_but_ours(lab: Applied) -> None:
    """Who may write there is root of the guest already; a damaged list still does no harm."""
    world, _ = lab.applied()
    world.put(b"/srv/letter", b"dear")
    listed = b"/srv\0/srv/letter\0/\0relative\0/srv/.ouassister-x\0/etc/../srv\0torn"
    (state(world) / "kept-0123456789ab").write_bytes(listed)
    world.entries.clear()
    world.add(b"/usr/bin/more", Kind.FILE, b"more")
    assert Bench.make(lab.appliers, world, lab.folder, number=2).run().outcome is Outcome.APPLIED
    assert world.host(b"/srv/letter").read_bytes() == b"dear"
    assert not (state(world) / "kept-0123456789ab").exists()


def test_what_was_kept_is_forgotten_when_that_is_wanted(lab: Applied) -> None:
    world, back = lab.applied()
    again = inodes(world.root)
    forget = dataclasses.replace(back, mode="forget")
    failed = forget.run(OUA_FAIL_AT=f"prune-remove:{errno.EIO}:2")
    assert (failed.outcome, failed.code) == (Outcome.REFUSED, "leftover")
    assert forget.run().outcome is Outcome.FORGOTTEN
    assert inodes(world.root) == again
    assert_nothing_kept(world.root)
    assert back.run().code == "no-undo"
    assert forget.run().outcome is Outcome.FORGOTTEN


def test_nothing_is_forgotten_while_a_rollback_is_half_done(lab: Applied) -> None:
    world, back = lab.applied()
    back.killed_at("rollback-rename:5")
    assert dataclasses.replace(back, mode="forget").run().code == "unfinished"
    assert back.run().outcome is Outcome.ROLLED_BACK
    lab.is_as_before(world)


def test_list_of_what_diverged_is_bounded(appliers: Appliers, tmp_path: Path) -> None:
    """By number, and by what the host reads: each byte of such a name is five in the output."""
    for count, folder in (
        (1100, b"/many"),
        (300, b"".join(b"/" + b"\xff" * 250 for _ in range(14))),
    ):
        root = tmp_path / f"root{count}"
        root.mkdir()
        world = World.make(root)
        world.host(folder).mkdir(parents=True)
        for number in range(count):
            world.add(b"%s/%d" % (folder, number), Kind.FILE, b"x")
        bench = Bench.make(appliers, world, tmp_path)
        assert bench.run().outcome is Outcome.APPLIED
        shutil.rmtree(world.host(folder))
        world.host(folder).mkdir()
        result, differ = back_of(bench).told()
        assert result.reason == f"{count} paths are not as the update left them"
        assert 0 < len(differ) < min(count, 1001)


def test_directory_that_changed_after_a_kill_undoes_the_way_back(lab: Applied) -> None:
    world, back = lab.applied()
    back.killed_at("rollback-verify")
    world.host(b"/usr/lib/meta").chmod(0o711)
    result = back.run()
    assert (result.outcome, result.code) == (Outcome.UNDONE, "diverged")
    assert world.host(b"/usr/bin/empty").exists()
