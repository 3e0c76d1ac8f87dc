"""What stands between the files in place and the open gate, and what is left of it when shut."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.vm.world import until, with_capture

from ouassister.demo.frames import count_frames
from ouassister.provider import qemu
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from tests.vm.world import World

    from ouassister.provider.qemu import RunningVM

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

ATTESTATION = "/var/lib/ouassister/attestation.json"


def _out(vm: RunningVM, script: str) -> str:
    return guest_run(vm, script, timeout_s=120).stdout.decode().strip()


def _attestation(vm: RunningVM) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_out(vm, f"cat {ATTESTATION}"))
    return value


def test_scripts_calls_are_one_the_guest_is_verified_and_has_it_in_writing(world: World) -> None:
    update = world.run("update", "--install", "oua-calls", "--install", "oua-daemon")
    assert update.status == 0, update
    units = [f"oua-calls{number}.service" for number in range(1, 5)]
    assert [action["argv"] for action in update.result["actions"]] == [
        ["systemctl", "daemon-reload"],
        ["systemctl", "start", *units],
        ["systemctl", "try-restart", "oua-daemon.service", "oua-script.service"],
    ]
    resumed = world.run("resume")
    assert resumed.status == 11, resumed
    told = f"systemctl start {' '.join(units)}: status 1 (oua-calls4.service)"
    assert resumed.result["failed_actions"] == [told]
    assert resumed.result["verified"] == [
        "every byte of the change set by its SHA-256, in the guest",
        "every replaced or deleted path was as planned",
        "every path in place: inode, size and mode",
        "what only got another time by inode, size and times, not by its bytes",
        "completion marker of this change set",
        "dpkg --audit names no package of this change set",
        "no restarted unit has failed",
    ]
    assert resumed.result["notes"] == ["failed since the resume: oua-calls4.service"]
    with qemu.attach(world.config) as vm:
        attested = _attestation(vm)
        marker, stamp = _out(vm, "cat /var/lib/ouassister/applied").split()
        assert attested == {
            "schema": 1,
            "changeset": update.result["changeset_id"],
            "packages": update.result["changes"],
            "staged": [],
            "entries": attested["entries"],
            "applied_at_s": int(stamp),
            "checks": {
                "files": "clean",
                "marker": "clean",
                "package_database": "clean",
                "units": "clean",
            },
            "result": "verified",
        }
        assert marker == update.result["changeset_id"]
        assert 0 <= int(_out(vm, "date +%s")) - int(stamp) < 300
        shown = _out(vm, f"stat -c %a:%U {ATTESTATION}; ls /var/lib/ouassister")
        kept = [f"{kind}-{marker[:12]}" for kind in ("old", "undo")]  # for a rollback
        assert shown.split() == ["600:root", "applied", "attestation.json", "lock", *kept]


def test_update_that_asks_nothing_of_the_guest_is_verified_and_attested_by_the_applier(
    world: World,
) -> None:
    update = world.run("update", "--install", "oua-hello")
    assert (update.status, update.result["actions"]) == (0, []), update
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    assert "actions and verification" not in [one["name"] for one in resumed.result["phases"]]
    assert resumed.result["verified"][-2:] == [
        "completion marker of this change set",
        "what is new in the package database, byte for byte what dpkg --audit found clean",
    ]
    with qemu.attach(world.config) as vm:
        assert _out(vm, "oua-hello; dpkg --audit") == "two"
        attested = _attestation(vm)
        marker, stamp = _out(vm, "cat /var/lib/ouassister/applied").split()
        assert marker == attested["changeset"] == update.result["changeset_id"]
        assert attested == {
            "schema": 1,
            "changeset": marker,
            "packages": update.result["changes"],
            "staged": [],
            "entries": attested["entries"],
            "applied_at_s": int(stamp),
            "checks": {
                "files": "clean",
                "marker": "clean",
                "package_database": "clean",
                "units": "not asked",
            },
            "result": "verified",
        }
        assert _out(vm, f"stat -c %a:%U {ATTESTATION}") == "600:root"
        assert "attestation.new" not in _out(vm, "ls /var/lib/ouassister")


def _knock(world: World) -> None:
    """Send a frame from the guest, if its link is up."""
    with qemu.attach(world.config) as vm:
        guest_run(vm, ["/bin/bash", "-c", "echo knock >/dev/udp/10.0.2.2/9"], check=False)


def test_unit_that_does_not_come_back_keeps_the_gate_closed_until_policy_or_person_opens_it(
    world: World,
) -> None:
    capture = with_capture(world)
    update = world.run("update", "--install", "oua-daemon", "--install", "oua-spoil")
    assert update.status == 0, update

    resumed = world.run("resume")
    assert (resumed.status, resumed.code) == (41, "gate-closed"), resumed
    problem = "oua-daemon.service ran at suspend and failed when restarted"
    assert problem in resumed.value["error"]["message"]
    _knock(world)
    assert count_frames(capture) == 0
    with qemu.attach(world.config) as vm:
        attested = _attestation(vm)
    assert (attested["result"], attested["checks"]["units"]) == ("not verified", "not clean")
    assert attested["checks"]["package_database"] == "clean"

    process = subprocess.Popen(
        world.command("resume", "--on-failure", "open-after=3600"),
        env=world.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        until(process, b"gate closed for 3600 s more")
        process.send_signal(signal.SIGINT)
        output, _errors = process.communicate(timeout=60)
    finally:
        process.kill()
    told = json.loads(output)["error"]
    assert (process.returncode, told["code"]) == (41, "gate-closed")
    assert "SIGINT: the gate stays closed" in told["message"]
    _knock(world)
    assert count_frames(capture) == 0

    resumed = world.run("resume", "--on-failure", "open-after=1")
    assert (resumed.status, resumed.code) == (41, "gate-opened"), resumed
    assert problem in resumed.value["error"]["message"]
    _knock(world)
    assert count_frames(capture) > 0
    steps = [event["step"] for event in world.run("status").result[0]["history"]]
    assert "gate closed for 1 s more" in steps
    assert "open gate after a failure" in steps

    with qemu.attach(world.config) as vm:  # somebody mends it
        guest_run(vm, "rm /srv/oua-spoil; systemctl start oua-daemon")
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    assert resumed.result["result"] == "already-applied"
    assert resumed.result["verified"] == [
        "completion marker of this change set",
        "dpkg --audit names no package of this change set",
        "no restarted unit has failed",
    ]
    with qemu.attach(world.config) as vm:
        assert _attestation(vm)["result"] == "verified"


# Ends itself as a crash of the host's side would, at one moment.
_KILLED = """
import os, signal, sys
from ouassister.cli.main import main
from ouassister.provider.qemu import RunningVM
from ouassister.provider.qga import Qga

