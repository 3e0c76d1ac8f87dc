"""A gate that waits until nothing old is in reach: one service listens, one does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import pytest

from ouassister.provider import qemu
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from tests.vm.world import World

    from ouassister.provider.qemu import RunningVM

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

# Both run what oua-daemon replaces; one is handed a socket, which init listens at for it. Each
# writes down whether the link is up when it has ended, and when it is started; that waits for it.
_CARRIER: Final = "cat /sys/class/net/eth0/carrier >>/srv/%N"
_LATER: Final = f"""[Service]
ExecStartPre=/bin/sh -c 'n=0; while [ -e /srv/oua-wait ] && [ $n -lt 40 ] &&\
 ! grep -q 1 /sys/class/net/eth0/carrier; do sleep 0.5; n=$((n + 1)); done; {_CARRIER}.link'
ExecStopPost=/bin/sh -c '{_CARRIER}.ended'
"""
_LISTEN: Final = f"{_LATER}ExecStart=/usr/lib/oua-daemon/sleeper infinity\n"
_SOCKET: Final = "[Socket]\nListenStream=7000\n"
_FILES: Final = {
    "/etc/systemd/system/oua-listen.service": _LISTEN,
    "/etc/systemd/system/oua-listen.socket": _SOCKET,
    "/etc/systemd/system/oua-daemon.service.d/link.conf": _LATER,
}
_START: Final = (
    "systemctl daemon-reload; systemctl start oua-listen.socket oua-listen.service; sync"
)


def _out(vm: RunningVM, script: str) -> str:
    return guest_run(vm, script, timeout_s=120).stdout.decode().strip()


def _prepare(world: World) -> None:
    with qemu.restore(world.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        guest_run(vm, "mkdir -p /etc/systemd/system/oua-daemon.service.d")
        for path, text in _FILES.items():
            vm.qga().write_file(path, text.encode())
        guest_run(vm, _START)
        assert _out(vm, "cat /srv/oua-listen.link; rm /srv/oua-listen.link") == "0"
        guest_run(vm, "touch /srv/oua-wait; sync")
        world.config.save.unlink()  # a link to that of the guest that it is a clone of
        vm.suspend()


def test_what_nobody_reaches_follows_the_open_gate_and_its_failure_is_told(world: World) -> None:
    _prepare(world)
    update = world.run("update", "--install", "oua-daemon", "--install", "oua-spoil")
    assert update.status == 0, update
    units = ["oua-daemon.service", "oua-listen.service", "oua-script.service"]
    assert update.result["actions"][-1]["argv"] == ["systemctl", "try-restart", *units]

    resumed = world.run("resume", "--gate", "exposed")  # the daemon does not come back
    assert (resumed.status, resumed.code) == (41, "gate-opened"), resumed
    message = resumed.value["error"]["message"]
    assert message.startswith("after the gate had been opened: ")
    assert "oua-daemon.service ran at suspend and failed when restarted" in message
    with qemu.attach(world.config) as vm:
        assert _out(vm, "cat /srv/oua-listen.ended") == "0"  # before the links went up
        assert _out(vm, "cat /srv/oua-listen.link") == "1"  # and the gate did not wait for this
        attested = json.loads(_out(vm, "cat /var/lib/ouassister/attestation.json"))
        assert (attested["result"], attested["checks"]["units"]) == ("not verified", "not clean")
        guest_run(
            vm, "rm /srv/oua-spoil; rm -f /srv/*.link /srv/*.ended; systemctl start oua-daemon"
        )
        assert _out(vm, "cat /srv/oua-daemon.link; rm /srv/oua-daemon.link") == "1"  # open, still

    resumed = world.run("resume", "--gate", "exposed")
    assert resumed.status == 0, resumed
    assert resumed.result["gate"] == "exposed"
    assert "no restarted unit has failed" in resumed.result["verified"]
    phases = [one["name"] for one in resumed.result["phases"]]
    assert phases.index("open gate") < phases.index("gate open: actions and verification")
    with qemu.attach(world.config) as vm:
        # The first resume had ended what was old, so this gate had nothing to wait for: who is
        # restarted may have ended before it was open, or after.
        assert _out(vm, "cat /srv/oua-listen.link") == "1"
        assert _out(vm, "cat /srv/oua-daemon.link") == "1"
        attested = json.loads(_out(vm, "cat /var/lib/ouassister/attestation.json"))
        assert attested["result"] == "verified"
        assert "to_follow" not in attested
