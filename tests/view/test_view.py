"""The view of a guest that fell asleep with unflushed files, against what it says when it wakes."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.view import manifest, rig

from ouassister.provider import vmtoml
from ouassister.testing import clone, guest_run
from ouassister.testing.view import build_view, mounted_view

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

OPERATIONS: Final = 3500
INLINE: Final = "/mnt/inline-data"
# Files outgrow their inodes under the journal and are written on; of "dropped" and "never" no page
# is cached in the end. The journal's copy of their first block is older than the disk, or newer;
# the kernel puts both over it.
OUTGROWN: Final = f"""
cd {INLINE}; for name in cached dropped never; do printf old-old >$name; done; sync
for name in cached dropped never; do fallocate -l 8000 $name; done
for name in cached dropped; do printf NEW-NEW | dd of=$name conv=notrunc status=none; done
sync cached; sync dropped; echo 3 >/proc/sys/vm/drop_caches; cat cached >/dev/null
"""
WITNESSES: Final = "/var/tmp/witnesses"  # noqa: S108 - of the guest
TARGETS: Final = ("/", *(extra.target for extra in rig.EXTRAS))


def test_view_is_what_the_guest_says_when_it_wakes_up(
    base: Callable[[str], Path],
    release: str,
    seed: int,
    tmp_path: Path,
    results: dict[str, Any],
) -> None:
    toml = base(release)
    run = rig.work(toml, tmp_path / "guest", seed, OPERATIONS, rig.trees(rig.EXTRAS))
    images = {}
    for target in TARGETS:
        place = tmp_path / f"view{target.replace('/', '-')}"
        with rig.timed(run, f"view {target}"):
            images[target] = build_view(run.toml, place, target.encode())
    # Everything is hashed once; the rest of the system does not change with the seed.
    prefixes = () if seed == 1 else rig.LIVELY
    told = rig.ask(run, TARGETS, prefixes)
    found: list[str] = []
    for target, image in images.items():
        live = told[target]
        with mounted_view(image) as tree:
            lines = manifest.differences(live, rig.look(tree, prefixes))
        if target == "/" and seed == 1:
            with rig.mounted_by_ext4_view(image, tmp_path / "mounted") as tree:
                lines += manifest.differences(live, rig.look(tree, prefixes))
        checked = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, check=False)
        if checked.returncode != 0:
            lines.append(f"e2fsck: {checked.stdout.decode(errors='replace')[-500:]}")
        found += [f"{target}: {line}" for line in lines]
    results[f"{release}-{seed}"] = {
        "paths": sum(map(len, told.values())),
        "differences": len(found),
        "seconds": {name: round(value, 2) for name, value in run.seconds.items()},
    }
    assert found == [], manifest.report(found)
    # A seed divisible by three never syncs.
    idle = {name for name, (succeeded, _) in run.operations.items() if succeeded == 0}
    assert idle == ({"sync"} if seed % 3 == 0 else set())


def test_first_block_that_the_journal_has_too_is_what_the_guest_settles_on(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    toml = clone(base("bookworm"), tmp_path / "guest")
    with rig.running(vmtoml.load(toml)) as vm:
        guest_run(vm, OUTGROWN)
        rig.suspend(vm)
    image = build_view(toml, tmp_path / "view", INLINE.encode())
    script = f"sync; cd {INLINE}; head -c 7 cached dropped never"
    with rig.running(vmtoml.load(toml)) as vm:
        told = guest_run(vm, script).stdout
    with mounted_view(image) as tree:
        command = ["head", "-c", "7", "cached", "dropped", "never"]
        found = subprocess.run(command, cwd=tree, check=True, capture_output=True).stdout
    assert found == told
    assert (found.count(b"NEW-NEW"), found.count(b"old-old")) == (1, 2)


def test_disk_as_it_lies_is_not_what_the_guest_says(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    # No commit of the journal and no flusher writes what the workload does: how long it takes must
    # not decide what is on the disk.
    before = (
        f"mkdir {WITNESSES}; seq 9 >{WITNESSES}/deleted; seq 9 >{WITNESSES}/longer; sync;"
        " mount -o remount,commit=86400 /;"
        " for clock in expire writeback; do"
        " echo 8640000 >/proc/sys/vm/dirty_${clock}_centisecs; done"
    )
    after = f"rm {WITNESSES}/deleted; seq 99 >>{WITNESSES}/longer; seq 9 >{WITNESSES}/created"
    run = rig.work(
        base("bookworm"), tmp_path / "guest", 3, OPERATIONS, rig.ROOT_TREES, before, after
    )
    image = rig.as_it_lies(run.toml, tmp_path / "plain")
    live = rig.ask(run, prefixes=rig.LIVELY)["/"]
    with mounted_view(image) as tree:
        found = manifest.differences(live, rig.look(tree, rig.LIVELY))
    assert len(found) > 100, manifest.report(found)
    for name, kinds in {
        "created": ("missing in the view",),
        "deleted": ("in the view alone",),
        "longer": ("size is", "mtime is", "digest is"),
    }.items():
        told = [line for line in found if line.startswith(f".{WITNESSES}/{name}: ")]
        for kind in kinds:
            assert any(kind in line for line in told), (name, told)