moment = sys.argv.pop(1)
attach, cont, set_links = RunningVM.attach_medium, RunningVM.cont, RunningVM.set_links
start = Qga.start

def end():
    os.kill(os.getpid(), signal.SIGKILL)

def attached(self, path, serial):
    attach(self, path, serial)
    if moment == "attached":
        end()

def continued(self):
    if moment == "retired":
        end()
    cont(self)

def started(self, argv, **more):
    pid = start(self, argv, **more)
    if moment == "begun" and "apply" in argv:
        end()
    return pid

def linked(self, *, up):
    if moment == "applied" and up:
        end()
    set_links(self, up=up)

RunningVM.attach_medium, RunningVM.cont, RunningVM.set_links = attached, continued, linked
Qga.start = started
sys.exit(main(sys.argv[1:]))
"""


def test_resume_that_is_killed_again_and_again_is_taken_up_behind_the_closed_gate(
    world: World,
) -> None:
    capture = with_capture(world)
    assert world.run("update").status == 0
    running = {"attached": "paused", "retired": "paused", "begun": "running", "applied": "running"}
    for moment, status in running.items():
        done = subprocess.run(
            [sys.executable, "-c", _KILLED, moment, *world.command("resume")[3:]],
            env=world.environment,
            capture_output=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == -signal.SIGKILL, (moment, done)
        assert world.config.save.exists() == (moment == "attached")
        with qemu.attach(world.config) as vm:
            assert vm.status() == status
        if status == "running":
            _knock(world)
        assert count_frames(capture) == 0
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    assert resumed.result["result"] == "already-applied"
    _knock(world)
    assert count_frames(capture) > 0
    with qemu.attach(world.config) as vm:
        assert _out(vm, "oua-hello; dpkg --audit") == "two"
        assert _attestation(vm)["result"] == "verified"
        assert _out(vm, "find / -xdev -name '.ouassister-*'") == ""
    assert list(world.home.rglob("*medium-*")) == []
