"""A file that has holes on the host has them in the guest."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.host.applier_run import Appliers, Bench, mounted
from tests.host.applier_world import World, inodes, snapshot

from ouassister.changeset.layer import LayerWriter
from ouassister.model import Entry, Kind
from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host

KIB = 1024
MIB = 1 << 20
# Pieces of the file: where they are, and how many bytes that are not zero.
PIECES = ((0, 1), (100 * KIB, 5 * KIB), (3 * MIB - 1, 2), (7 * MIB + 512, 300 * KIB))
SIZE = 12 * MIB + 77


def make(path: Path, pieces: tuple[tuple[int, int], ...] = PIECES, size: int = SIZE) -> None:
    """Write a file with holes around its pieces."""
    with path.open("wb") as file:
        for position, count in pieces:
            file.seek(position)
            file.write(b"\x01" * count)
        file.truncate(size)
        os.fsync(file.fileno())


def ranges(path: Path) -> list[tuple[int, int]]:
    """Where lseek(2) finds data."""
    found = []
    with path.open("rb", buffering=0) as file:
        at, end = 0, os.fstat(file.fileno()).st_size
        while at < end:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: a hole up to the end
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, at))
    return found


def used(path: Path) -> int:
    """What du(1) says, in KiB."""
    done = subprocess.run(["du", "-k", path], capture_output=True, check=True)
    return int(done.stdout.split()[0])


def added(world: World, folder: Path, *named: tuple[bytes, Path]) -> list[Entry]:
    """Entries as the extraction writes them, with their layer."""
    with LayerWriter(folder / "made") as writer:
        for path, source in named:
            entry = world.add(path, Kind.FILE, source.read_bytes())
            with source.open("rb", buffering=0) as file:
                world.entries[-1] = writer.add(entry, file.fileno())
        writer.finish()
    world.layer = bytearray((folder / "made").read_bytes())
    return world.entries


def test_holes_travel_and_come_back(appliers: Appliers, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    world = World.make(root)
    sparse, dense, other = (tmp_path / name for name in ("sparse", "dense", "other"))
    make(sparse)
    dense.write_bytes(bytes(300 * KIB))
    other.write_bytes(b"small")
    assert len(ranges(sparse)) > 1, "this file system has no holes"
    # One before it, so that pieces of the layer do not begin at blocks of the file.
    named = ((b"/usr/bin/a", other), (b"/usr/bin/b", sparse), (b"/usr/bin/c", dense))
    entries = added(world, tmp_path, *named)
    data = {at // 4096 for start, count in PIECES for at in (start, start + count - 1)}
    data |= set(range((7 * MIB + 512) // 4096, (7 * MIB + 512 + 300 * KIB) // 4096))
    assert entries[1].holes == (SIZE // 4096 - len(data)) * 4096
    assert (entries[0].holes, entries[2].holes) == (0, 0)
    after = world.after()
    result = Bench.make(appliers, world, tmp_path).run()
    assert result.outcome is Outcome.APPLIED
    assert snapshot(root, world.timed) == after
    made = root / "usr/bin/b"
    assert made.stat().st_size == SIZE
    assert ranges(made) == ranges(sparse)
    assert used(made) <= used(sparse)
    assert used(made) < 400 < SIZE // KIB
    assert used(root / "usr/bin/c") >= 300  # it was dense, and stays so


@pytest.mark.parametrize(
    ("pieces", "size"),
    [
        ((), 8 * MIB),  # nothing but a hole
        ((), 4095),  # less than a block
        (((5 * MIB, 1),), 5 * MIB + 1),  # data up to the end
        (((0, 4096),), 4096 * 3),
        (((4096, 4096), (3 * 4096, 10)), 6 * 4096 + 1),
    ],
)
def test_holes_at_the_edges(
    appliers: Appliers, tmp_path: Path, pieces: tuple[tuple[int, int], ...], size: int
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    world = World.make(root)
    make(tmp_path / "sparse", pieces, size)
    (entry,) = added(world, tmp_path, (b"/usr/bin/b", tmp_path / "sparse"))
    assert entry.holes <= size
    assert Bench.make(appliers, world, tmp_path).run().outcome is Outcome.APPLIED
    made = root / "usr/bin/b"
    assert made.read_bytes() == (tmp_path / "sparse").read_bytes()
    if size >= 4096:
        assert ranges(made) == ranges(tmp_path / "sparse")


def test_holes_need_no_room(appliers: Appliers, tmp_path: Path) -> None:
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=4M", "guest") as mount:
        world = World.make(mount)
        make(tmp_path / "sparse")
        added(world, tmp_path, (b"/usr/bin/b", tmp_path / "sparse"))
        bench = Bench.make(appliers, world, tmp_path)
        assert bench.run().outcome is Outcome.APPLIED
        assert used(mount / "usr/bin/b") < 400
        world.entries[0] = dataclasses.replace(world.entries[0], path=b"/usr/bin/d", holes=0)
        before = inodes(mount)
        result = Bench.make(appliers, world, tmp_path, 2).run()
        assert (result.outcome, result.code) == (Outcome.REFUSED, "space")
        assert inodes(mount) == before


@pytest.mark.parametrize("holes", [4095, SIZE + 4096, 1 << 63])
def test_holes_that_cannot_be_are_refused(appliers: Appliers, tmp_path: Path, holes: int) -> None:
    root = tmp_path / "root"
    root.mkdir()
    world = World.make(root)
    make(tmp_path / "sparse")
    added(world, tmp_path, (b"/usr/bin/b", tmp_path / "sparse"))
    world.entries[0] = dataclasses.replace(world.entries[0], holes=holes)
    result = Bench.make(appliers, world, tmp_path).run()
    assert (result.outcome, result.code) == (Outcome.REFUSED, "medium")
