"""Links that were down when the guest fell asleep stay down, and those that the gate had closed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.vm.world import World, with_capture

from ouassister.access import Access
from ouassister.demo.frames import count_frames
from ouassister.provider import links, qemu, vmtoml
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.provider.qemu import RunningVM

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

KNOCK = "exec 3<>/dev/udp/10.0.2.2/9 && echo knock >&3"
LINK = "ip link show eth0"
_CUT = f"until {LINK} | grep -q NO-CARRIER; do sleep 0.1; done"


def _knock(vm: RunningVM) -> None:
    guest_run(vm, ["/bin/bash", "-c", KNOCK], check=False)


def test_link_is_opened_that_the_gate_closed_and_stays_down_when_somebody_cut_it(
    world: World,
) -> None:
    capture = with_capture(world)
    config = world.config
    # The fixture has suspended it behind a closed gate: its kernel sees no carrier.
    assert links.read_closed(config.gate_file) == ("nic0",)
    update = world.run("update", "--install", "oua-extra")
    assert update.status == 0, update
    assert not any("nic0" in note for note in update.result["notes"])
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    assert not config.gate_file.exists()
    with qemu.attach(config) as vm:
        _knock(vm)
        assert count_frames(capture) > 0
        vm.qmp.execute("set_link", name="nic0", up=False)
        guest_run(vm, _CUT)
    suspended = world.run("suspend")
    assert suspended.status == 0, suspended

    told = "nic0: its link was down when the guest fell asleep, and stays down"
    plan = world.run("plan", "--install", "oua-gone")
    assert (plan.status, plan.result["notes"]) == (0, [told])
    update = world.run("update", "--install", "oua-gone")
    assert update.status == 0, update
    assert told in update.result["notes"]
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    assert told in resumed.result["notes"]
    with qemu.attach(config) as vm:
        _knock(vm)
        assert b"NO-CARRIER" in guest_run(vm, LINK).stdout
        assert count_frames(capture) == 0

        # What vm.toml says counts more than what the change set carries.
        said = tuple(replace(net, stays_down=False) for net in config.nets)
    world.toml.write_text(vmtoml.dump(replace(config, nets=said)))
    with qemu.attach(world.config) as vm:
        vm.reach(Access(links_down=("nic0",)))
        vm.set_links(up=True)
        guest_run(vm, f"while {LINK} | grep -q NO-CARRIER; do sleep 0.1; done")
        _knock(vm)
        assert count_frames(capture) > 0
        vm.kill()


def test_addresses_are_those_that_qemu_gives(clone: Path) -> None:
    config = vmtoml.load(clone)
    more = ["-device", "e1000,id=two,addr=16", "-device", "rtl8139,id=four,addr=17"]
    more += ["-device", "virtio-net-pci,id=three,addr=18,mac=52:54:00:12:34:58"]
    config = replace(config, command=(*config.command, *more))
    with qemu.start(config, "-S") as vm:
        told = {one["name"]: one["main-mac"] for one in vm.qmp.execute("query-rx-filter")}
        table = vm.qmp.execute_with("human-monitor-command", {"command-line": "info network"})
        vm.kill()
    found = links.addresses(config.command)
    assert found["nic0"] == told["nic0"]
    for device in ("two", "three", "four"):
        assert f"macaddr={found[device]}" in next(
            line for line in str(table).splitlines() if line.startswith(f"{device}:")
        )
