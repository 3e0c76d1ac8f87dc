"""The view of a guest that fell asleep with unflushed files, against what it says when it wakes."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.view import manifest, rig

from ouassister.testing.view import build_view, mounted_view

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

OPERATIONS: Final = 3500
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
            with rig.mounted_by_fuse2fs(image, tmp_path / "mounted") as tree:
                lines += manifest.differences(
                    manifest.as_fuse2fs(live), manifest.as_fuse2fs(rig.look(tree, prefixes))
                )
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
