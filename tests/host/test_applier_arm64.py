"""The applier of arm64 does what the other one does; `make arm64-test` runs all of its tests."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.host.applier_run import Appliers, build_arm64
from tests.host.applier_world import snapshot
from tests.host.test_applier_crash import Lab, assert_clean

from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def appliers() -> Appliers:
    return build_arm64()


@pytest.fixture
def lab(appliers: Appliers, tmp_path: Path) -> Lab:
    return Lab(appliers, tmp_path)


def test_arm64_program_is_one_for_that_processor(appliers: Appliers) -> None:
    for name in ("applier-aarch64", "stub-aarch64"):
        header = (appliers.shipped.parent / name).read_bytes()[:20]
        assert header[:5] == b"\x7fELF\x02"
        assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64, elf.h


def test_arm64_stub_starts(appliers: Appliers) -> None:
    stub = appliers.shipped.parent / "stub-aarch64"
    assert subprocess.run(["qemu-aarch64-static", stub], check=False).returncode == 2


def test_arm64_change_set_of_everything_is_applied(lab: Lab) -> None:
    world, bench = lab.fresh()
    after = world.after()
    assert bench.run().outcome is Outcome.APPLIED
    assert snapshot(world.root, world.timed) == after
    assert_clean(world.root)


def test_arm64_killed_and_run_again_is_applied(lab: Lab) -> None:
    for step in ("stage-write:3", "commit-rename:5", "marker-rename:1"):
        world, bench = lab.fresh()
        after = world.after()
        bench.killed_at(step)
        assert bench.run().outcome is Outcome.APPLIED, step
        assert snapshot(world.root, world.timed) == after, step


def test_arm64_changed_guest_is_refused(lab: Lab) -> None:
    world, bench = lab.fresh()
    world.put(b"/usr/bin/tool", b"the guest's own", 0o755)
    result = bench.run()
    assert (result.outcome, result.code) == (Outcome.REFUSED, "conflict")
