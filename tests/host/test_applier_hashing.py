"""Hashed by a thread beside the writing, a large change set comes to the same end."""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING

import pytest
from tests.host.applier_run import Appliers, Bench
from tests.host.applier_world import World, inodes, snapshot

from ouassister.model import Kind
from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ouassister.model import Entry

pytestmark = pytest.mark.host

LAYER_OFFSET = 120  # of guest/medium.h
# Around the pieces that are read and hashed at once, and more files than pieces can wait.
SIZES = (3 << 20, 0, 1, 511, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, *(600,) * 700, 1 << 20)


@pytest.fixture
def world(tmp_path: Path) -> World:
    root = tmp_path / "root"
    root.mkdir()
    world = World.make(root)
    rng = random.Random(1)  # noqa: S311 - not for secrets
    for number, size in enumerate(SIZES):
        world.add(f"/usr/bin/file{number:04}".encode(), Kind.FILE, rng.randbytes(size))
    return world


@pytest.fixture(params=[1, 2])
def processors(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many the applier has: with one there is no thread."""
    allowed = os.sched_getaffinity(0)
    if request.param > len(allowed):
        pytest.skip("this host has one processor")
    os.sched_setaffinity(0, sorted(allowed)[: request.param])
    yield request.param
    os.sched_setaffinity(0, allowed)


def damage(bench: Bench, entry: Entry, at: int) -> None:
    """Flip one bit of what an entry shall have."""
    with bench.medium.open("r+b") as file:
        file.seek(LAYER_OFFSET)
        place = int.from_bytes(file.read(8), "little") + entry.offset + at
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("checked", [False, True])
def test_all_is_written(
    appliers: Appliers, world: World, tmp_path: Path, processors: int, *, checked: bool
) -> None:
    del processors
    bench = Bench.make(appliers, world, tmp_path)
    after = world.after()
    program = appliers.asan if checked else appliers.shipped
    assert bench.result(bench.raw(bench.command(program), {})).outcome is Outcome.APPLIED
    assert snapshot(world.root, world.timed) == after


@pytest.mark.parametrize("number", [0, 2, 6, 300, len(SIZES) - 1])
def test_one_damaged_file_refuses_all(
    appliers: Appliers, world: World, tmp_path: Path, processors: int, number: int
) -> None:
    del processors
    bench = Bench.make(appliers, world, tmp_path)
    before = inodes(world.root)
    entry = world.entries[number]
    for at in (0, entry.size - 1):
        damage(bench, entry, at)
        result = bench.run()
        assert (result.outcome, result.code) == (Outcome.REFUSED, "medium")
        assert result.path == entry.path
        assert inodes(world.root) == before
        damage(bench, entry, at)
    assert bench.run().outcome is Outcome.APPLIED


def test_a_write_that_fails_is_the_failure_that_is_told(
    appliers: Appliers, world: World, tmp_path: Path, processors: int
) -> None:
    del processors
    bench = Bench.make(appliers, world, tmp_path)
    before = inodes(world.root)
    damage(bench, world.entries[-1], 0)
    for place in (1, 13, 400):
        result = bench.run(OUA_FAIL_AT=f"stage-write:{errno.ENOSPC}:{place}")
        assert (result.outcome, result.code) == (Outcome.REFUSED, "space"), place
        assert inodes(world.root) == before


def test_killed_in_the_middle_it_begins_anew(
    appliers: Appliers, world: World, tmp_path: Path, processors: int
) -> None:
    del processors
    bench = Bench.make(appliers, world, tmp_path)
    after = world.after()
    for place in ("stage-write:2", "stage-create:300", "stage-write:700"):
        bench.killed_at(place)
    assert bench.run().outcome is Outcome.APPLIED
    assert snapshot(world.root, world.timed) == after
