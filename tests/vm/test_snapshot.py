"""A snapshot before a resume, and the VM that sleeps again as it did."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need
from tests.vm.world import World

from ouassister.provider import qemu
from ouassister.testing import clone as make_clone
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def _beside(world: World) -> list[str]:
    return sorted(path.name for path in world.toml.parent.glob("*.ouassister-*"))


def test_vm_goes_back_to_a_snapshot_and_sleeps_and_is_updated_as_before(world: World) -> None:
    nothing = world.run("resume", "--snapshot")
    assert (nothing.status, nothing.code) == (10, "nothing-pending")
    assert _beside(world) == []
    before = world.hashes()
    asleep = world.run("rollback", "--snapshot", "last")
    assert (asleep.status, asleep.code) == (20, "rollback-refused"), asleep

    assert world.run("update").status == 0
    resumed = world.run("resume", "--snapshot")
    assert resumed.status == 0, resumed
    (taken,) = world.run("status").result[0]["snapshots"]
    name = taken["snapshot_id"]
    assert (taken["stage"], taken["changeset_id"]) == ("kept", resumed.result["changeset_id"])
    assert resumed.result["notes"] == [
        f"'ouassister rollback --snapshot {name}' goes back to the VM as it slept"
    ]
    with qemu.attach(world.config) as vm:
        assert guest_run(vm, "oua-hello; echo ruin >/etc/passwd; sync").stdout == b"two\n"
    awake = world.run("rollback", "--snapshot", "last")
    assert (awake.status, awake.code) == (20, "state-running"), awake
    with qemu.attach(world.config) as vm:
        vm.kill()

    back = world.run("rollback", "--snapshot", name)
    assert (back.status, back.result["result"]) == (0, "asleep-again"), back
    assert list(world.hashes().values()) == list(before.values())
    assert _beside(world) == []
    status = world.run("status").result[0]
    assert (status["state"], status["snapshots"]) == ("suspended", [])
    assert [row["state"] for row in status["changesets"]] == ["rolled-back"]

    assert world.run("update").status == 0
    assert world.run("resume").status == 0
    assert not world.config.save.exists()
    with qemu.attach(world.config) as vm:
        assert guest_run(vm, "oua-hello; dpkg --audit").stdout == b"two\n"


def test_resume_without_room_for_its_snapshot_leaves_the_vm_asleep(
    prepared: Path, tmp_path: Path
) -> None:
    need("mount")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], check=True)
    try:
        # Its save file is a link to another's, so that it would be copied.
        world = World(make_clone(prepared, place / "sleeper"), tmp_path / "home")
        before = world.hashes()
        assert world.run("update", "--install", "oua-extra").status == 0
        done = world.run("resume", "--snapshot")
        assert (done.status, done.code) == (31, "work-disk-full"), done
        assert not qemu.is_running(world.config)
        assert (world.hashes(), _beside(world)) == (before, [])
        status = world.run("status").result[0]
        assert [row["verdict"] for row in status["changesets"]] == ["ready"]
        assert (status["state"], status["snapshots"]) == ("suspended", [])
    finally:
        subprocess.run(["umount", str(place)], check=True)
