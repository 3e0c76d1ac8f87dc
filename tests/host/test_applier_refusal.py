"""The applier refuses a guest that is not as expected, and leaves it to the last inode."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.host.applier_run import Appliers, Bench, mounted
from tests.host.applier_world import (
    LOCKS,
    RESERVED,
    World,
    everything,
    inodes,
    paths,
)

from ouassister.model import Kind
from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.host


def assert_refused(bench: Bench, code: str, path: bytes, *more: str, **environment: str) -> str:
    """It refuses with this code and path, and the tree stays to the last inode."""
    before = inodes(bench.root)
    result = bench.run(*more, **environment)
    assert (result.outcome, result.code, result.path) == (Outcome.REFUSED, code, path), result
    assert inodes(bench.root) == before
    return result.reason


def _appends(world: World) -> bytes:
    with world.host(b"/usr/bin/tool").open("ab") as tool:
        tool.write(b"!")
    return b"/usr/bin/tool"


def _rewrites_with_the_old_time(world: World) -> bytes:
    tool = world.host(b"/usr/bin/tool")
    status = tool.stat()
    tool.write_bytes(b"OLD TOOL")
    os.utime(tool, ns=(status.st_atime_ns, status.st_mtime_ns))
    return b"/usr/bin/tool"


def _replaces_with_a_twin(world: World) -> bytes:
    tool = world.host(b"/usr/bin/tool")
    status = tool.stat()
    tool.rename(world.host(b"/usr/bin/twin"))
    world.put(b"/usr/bin/tool", b"old tool", 0o755)
    os.utime(tool, ns=(status.st_atime_ns, status.st_mtime_ns))
    return b"/usr/bin/tool"


def _removes(world: World) -> bytes:
    world.host(b"/usr/bin/gone").unlink()
    return b"/usr/bin/gone"


def _makes(world: World) -> bytes:
    world.put(b"/usr/lib/new", b"here first")
    return b"/usr/lib/new"


def _changes_mode_of_directory(world: World) -> bytes:
    world.host(b"/usr/lib/meta").chmod(0o700)
    return b"/usr/lib/meta"


def _touches_what_goes(world: World) -> bytes:
    world.put(b"/usr/share/doc/old/deep/er/file", b"other")
    return b"/usr/share/doc/old/deep/er/file"


def _adds_to_the_top_of_what_goes(world: World) -> bytes:
    world.put(b"/usr/share/doc/old/new", b"n")
    return b"/usr/share/doc/old/new"


def _adds_to_what_becomes_a_link(world: World) -> bytes:
    world.put(b"/usr/lib/was-dir/new", b"n")
    return b"/usr/lib/was-dir/new"


def _removes_from_what_goes(world: World) -> bytes:
    world.host(b"/usr/share/doc/old/changelog").unlink()
    return b"/usr/share/doc/old"


def _makes_the_directory_a_link(world: World) -> bytes:
    world.host(b"/usr/bin").rename(world.host(b"/usr/moved"))
    world.host(b"/usr/bin").symlink_to("moved")
    return b"/usr/bin"


def _makes_a_parent_a_link(world: World) -> bytes:
    world.host(b"/usr").rename(world.host(b"/moved"))
    world.host(b"/usr").symlink_to("moved")
    return b"/usr/bin"


def _makes_the_directory_a_file(world: World) -> bytes:
    world.host(b"/usr/bin").rename(world.host(b"/usr/moved"))
    world.put(b"/usr/bin", b"")
    return b"/usr/bin"


@pytest.mark.parametrize(
    "change",
    [
        _appends,
        _rewrites_with_the_old_time,
        _replaces_with_a_twin,
        _removes,
        _makes,
        _changes_mode_of_directory,
        _touches_what_goes,
        _adds_to_the_top_of_what_goes,
        _adds_to_what_becomes_a_link,
        _removes_from_what_goes,
        _makes_the_directory_a_link,
        _makes_a_parent_a_link,
        _makes_the_directory_a_file,
    ],
)
def test_changed_guest_is_refused(
    appliers: Appliers, world: World, tmp_path: Path, change: Callable[[World], bytes]
) -> None:
    everything(world)
    bench = Bench.make(appliers, world, tmp_path)
    path = change(world)
    assert_refused(bench, "conflict", path)
    assert_refused(bench, "conflict", path, OUA_NO_OPENAT2="1")


def test_new_name_deep_in_what_goes_is_refused(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    everything(world)
    bench = Bench.make(appliers, world, tmp_path)
    world.put(b"/usr/share/doc/old/deep/er/new", b"n")
    assert_refused(bench, "conflict", b"/usr/share/doc/old/deep/er")


def test_other_guest_is_refused(appliers: Appliers, world: World, tmp_path: Path) -> None:
    everything(world)
    bench = Bench.make(appliers, world, tmp_path)
    boot = world.host(b"/proc/sys/kernel/random/boot_id")
    boot.write_bytes(world.boot_id.replace("5", "6").encode() + b"\n")
    assert_refused(bench, "identity", b"/proc/sys/kernel/random/boot_id")
    boot.unlink()
    assert_refused(bench, "identity", b"/proc/sys/kernel/random/boot_id")
    world.host(b"/etc/machine-id").write_bytes(b"0" * 32)
    assert_refused(bench, "identity", b"/etc/machine-id")


def test_change_set_without_identity_fits_every_guest(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    world.boot_id = world.machine_id = ""
    world.host(b"/etc/machine-id").unlink()
    world.add(b"/new", Kind.FILE, b"new")
    assert Bench.make(appliers, world, tmp_path).run().outcome is Outcome.APPLIED


@pytest.mark.parametrize("lock", LOCKS)
def test_held_lock_is_refused_with_its_holder(
    appliers: Appliers, world: World, tmp_path: Path, lock: bytes
) -> None:
    everything(world)
    bench = Bench.make(appliers, world, tmp_path)
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-I", "-c", script, world.host(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        reason = assert_refused(bench, "locked", lock)
        assert f"process {holder.pid} " in reason
    assert bench.run().outcome is Outcome.APPLIED


def test_locks_are_held_until_the_end(appliers: Appliers, world: World, tmp_path: Path) -> None:
    everything(world)
    world.host(LOCKS[1]).unlink()  # made when it is missing, as dpkg does
    bench = Bench.make(appliers, world, tmp_path)
    with bench.stopped_at("journal-keep"):
        for lock in LOCKS:
            with world.host(lock).open("r+") as file, pytest.raises(BlockingIOError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert_refused(bench, "busy", b"/var/lib/ouassister")


def test_mounts_in_the_way_are_refused(appliers: Appliers, tmp_path: Path) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "guest") as mount:
        (mount / "root").mkdir()
        world = World.make(mount / "root")
        # xattrs of user and trusted came to tmpfs late, so no "everything" here
        world.put(b"/usr/bin/tool", b"old tool")
        world.put(b"/usr/share/doc/old/deep/file", b"deep")
        world.add(b"/usr/bin/tool", Kind.FILE, b"new tool")
        world.add(b"/usr/share/doc/old", Kind.DELETE)
        bench = Bench.make(appliers, world, tmp_path)
        pid = mount.parts[2]
        for path in (b"/usr/bin/tool", b"/usr/share/doc/old/deep", b"/usr/share/doc/old"):
            inside = os.fsencode(f"{tmp_path}/mount/root") + path
            enter = ["nsenter", "--target", pid, "--mount"]
            subprocess.run([*enter, "mount", "--bind", inside, inside], check=True)
            result = bench.run()
            assert (result.outcome, result.code, result.path) == (
                Outcome.REFUSED,
                "conflict",
                path,
            )
            subprocess.run([*enter, "umount", inside], check=True)
        assert bench.run().outcome is Outcome.APPLIED


def test_read_only_file_system_is_refused(appliers: Appliers, tmp_path: Path) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "guest") as mount:
        world = World.make(mount)
        world.add(b"/usr/bin/new", Kind.FILE, b"new")
        bench = Bench.make(appliers, world, tmp_path)
        bench.killed_at("journal-create")  # leaves the applier's own directory and lock
        for option in ("remount,ro", "remount,rw"):
            subprocess.run(
                ["nsenter", "--target", mount.parts[2], "--mount", "mount", "-o", option,
                 tmp_path / "mount"],
                check=True,
            )  # fmt: skip
            result = bench.run()
            if option == "remount,ro":
                assert result.outcome is Outcome.REFUSED
        assert result.outcome is Outcome.APPLIED


def test_no_room_is_refused_before_anything_is_written(appliers: Appliers, tmp_path: Path) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=1M", "guest") as mount:
        world = World.make(mount)
        world.add(b"/usr/bin/big", Kind.FILE, bytes(1 << 20))
        bench = Bench.make(appliers, world, tmp_path)
        reason = assert_refused(bench, "space", b"/var/lib/ouassister")
        assert "bytes free" in reason
    with mounted(tmp_path, "-t", "tmpfs", "-o", "nr_inodes=40", "guest") as mount:
        world = World.make(mount)
        for number in range(30):
            world.add(b"/usr/bin/%d" % number, Kind.FILE, b"x")
        bench = Bench.make(appliers, world, tmp_path)
        assert "inodes" in assert_refused(bench, "space", b"/var/lib/ouassister")


def test_disk_that_fills_while_staging_is_refused_and_cleaned(
    appliers: Appliers, tmp_path: Path
) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=4M", "guest") as mount:
        world = World.make(mount)
        world.put(b"/usr/bin/tool", b"old")
        world.add(b"/usr/bin/big", Kind.FILE, bytes(2 << 20))
        world.add(b"/usr/bin/tool", Kind.FILE, b"new")
        bench = Bench.make(appliers, world, tmp_path)
        with bench.stopped_at("stage-write") as stopped:
            filler = mount / "filler"
            with pytest.raises(OSError, match="No space"):
                filler.write_bytes(bytes(8 << 20))
        result = stopped.result
        assert (result.outcome, result.code) == (Outcome.REFUSED, "space")
        assert result.path == b"/usr/bin/big"
        assert not [path for path in paths(mount) if RESERVED in path]
        filler.unlink()
        assert bench.run().outcome is Outcome.APPLIED


def test_reserved_name_of_someone_else_is_left_alone(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    world.add(b"/usr/bin/new", Kind.FILE, b"new")
    taken = b"/usr/bin/" + RESERVED + world.changeset().changeset_id[:12].encode() + b"-0"
    world.put(taken, b"not ours")
    bench = Bench.make(appliers, world, tmp_path)
    assert_refused(bench, "system", b"/usr/bin/new")
    assert world.host(taken).read_bytes() == b"not ours"


def test_oversized_inode_number_is_compared_whole(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    world.put(b"/usr/bin/tool", b"old")
    entry = world.add(b"/usr/bin/tool", Kind.FILE, b"new")
    assert entry.expected is not None
    other = dataclasses.replace(entry.expected, inode=entry.expected.inode + (1 << 32))
    world.entries[0] = dataclasses.replace(entry, expected=other)
    assert_refused(Bench.make(appliers, world, tmp_path), "conflict", b"/usr/bin/tool")
