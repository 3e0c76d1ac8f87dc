"""Runs that are ended in the middle: nothing is left, and the next one works."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import Any

import pytest
from tests.vm.world import NOTHING, World, leftovers, until, with_capture

from ouassister.demo.frames import count_frames
from ouassister.provider import qemu
from ouassister.provider.qga import Qga
from ouassister.reflect import reflection
from ouassister.testing import guest_run

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


# Of sh(1), which is dash, there is no such network.
KNOCK = ["/bin/bash", "-c", "echo knock >/dev/udp/10.0.2.2/9"]


def _settled(world: World) -> dict[str, list[str]]:
    """What is left once the kernel has had time to end killed processes."""
    end = time.monotonic() + 10
    while (left := leftovers(world.home))["processes"] and time.monotonic() < end:
        time.sleep(0.05)  # for the kernel to reap; bounded by the deadline
    return left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signal_in_the_middle_of_the_offline_phase_leaves_nothing(
    world: World, number: signal.Signals
) -> None:
    before = world.hashes()
    process = subprocess.Popen(
        world.command("update", "--install", "oua-slow"),
        env=world.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        until(process, b"Setting up oua-slow")
        start = time.monotonic()
        process.send_signal(number)
        process.wait(timeout=30)
        assert time.monotonic() - start < 5
    finally:
        process.kill()
        process.communicate()
    left = _settled(world)
    if number is signal.SIGKILL:  # nobody was left to remove the folder; the next run does
        left["folders"] = []
    else:
        assert process.returncode == 143
    assert left == NOTHING
    assert world.hashes() == before
    done = world.run("update", "--install", "oua-extra")
    assert done.status == 0, done
    assert leftovers(world.home) == NOTHING


def test_vm_started_by_somebody_ends_the_update_and_runs_on(world: World) -> None:
    process = subprocess.Popen(
        world.command("update", "--install", "oua-slow"),
        env=world.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        until(process, b"Setting up oua-slow")
        with qemu.restore(world.config, links_up=False) as vm:
            start = time.monotonic()
            vm.qga()
            vm.cont()
            process.wait(timeout=30)
            assert time.monotonic() - start < 2
            assert guest_run(vm, "oua-hello").stdout == b"one\n"
    finally:
        process.kill()
        output, _errors = process.communicate()
    assert process.returncode == 20
    assert b"state-running" in output
    assert _settled(world) == NOTHING


@pytest.mark.parametrize("step", ["stage-write", "commit-rename", "marker-write"])
def test_applier_killed_in_the_middle_keeps_the_gate_closed_and_is_finished_by_resume(
    world: World, step: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from ouassister import pipeline
    from ouassister.errors import GateClosedError
    from ouassister.store.database import Store
    from ouassister.timeline import Timeline

    faulty = request.config.rootpath / "build" / "guest" / "applier-faults"
    assert faulty.exists(), "'make guest-tests' builds it"
    capture = with_capture(world)
    assert world.run("update").status == 0
    execute = Qga.execute

    def with_fault(self: Qga, command: str, **arguments: Any) -> Any:  # noqa: ANN401
        if command == "guest-exec":
            arguments["env"] = [f"OUA_KILL_AT={step}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        return execute(self, command, **arguments)

    monkeypatch.setattr(reflection, "APPLIER", faulty)
    with Store(world.home) as store:
        with monkeypatch.context() as patch:
            patch.setattr(Qga, "execute", with_fault)
            with pytest.raises(GateClosedError):
                pipeline.resume(world.config, store, Timeline())
        assert count_frames(capture) == 0
        with qemu.attach(world.config) as vm:
            guest_run(vm, KNOCK, check=False)
        assert count_frames(capture) == 0
        report = pipeline.resume(world.config, store, Timeline())
    assert report.result in ("applied", "already-applied")
    with qemu.attach(world.config) as vm:
        assert guest_run(vm, "oua-hello").stdout == b"two\n"
        assert guest_run(vm, "dpkg --audit").stdout == b""
        assert guest_run(vm, "find / -xdev -name '.ouassister-*'").stdout == b""
        guest_run(vm, KNOCK)
    assert count_frames(capture) > 0


def test_save_file_that_was_resumed_is_not_taken_for_a_sleeping_vm(world: World) -> None:
    assert world.run("update", "--install", "oua-extra").status == 0
    assert world.run("resume").status == 0
    with qemu.attach(world.config) as vm:
        vm.kill()  # a power cut: the disk has moved on, the old memory is still there
    assert not world.config.save.exists()
    assert world.config.save.with_name("save.img.resumed").exists()
    assert world.run("list").result[0]["state"] == "off"
    for verb in ("inspect", "update"):
        done = world.run(verb)
        assert (done.status, done.code) == (20, "state-not-suspended"), done


def test_resume_that_cannot_start_leaves_the_vm_asleep(world: World) -> None:
    assert world.run("update", "--install", "oua-extra").status == 0
    before = world.hashes()
    text = world.toml.read_text()
    world.toml.write_text(text.replace("qemu-system-x86_64", "qemu-system-nowhere"))
    done = world.run("resume")
    assert (done.status, done.code) == (2, "host-not-ready"), done
    world.toml.write_text(text)
    assert world.hashes() == before
    assert world.run("resume").status == 0
