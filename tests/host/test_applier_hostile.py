"""A medium that is not what was written, by a flipped bit or by intent, changes nothing outside."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import struct
from typing import TYPE_CHECKING

import pytest
from tests.host.applier_run import ATTESTATION, Appliers, Bench
from tests.host.applier_world import World, below, everything, expected, inodes

from ouassister.model import Entry, Expected, Kind
from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host

BLOCK = 4096
# Offsets of guest/medium.h.
APPLIER_SIZE, TABLE_OFFSET, TABLE_SIZE, TABLE_SHA256, LAYER_OFFSET = 32, 72, 80, 88, 120
HEADER_FIELDS = 248
TABLE_HEADER, ENTRY = 32, 168
MUTATIONS = 400
SEED = 20190726


def number(image: bytes | bytearray, offset: int) -> int:
    return int.from_bytes(image[offset : offset + 8], "little")


def seal(bench: Bench, image: bytearray) -> Bench:
    """Store a changed image with every hash put right, as only its maker could."""
    start, size = number(image, TABLE_OFFSET), number(image, TABLE_SIZE)
    table = bytes(image[start : start + size])
    image[TABLE_SHA256 : TABLE_SHA256 + 32] = hashlib.sha256(table).digest()
    bench.medium.write_bytes(image)
    header = hashlib.sha256(image[:BLOCK]).hexdigest()
    return dataclasses.replace(bench, info=dataclasses.replace(bench.info, header_sha256=header))


def test_one_flipped_bit_anywhere_is_refused(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    everything(world)
    bench = Bench.make(appliers, world, tmp_path)
    image = bench.medium.read_bytes()
    table, layer = number(image, TABLE_OFFSET), number(image, LAYER_OFFSET)
    areas = [
        *(range(place, place + 1) for place in range(HEADER_FIELDS)),
        range(HEADER_FIELDS, BLOCK),
        range(BLOCK, BLOCK + number(image, APPLIER_SIZE)),
        range(table, table + number(image, TABLE_SIZE)),
        *(
            range(layer + entry.offset, layer + entry.offset + entry.size)
            for entry in world.entries
            if entry.size and not entry.same
        ),
    ]
    before = inodes(world.root)
    rng = random.Random(SEED)  # noqa: S311 - not for secrets
    for area in areas:
        for place in {area[0], area[-1], *rng.sample(area, min(8, len(area)))}:
            flipped = bytearray(image)
            flipped[place] ^= 1 << rng.randrange(8)
            bench.medium.write_bytes(flipped)
            result = bench.run()
            assert (result.outcome, result.code) == (Outcome.REFUSED, "medium"), place
            assert inodes(world.root) == before, place
    bench.medium.write_bytes(image)
    assert bench.run().outcome is Outcome.APPLIED


def test_truncated_medium_is_refused(appliers: Appliers, world: World, tmp_path: Path) -> None:
    everything(world)
    bench = Bench.make(appliers, world, tmp_path)
    image = bench.medium.read_bytes()
    before = inodes(world.root)
    for size in (0, 1, 247, BLOCK - 1, BLOCK, number(image, TABLE_OFFSET) + 7, len(image) - 1):
        bench.medium.write_bytes(image[:size])
        result = bench.run()
        assert (result.outcome, result.code) == (Outcome.REFUSED, "medium"), size
        assert inodes(world.root) == before
    bench.medium.unlink()
    assert bench.run().code == "system"


def test_medium_of_another_change_set_is_refused(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    world.add(b"/new", Kind.FILE, b"new")
    bench = Bench.make(appliers, world, tmp_path)
    other = Bench.make(appliers, world, tmp_path, number=2)
    done = bench.raw(bench.command(sha256=other.info.header_sha256), {})
    assert Bench.result(done).code == "medium"


NEW = Entry(b"/usr/bin/new", Kind.FIFO, None, mode=0o644)
SAME = Entry(b"/usr/bin/same", Kind.FILE, Expected(1, 0o100644, 1, 7, 7), mode=0o644, mtime_ns=8,
             size=1, sha256="0" * 64, same=True)  # fmt: skip
DIRECTORY = Expected(1, 0o40755, 4096, 0, 0)


@pytest.mark.parametrize(
    "entries",
    [
        [dataclasses.replace(NEW, path=b"/usr/../../escaped")],
        [dataclasses.replace(NEW, path=b"/usr/./new")],
        [dataclasses.replace(NEW, path=b"/usr//new")],
        [dataclasses.replace(NEW, path=b"/usr/bin/")],
        [dataclasses.replace(NEW, path=b"/")],
        [dataclasses.replace(NEW, path=b"usr/new")],
        [dataclasses.replace(NEW, path=b"/usr/ne\0w")],
        [dataclasses.replace(NEW, path=b"/" + b"n" * 256)],
        [dataclasses.replace(NEW, path=b"/nnn" * 1024)],
        [dataclasses.replace(NEW, path=b"/usr/.ouassister-0-0")],
        [dataclasses.replace(NEW, path=b"/var/lib/ouassister/applied")],
        [dataclasses.replace(NEW, path=b"/var/lib/ouassister")],
        [Entry(b"/var/lib", Kind.DELETE, DIRECTORY)],
        [Entry(b"/var", Kind.SYMLINK, DIRECTORY, target=b"x")],
        [NEW, NEW],
        [dataclasses.replace(NEW, mode=0o10000)],
        [dataclasses.replace(NEW, path=b"/usr/bin/new/below"), NEW],
        [dataclasses.replace(NEW, path=b"/usr/bin/new/be/low"),
         dataclasses.replace(NEW, kind=Kind.DIRECTORY)],
        [Entry(b"/usr/new", Kind.DIRECTORY, None), Entry(b"/usr/new/x", Kind.DELETE, DIRECTORY)],
        [Entry(b"/usr/gone", Kind.DELETE, None)],
        [Entry(b"/usr/link", Kind.SYMLINK, None, target=b"")],
        [Entry(b"/usr/link", Kind.SYMLINK, None, target=b"a\0b")],
        [Entry(b"/usr/link", Kind.SYMLINK, None, target=b"a" * 4096)],
        [Entry(b"/usr/new", Kind.DIRECTORY, None),
         Entry(b"/usr/hard", Kind.HARDLINK, None, target=b"/usr/new")],
        [dataclasses.replace(NEW, xattrs=(("", b""),))],
        [dataclasses.replace(NEW, xattrs=(("user." + "x" * 251, b""),))],
        [dataclasses.replace(NEW, xattrs=(("user.x", bytes(65537)),))],
        [dataclasses.replace(NEW, below=((b"/usr/bin/new/x", DIRECTORY),))],
        [Entry(b"/usr/bin", Kind.DELETE, DIRECTORY, below=((b"/usr/bax", DIRECTORY),))],
        [Entry(b"/usr/bin", Kind.DELETE, DIRECTORY, below=((b"/usr/bin/x", DIRECTORY),) * 2)],
        [Entry(b"/usr/file", Kind.FILE, None, size=1, offset=1 << 40, sha256="0" * 64)],
        [Entry(b"/usr/file", Kind.FILE, None, size=1 << 63, sha256="0" * 64)],
        [dataclasses.replace(SAME, expected=None)],
        [dataclasses.replace(SAME, kind=Kind.FIFO)],
        [dataclasses.replace(SAME, kind=Kind.DELETE)],
        [dataclasses.replace(SAME, kind=Kind.SYMLINK, target=b"x")],
        [dataclasses.replace(SAME, mode=0o755)],
        [dataclasses.replace(SAME, size=2)],
        [dataclasses.replace(SAME, mtime_ns=7)],
        [SAME, Entry(b"/usr/hard", Kind.HARDLINK, None, target=SAME.path)],
    ],
)  # fmt: skip
def test_malformed_entry_is_refused_by_its_shape(
    appliers: Appliers, world: World, tmp_path: Path, entries: list[Entry]
) -> None:
    world.entries += entries
    bench = Bench.make(appliers, world, tmp_path)
    before = inodes(tmp_path)
    result = bench.run()
    assert (result.outcome, result.code) == (Outcome.REFUSED, "medium"), result
    assert {p: i for p, i in inodes(tmp_path).items() if b"/lib/ouassister" not in p} == before


def test_hard_link_to_a_later_entry_is_refused(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    world.add(b"/a", Kind.FILE, b"a")
    world.add(b"/b", Kind.HARDLINK, target=b"/a")
    bench = Bench.make(appliers, world, tmp_path)
    image = bytearray(bench.medium.read_bytes())
    link = number(image, TABLE_OFFSET) + TABLE_HEADER + 8 + ENTRY + 20
    assert image[link : link + 4] == bytes(4)
    for index in (1, 2, 0xFFFFFFFF):
        image[link : link + 4] = struct.pack("<I", index)
        assert seal(bench, image).run().code == "medium"


def test_attestation_that_is_no_text_is_refused(
    appliers: Appliers, world: World, tmp_path: Path
) -> None:
    world.add(b"/a", Kind.FILE, b"a")
    bench = Bench.make(appliers, world, tmp_path)
    image = bytearray(bench.medium.read_bytes())
    place = number(image, TABLE_OFFSET) + 20
    length = struct.unpack_from("<I", image, place)[0]
    assert length == len(ATTESTATION)
    for wrong in (length - 1, length + 1, 1 << 22, (1 << 22) + 1, 0xFFFFFFFF):
        image[place : place + 4] = struct.pack("<I", wrong)
        assert seal(bench, image).run().code == "medium", wrong


def interesting(rng: random.Random) -> int:
    return rng.choice(
        [0, 1, 2, 7, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 4096,
         rng.randrange(64), rng.randrange(1 << 12), rng.randrange(1 << 32)]
    )  # fmt: skip


def mutate(rng: random.Random, image: bytearray) -> None:
    """Change one to three fields of the table, or sometimes of the header."""
    start, size = number(image, TABLE_OFFSET), number(image, TABLE_SIZE)
    for _ in range(rng.randint(1, 3)):
        where = rng.random()
        if where < 0.1:
            place = rng.randrange(8, HEADER_FIELDS, 4)
        elif where < 0.25:
            place = start + rng.randrange(0, TABLE_HEADER, 4)
        else:
            place = start + rng.randrange(TABLE_HEADER, size - 3)
            place -= place % rng.choice([1, 4, 4, 4])
        if rng.random() < 0.2:
            image[place] ^= 1 << rng.randrange(8)
        else:
            image[place : place + 4] = struct.pack("<I", interesting(rng))


def test_random_tables_never_crash_nor_leave_the_root(appliers: Appliers, tmp_path: Path) -> None:
    """Hashes put right, so that only the applier's own checks stand between."""
    rng = random.Random(SEED)  # noqa: S311 - not for secrets
    fuzzed = dataclasses.replace(appliers, faults=appliers.asan)
    outcomes: dict[str, int] = {}
    folder, bench, image, outside = tmp_path / "none", None, b"", {}
    for turn in range(MUTATIONS):
        if bench is None:  # the last one was applied, or began to be: a fresh guest
            folder = tmp_path / f"{turn}"
            (folder / "root").mkdir(parents=True)
            world = everything(World.make(folder / "root"))
            bench = Bench.make(fuzzed, world, folder)
            image = bench.medium.read_bytes()
            bench.medium.write_bytes(b"")
        changed = bytearray(image)
        mutate(rng, changed)
        sealed = seal(bench, changed) if table_inside(changed) else bench
        outside = beside(folder)
        done = sealed.raw(sealed.command(appliers.asan), {})
        assert done.returncode in (0, 20, 40), (turn, done.returncode, done.stderr.decode())
        result = Bench.result(done)
        assert beside(folder) == outside, turn
        key = f"{result.outcome} {result.code}".strip()
        outcomes[key] = outcomes.get(key, 0) + 1
        if result.outcome is not Outcome.REFUSED:
            bench = None
    # The fuzzing reached past the table's checks, not only into them.
    assert outcomes["refused medium"] > MUTATIONS // 4, outcomes
    assert outcomes.get("applied", 0) + outcomes.get("refused conflict", 0) > 10, outcomes


def table_inside(image: bytes | bytearray) -> bool:
    return number(image, TABLE_OFFSET) + number(image, TABLE_SIZE) <= len(image)


def beside(folder: Path) -> dict[bytes, tuple[int, int, int]]:
    """Everything beside the guest's root."""
    return {p: i for p, i in inodes(folder).items() if not p.startswith((b"/root", b"/medium"))}


def test_what_is_below_must_be_listed(appliers: Appliers, world: World, tmp_path: Path) -> None:
    """A deletion without its list deletes an empty directory alone."""
    world.put(b"/usr/share/doc/file", b"x")
    world.entries.append(
        Entry(b"/usr/share/doc", Kind.DELETE, expected(world.root, b"/usr/share/doc"))
    )
    result = Bench.make(appliers, world, tmp_path).run()
    assert (result.outcome, result.code) == (Outcome.REFUSED, "conflict")
    whole = below(world.root, b"/usr/share/doc")
    world.entries[0] = dataclasses.replace(world.entries[0], below=whole)
    assert Bench.make(appliers, world, tmp_path).run().outcome is Outcome.APPLIED
