"""Every path that is not as expected is told before the applier refuses, and nothing changes."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from tests.host.applier_run import Appliers, Bench
from tests.host.applier_world import World, everything, inodes

from ouassister.model import Kind
from ouassister.reflect import conflicts
from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host

STATUS = b"/var/lib/dpkg/status"
FREE = "the guest has something at a path that was free"


def refused(bench: Bench) -> tuple[bytes, str, dict[bytes, str]]:
    """Path and reason of the result, and what was told; the tree stays to the last inode."""
    before = inodes(bench.root)
    done = bench.raw(bench.command(), {})
    result = bench.result(done)
    assert (result.outcome, result.code) == (Outcome.REFUSED, "conflict"), result
    assert inodes(bench.root) == before
    told = conflicts.told(done.stdout)
    found = {one.path: one.reason for one in told}
    assert len(found) == len(told)
    return result.path, result.reason, found


def test_every_conflict_is_told_with_its_reason(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    everything(world)
    bench = Bench.make(appliers, world, tmp_path)
    world.put(b"/usr/bin/tool", b"another old tool")
    world.host(b"/usr/bin/gone").unlink()
    world.put(b"/usr/bin/capable", b"")
    world.host(b"/usr/lib/meta").chmod(0o711)
    world.put(b"/usr/share/doc/old/deep/er/file", b"other")
    world.put(b"/usr/share/doc/old/deep/new", b"n")
    world.host(b"/usr/share/doc/old/changelog").unlink()
    world.put(b"/usr/lib/turns-not", b"nobody asks for this one")
    os.link(world.host(b"/usr/bin/same"), world.host(b"/usr/bin/same-too"))
    path, reason, told = refused(bench)
    assert told == {
        b"/usr/bin/tool": "it changed since the guest was suspended",
        b"/usr/bin/gone": "it is gone from the guest",
        b"/usr/bin/capable": FREE,
        b"/usr/bin/same": "it changed since the guest was suspended",
        b"/usr/lib/meta": "it changed since the guest was suspended",
        b"/usr/share/doc/old": "something is gone from a directory that goes",
        b"/usr/share/doc/old/deep": "it changed in a directory that goes",
        b"/usr/share/doc/old/deep/er/file": "it changed in a directory that goes",
        b"/usr/share/doc/old/deep/new": "it is new in a directory that goes",
    }
    assert path == b"/usr/bin/capable"  # the first in the table's order
    assert reason == f"{FREE}; 9 paths are not as expected"


def test_conflict_of_the_package_database_is_the_one_that_is_named(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    everything(world)
    bench = Bench.make(appliers, world, tmp_path)
    world.put(b"/usr/bin/tool", b"another old tool")
    world.put(STATUS, b"status: somebody's\n")
    path, _reason, told = refused(bench)
    assert path == STATUS
    assert told.keys() == {STATUS, b"/usr/bin/tool"}


def test_directories_that_are_gone_are_told_with_the_other_conflicts(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    everything(world)
    bench = Bench.make(appliers, world, tmp_path)
    world.host(b"/usr/lib").rename(world.host(b"/usr/lib64"))
    world.host(b"/usr/lib").symlink_to("lib64")
    world.put(b"/usr/bin/tool", b"another old tool")
    path, _reason, told = refused(bench)
    assert path == b"/usr/lib"
    gone = "the guest has no such directory"
    assert told == {
        b"/usr/lib": gone,
        b"/usr/lib/meta": gone,
        b"/usr/bin/tool": "it changed since the guest was suspended",
    }


def test_package_database_without_its_folder_is_named(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    world.add(b"/usr/bin/new", Kind.FILE, b"new")
    world.add(b"/var/lib/dpkg/info/new.list", Kind.FILE, b"/.\n")
    bench = Bench.make(appliers, world, tmp_path)
    world.put(b"/usr/bin/new", b"here first")
    world.host(b"/var/lib/dpkg/info").rmdir()
    path, _reason, told = refused(bench)
    assert path == b"/var/lib/dpkg/info/new.list"
    assert told.keys() == {b"/var/lib/dpkg/info", path, b"/usr/bin/new"}


def test_more_conflicts_than_are_told_are_counted(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    for number in range(1002):
        world.add(b"/usr/bin/%04d" % number, Kind.FILE, b"new")
    world.put(STATUS, b"old")
    world.add(STATUS, Kind.FILE, b"new")
    bench = Bench.make(appliers, world, tmp_path)
    for number in range(1002):
        world.host(b"/usr/bin/%04d" % number).touch()
    world.put(STATUS, b"somebody's")
    path, reason, told = refused(bench)
    assert (path, len(told)) == (STATUS, 1000)
    assert reason.endswith("; 1003 paths are not as expected")


def test_a_conflict_hides_no_error(appliers: Appliers, world: World, tmp_path: Path) -> None:
    """One event, in the words of the protocol; the paths' bytes are escaped."""
    world.add(b'/usr/bin/odd \xff\n"\\', Kind.FILE, b"new")
    bench = Bench.make(appliers, world, tmp_path)
    world.put(b'/usr/bin/odd \xff\n"\\', b"first")
    done = bench.raw(bench.command(), {})
    (event,) = [
        json.loads(line) for line in done.stdout.splitlines() if b'"event":"conflict"' in line
    ]
    assert event["path"] == '/usr/bin/odd \\xff\\x0a"\\\\'
    assert event["reason"] == FREE
    assert conflicts.told(done.stdout)[0].path == b'/usr/bin/odd \xff\n"\\'
