"""An upgrade of what everything stands on: what runs goes on, and what was replaced is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
from tests.cases.conftest import alone
from tests.fidelity import twins
from tests.vm.world import World

from ouassister.provider import qemu
from ouassister.testing import clone, guest_run

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.provider.qemu import RunningVM

pytestmark = [pytest.mark.vm, pytest.mark.timeout(2400)]

# As `make fidelity` with these and UPGRADE=1, which has the same guest.
_THERE: Final = ("nginx", "openssh-server", "curl", "vim-tiny", "python3", "postfix")
# A session as an administrator's: a client, sshd's process for it, and a command. The client is in
# the guest as well, since the links of the sleeper are down.
_SESSION: Final = """
mkdir -p -m 700 /root/.ssh && cd /root/.ssh
ssh-keygen -q -t ed25519 -N '' -f id && cp id.pub authorized_keys
systemd-run -q --unit=client ssh -i /root/.ssh/id -o StrictHostKeyChecking=no root@127.0.0.1 \\
    tail -f /dev/null
for i in $(seq 300); do grep -sqx tail /proc/[0-9]*/comm && exit 0; sleep 0.2; done
journalctl -u client >&2; exit 1
"""
_STATE: Final = """
echo session $(grep -slx tail /proc/[0-9]*/comm) $(systemctl is-active client)
echo listener $(systemctl show -P MainPID ssh)
echo old $(grep -ls ' /usr/.* (deleted)$' /proc/1/maps /proc/$(systemctl show -P MainPID ssh)/maps)
dpkg --audit
systemctl --failed --plain --no-legend
"""


def _state(vm: RunningVM) -> list[str]:
    return guest_run(vm, _STATE, timeout_s=120).stdout.decode().splitlines()


def test_upgrade_of_everything_keeps_a_session_and_leaves_no_old_manager(tmp_path: Path) -> None:
    """libc6, systemd, openssh-server, a kernel and its initramfs, and more, as they come."""
    alone()
    base = twins.sleeping("bookworm", _THERE, outdated=True)
    world = World(clone(base, tmp_path / "vm"), tmp_path / "home", 1800)
    with twins.again(world.toml) as vm:
        guest_run(vm, _SESSION, timeout_s=120)
        session, listener, *_rest = _state(vm)
    update = world.run("update")
    assert update.status == 12, update  # a reboot is due: there is a new kernel
    changed = {one["name"] for one in update.result["changes"]}
    assert {"libc6", "systemd", "openssh-server", "linux-image-cloud-amd64"} <= changed
    assert {one["mode"] for one in update.result["modes"]} == {"emulated"}, update.result["notes"]
    actions = [" ".join(one["argv"]) for one in update.result["actions"]]
    assert actions.count("systemctl daemon-reexec") == 1, actions
    resumed = world.run("resume")
    assert resumed.status == 12, resumed
    assert resumed.result["failed_actions"] == []
    with qemu.attach(world.config) as vm:
        try:
            after = _state(vm)
        finally:
            vm.kill()
    assert after[0] == session
    assert after[0].endswith("comm active")
    assert after[1] != listener
    assert after[2:] == ["old"], after
