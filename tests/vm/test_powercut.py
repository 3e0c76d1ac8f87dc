"""The power goes in the middle of a reflection; whoever resumes the guest again finds it whole."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest
from tests.host import boot_unit
from tests.vm.powercut import PLAN, Cut
from tests.vm.world import with_capture

from ouassister.demo.frames import count_frames
from ouassister.provider import qemu
from ouassister.reflect.applier_protocol import Outcome
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vm.world import World

    from ouassister.reflect.applier_protocol import ApplierResult

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

_SEEDS: Final = range(1, 1 + int(os.environ.get("OUASSISTER_CUTS", "0")))
_HOST_CUTS: Final = 4
_ALONE: Final = 4  # each fourth guest is booted without us
# Of the unit itself, in the order of the log: it ends before the network is set up.
_ENDED: Final = (
    "journalctl -b -o cat -u ouassister-finish -u networking"
    " | sed -n '/Starting networking\\|Starting Raise/q; p'"
)
_LOOK: Final = (
    "cat /proc/sys/kernel/random/boot_id; dpkg --audit; find / -xdev -name '.ouassister-*';"
    " ls /var/lib/ouassister | grep journal; oua-hello; if [ -e /usr/bin/oua-extra ]; then"
    " oua-extra; fi"
)


def _is_applied(result: ApplierResult) -> bool:
    """What the applier says of a cut disk: finished, or nothing of it is there."""
    if result.outcome in (Outcome.REFUSED, Outcome.UNDONE):
        assert result.code in ("identity", "interrupted"), result
        return False
    assert result.outcome in (Outcome.APPLIED, Outcome.ALREADY_APPLIED), result
    return True


@pytest.mark.parametrize("seed", _SEEDS)
def test_power_cut_then_resume_is_before_or_after_and_nothing_between(
    world: World, tmp_path: Path, seed: int
) -> None:
    capture = with_capture(world)
    cut = Cut.prepare(world, tmp_path / "cut", seed)
    # Near the marker, and so after the renames; near the plan; anywhere before.
    words = (b"", cut.changeset.changeset_id.encode(), PLAN)[seed % 3]
    written = cut.resume_until(cut.rng.randint(1, 25 if words else 60), words)
    assert world.config.save.exists() is False

    for entries in [written, *(cut.rng.randint(1, written) for _ in range(_HOST_CUTS))]:
        with cut.mounted(cut.disk(entries, "cut.raw")) as root:
            applied = _is_applied(cut.take_up(root, boot=cut.rng.random() < 0.5))
            cut.assert_whole(root, applied=applied)
        cut.assert_clean(cut.folder / "cut.raw")

    disk = cut.disk(written, "last.raw")
    with cut.mounted(cut.copy(disk, "cut.raw")) as root:
        left = boot_unit.starts(root)
        applied = _is_applied(cut.take_up(root, boot=False))
    # The unit comes with the plan, before all that is renamed.
    assert left or applied or words in (b"", PLAN)
    cut.boot_from(disk)
    capture.unlink()
    if seed % _ALONE == 0:
        with qemu.start(world.config) as vm:  # somebody boots it, with its links up
            vm.qga().ping(timeout_s=300)
    resumed = world.run("resume")
    with qemu.attach(world.config) as vm:
        boot, *told = guest_run(vm, _LOOK, timeout_s=120).stdout.decode().split()
        ended = guest_run(vm, _ENDED, timeout_s=120).stdout.decode()
        guest_run(vm, "sync")
        vm.kill()
    assert boot != cut.changeset.identity.boot_id
    if left:  # the guest has ended it before its network was there
        assert ('applied"' if applied else '"undone"') in ended
    if applied:
        assert resumed.status == 0, resumed
        found = resumed.result["result"]
        assert found == "already-applied" or (found == "applied" and not left)
        assert told == ["two", "extra"]
    else:
        assert (resumed.status, resumed.code) == (21, "stale"), resumed
        assert "'ouassister suspend'" in resumed.value["error"]["hint"]
        assert told == ["one"]
        if seed % _ALONE:
            assert count_frames(capture) == 0
    with cut.mounted(cut.flat("cut.raw")) as root:
        cut.assert_whole(root, applied=applied)
    cut.assert_clean(cut.folder / "cut.raw")
