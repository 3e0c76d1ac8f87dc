"""A session of ssh that was open when the guest fell asleep goes on, on an sshd that is new."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.vm import ssh_session

from ouassister.provider import qemu
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from tests.vm.world import World

    from ouassister.provider.qemu import RunningVM

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def _answer(vm: RunningVM, word: str) -> str:
    """Ask the shell at the other end of the session; its pid."""
    return guest_run(vm, ssh_session.ask(word), timeout_s=90).stdout.decode().strip()


def _main(vm: RunningVM) -> tuple[str, str]:
    """The pid of the daemon, and the inode that it runs."""
    script = "p=$(systemctl show -P MainPID ssh); echo $p; stat -Lc %i /proc/$p/exe"
    pid, inode = guest_run(vm, script).stdout.decode().split()
    return pid, inode


def test_an_open_session_of_ssh_outlives_the_restart_of_sshd(world: World) -> None:
    with qemu.restore(world.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        guest_run(vm, ssh_session.OPEN, timeout_s=60)
        shell = _answer(vm, "before")
        assert shell.isdigit()
        before = _main(vm)
        world.config.save.unlink()
        vm.suspend()

    update = world.run("update", "--install", "oua-sshd")
    assert update.status == 0, update
    restarts = {one["unit"]: one["verdict"] for one in update.result["restarts"]}
    assert restarts["ssh.service"] == "restart"
    assert "oua-client.scope" not in restarts
    assert {one["mode"] for one in update.result["modes"]} == {"emulated"}
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    assert resumed.result["failed_actions"] == []

    with qemu.attach(world.config) as vm:
        after = _main(vm)
        assert after[0] != before[0]
        assert after[1] == guest_run(vm, "stat -c %i /usr/sbin/sshd").stdout.decode().strip()
        assert after[1] != before[1]
        assert _answer(vm, "after") == shell
