"""The applier leaves exactly what the change set says."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need
from tests.host.applier_run import Appliers, Bench, mounted
from tests.host.applier_world import (
    ACL,
    World,
    everything,
    inodes,
    snapshot,
)

from ouassister.changeset.medium import write_medium
from ouassister.model import Kind
from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host


def assert_refused(bench: Bench, code: str, path: bytes, *more: str, **environment: str) -> str:
    """It refuses with this code and path, and the tree stays to the last inode."""
    before = inodes(bench.root)
    result = bench.run(*more, **environment)
    assert (result.outcome, result.code, result.path) == (Outcome.REFUSED, code, path), result
    assert inodes(bench.root) == before
    return result.reason


def test_every_kind_is_applied_and_a_replay_does_nothing(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    everything(world)
    after = world.after()
    bench = Bench.make(appliers, world, tmp_path)
    result = bench.run()
    assert result.outcome is Outcome.APPLIED, result
    assert result.files == len(world.entries)
    assert result.size_bytes == sum(entry.size for entry in world.entries if not entry.same)
    assert [name for name, _ in result.phases_ms] == [
        "medium", "lock", "check", "boot-unit", "stage", "sync", "commit", "verify", "attest",
        "marker", "cleanup",
    ]  # fmt: skip
    assert snapshot(world.root, world.timed) == after
    marker = (world.root / "var/lib/ouassister/applied").read_bytes().split()
    assert marker[0].decode() == world.changeset().changeset_id
    again = inodes(world.root)
    assert bench.run().outcome is Outcome.ALREADY_APPLIED
    assert inodes(world.root) == again


def test_attestation_says_what_was_done_and_when(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    """The same words as verify.sh has: test_reflect_scripts.py."""
    everything(world)
    assert Bench.make(appliers, world, tmp_path).run().outcome is Outcome.APPLIED
    state = world.host(b"/var/lib/ouassister")
    attestation = state / "attestation.json"
    assert attestation.stat().st_mode & 0o7777 == 0o600
    assert json.loads(attestation.read_text()) == {
        "schema": 1,
        "entries": 3,
        "applied_at_s": int((state / "applied").read_text().split()[1]),
        "checks": {
            "files": "clean",
            "marker": "clean",
            "package_database": "clean",
            "units": "not asked",
        },
        "result": "verified",
    }
    assert not (state / "attestation.new").exists()


def test_medium_without_an_attestation_leaves_none(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    world.add(b"/new", Kind.FILE, b"new")
    bench = Bench.make(appliers, world, tmp_path)
    layer = tmp_path / "layer1"
    info = write_medium(world.changeset(), layer, appliers.shipped, bench.medium)
    result = dataclasses.replace(bench, info=info).run()
    assert result.outcome is Outcome.APPLIED
    assert "attest" not in dict(result.phases_ms)
    assert not world.host(b"/var/lib/ouassister/attestation.json").exists()


def test_kernel_without_openat2_is_applied(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    everything(world)
    after = world.after()
    bench = Bench.make(appliers, world, tmp_path)
    assert bench.run(OUA_NO_OPENAT2="1").outcome is Outcome.APPLIED
    assert snapshot(world.root, world.timed) == after


def test_checking_build_is_applied(appliers: Appliers, world: World, tmp_path: Path) -> None:
    """AddressSanitizer and UBSan find nothing on the way of success, of undo and of recovery."""
    everything(world)
    after = world.after()
    bench = Bench.make(dataclasses.replace(appliers, faults=appliers.asan), world, tmp_path)
    bench.killed_at("stage-attributes:9")
    bench.killed_at("commit-rename:3")
    assert bench.run(OUA_X="").outcome is Outcome.APPLIED
    assert snapshot(world.root, world.timed) == after
    world.entries.clear()
    world.add(b"/usr/bin/tool", Kind.FILE, b"newer")
    bench = Bench.make(bench.appliers, world, tmp_path, number=2)
    assert bench.run(OUA_FAIL_AT=f"verify:{errno.EIO}").outcome is Outcome.UNDONE


def test_bad_command_line_is_a_usage_error(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    bench = Bench.make(appliers, world, tmp_path)
    good = bench.command()
    for bad in (
        good[:1],
        good[:3],
        [good[0], "remove", *good[2:]],
        [*good[:4], "0" * 63, *good[5:]],
        [*good[:4], "G" * 64, *good[5:]],
        [*good, "--force", "yes"],
        [*good, "--root"],
    ):
        assert bench.raw(bad, {}).returncode == 2


@pytest.mark.parametrize("when", ["", "x", "-5", "1.5", "1.1234567890", "12345678901234567890123"])
def test_bad_time_is_refused(appliers: Appliers, world: World, tmp_path: Path, when: str) -> None:
    world.add(b"/new", Kind.FILE, b"new")
    bench = Bench.make(appliers, world, tmp_path)
    assert_refused(bench, "usage", b"", "--set-time", when)


def test_clock_is_set_only_when_it_is_off(appliers: Appliers, world: World, tmp_path: Path) -> None:
    """A user namespace may not set the clock, so an attempt shows as a failure."""
    need("unshare")
    world.add(b"/new", Kind.FILE, b"new")
    bench = Bench.make(appliers, world, tmp_path)
    inside = ["unshare", "--user", "--map-root-user", *bench.command(), "--set-time"]
    refused = Bench.result(bench.raw([*inside, "1000000000.000000000"], {"PATH": os.defpath}))
    assert (refused.outcome, refused.code) == (Outcome.REFUSED, "system")
    assert "setting the clock" in refused.reason
    now = Bench.result(bench.raw([*inside, f"{time.time():.9f}"], {"PATH": os.defpath}))
    assert now.outcome is Outcome.APPLIED


def test_random_numbers_are_seeded_from_standard_input(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    """A user namespace may not seed them, so an attempt shows as a failure."""
    need("unshare")
    world.add(b"/new", Kind.FILE, b"new")
    bench = Bench.make(appliers, world, tmp_path)
    command = [*bench.command(), "--seed", "stdin"]
    short = Bench.result(bench.raw(command, {}, os.urandom(63)))
    assert (short.outcome, short.code) == (Outcome.REFUSED, "usage")
    inside = ["unshare", "--user", "--map-root-user", *command]
    refused = Bench.result(bench.raw(inside, {"PATH": os.defpath}, os.urandom(64)))
    assert (refused.outcome, refused.code) == (Outcome.REFUSED, "system")
    assert "seeding" in refused.reason
    assert Bench.result(bench.raw(command, {}, os.urandom(64))).outcome is Outcome.APPLIED


def test_attributes_of_the_parent_are_not_inherited(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    parent = world.host(b"/usr/bin")
    os.setxattr(parent, "system.posix_acl_default", ACL)
    os.chown(parent, 0, 50)
    parent.chmod(0o2775)
    world.add(b"/usr/bin/file", Kind.FILE, b"f", 0o664)
    world.add(b"/usr/bin/acl", Kind.FILE, b"f", 0o640, xattrs=(("system.posix_acl_access", ACL),))
    world.add(b"/usr/bin/fifo", Kind.FIFO, mode=0o660)
    world.add(b"/usr/bin/dir", Kind.DIRECTORY, mode=0o755)
    world.add(b"/usr/bin/dir/file", Kind.FILE, b"f", 0o666)
    world.add(b"/usr/bin/dir/dir", Kind.DIRECTORY, mode=0o777)
    world.add(b"/usr/bin/link", Kind.SYMLINK, target=b"file")
    world.add(b"/usr/bin/default", Kind.DIRECTORY, mode=0o755,
              xattrs=(("system.posix_acl_default", ACL),))  # fmt: skip
    world.add(b"/usr/bin/default/file", Kind.FILE, b"f", 0o640)
    after = world.after()
    assert Bench.make(appliers, world, tmp_path).run().outcome is Outcome.APPLIED
    assert snapshot(world.root, world.timed) == after


def test_device_is_read_as_a_block_device(appliers: Appliers, world: World, tmp_path: Path) -> None:
    need("losetup")
    everything(world)
    after = world.after()
    bench = Bench.make(appliers, world, tmp_path)
    loop = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", bench.medium],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    try:
        bench.medium = type(bench.medium)(loop)
        assert bench.run().outcome is Outcome.APPLIED
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
    assert snapshot(world.root, world.timed) == after


def test_descriptor_limit_is_raised(appliers: Appliers, world: World, tmp_path: Path) -> None:
    for number in range(400):
        path = b"/usr/lib/d%d" % number
        world.host(path).mkdir(parents=True)
        world.add(path + b"/file", Kind.FILE, path)
    bench = Bench.make(appliers, world, tmp_path)
    limit = (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    done = subprocess.run(
        bench.command(),
        capture_output=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
    )
    assert Bench.result(done).outcome is Outcome.APPLIED


def test_reader_that_went_and_signals_do_not_stop_it(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    everything(world)
    after = world.after()
    bench = Bench.make(appliers, world, tmp_path)
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(
        bench.command(appliers.faults), env={"OUA_STOP_AT": "commit-rename:4"}, stdout=write
    ) as process:
        os.close(write)
        os.waitpid(process.pid, os.WUNTRACED)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCONT):
            process.send_signal(number)
        assert process.wait(60) == 0
    assert snapshot(world.root, world.timed) == after


def test_two_file_systems_are_applied_or_undone(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    """/boot, say, is another file system: renames stay within each."""
    (world.root / "boot").mkdir()
    with mounted(tmp_path, "-o", "bind", str(world.root)) as mount:
        command = ["nsenter", "--target", mount.parts[2], "--mount", "mount", "-t", "tmpfs"]
        subprocess.run([*command, "boot", tmp_path / "mount/boot"], check=True)
        world.root = mount
        everything(world)
        world.put(b"/boot/config", b"old")
        world.add(b"/boot/config", Kind.FILE, b"new")
        world.add(b"/boot/new", Kind.DIRECTORY, mode=0o755)
        world.add(b"/boot/new/file", Kind.FILE, b"new")
        before, after = inodes(mount), world.after()
        failing = Bench.make(appliers, world, tmp_path)
        with failing.stopped_at("verify"):
            world.put(b"/usr/bin/tool", b"written meanwhile")
        assert failing.run().code == "conflict"
        assert inodes(mount).keys() == before.keys()
        again = World(mount)
        again.add(b"/boot/config", Kind.FILE, b"new")
        again.add(b"/usr/bin/tool", Kind.FILE, b"new")
        after = again.after()
        assert Bench.make(appliers, again, tmp_path, number=2).run().outcome is Outcome.APPLIED
        assert snapshot(mount) == after


def test_readers_always_find_a_replaced_file(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    """The exchange is atomic: old or new, never nothing."""
    world.put(b"/usr/bin/tool", b"old")
    world.add(b"/usr/bin/tool", Kind.FILE, b"new")
    bench = Bench.make(appliers, world, tmp_path)
    found: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            found.add(world.host(b"/usr/bin/tool").read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert bench.run().outcome is Outcome.APPLIED
    finally:
        done.set()
        reader.join()
    assert found <= {b"old", b"new"}


def test_marker_that_a_power_cut_tore_is_none(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    world.add(b"/usr/bin/new", Kind.FILE, b"new")
    bench = Bench.make(appliers, world, tmp_path)
    bench.killed_at("marker-sync")
    marker = world.root / "var/lib/ouassister/applied"
    marker.write_bytes(marker.read_bytes()[:70])
    assert bench.run().outcome is Outcome.APPLIED
    assert marker.read_bytes().endswith(b"\n")
