"""Every way into a guest: the same rules, and the whole update behind the closed gate."""

from __future__ import annotations

import socket
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need
from tests.vm.conftest import kill
from tests.vm.management import with_management
from tests.vm.world import World, with_capture

from ouassister import pipeline
from ouassister.access import AGENT, SSH, Access
from ouassister.demo.frames import count_frames
from ouassister.errors import ChannelError
from ouassister.provider import qemu, vmtoml
from ouassister.provider.qemu import RunningVM
from ouassister.provider.ssh import SshChannel, offered
from ouassister.store.database import Store
from ouassister.testing import clone as make_clone
from ouassister.testing import forwarded_port, guest_run
from ouassister.testing.channel import check_channel
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

KNOCK = ["/bin/bash", "-c", "echo knock >/dev/udp/10.0.2.2/9"]
_LEFT = "oua-extra; dpkg --audit; ls -d /var/lib/.ouassister-* 2>/dev/null"
KEYS = "cat /etc/ssh/ssh_host_*_key.pub"


@pytest.fixture(scope="module")
def managed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared guest with a management network. Read only."""
    need("ssh-keygen")
    return with_management(prepared, tmp_path_factory.mktemp("managed"))


@pytest.fixture
def sleeper(managed: Path, tmp_path: Path) -> Iterator[World]:
    """A fresh twin of it that both channels reach."""
    toml = make_clone(managed, tmp_path / "sleeper")
    yield World(toml, tmp_path / "home")
    kill(vmtoml.load(toml))


def _host_keys(vm: RunningVM) -> tuple[str, ...]:
    lines = guest_run(vm, KEYS).stdout.decode().splitlines()
    return tuple(" ".join(line.split()[:2]) for line in lines)


def _only(world: World, channel: str) -> None:
    """Leave the VM with one channel."""
    config = world.config
    if channel == AGENT:
        world.toml.write_text(vmtoml.dump(replace(config, management=None)))
    else:
        world.toml.write_text(vmtoml.dump(replace(config, agent=None)))


def test_every_channel_keeps_the_rules_and_comes_back_when_its_other_end_dies(
    sleeper: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with qemu.restore(sleeper.config, links_up=False) as vm:
        vm.cont()
        keys = _host_keys(vm)
        for name, end in (
            (AGENT, "systemctl restart qemu-guest-agent"),
            (SSH, "pkill -f 'sshd: root@notty'"),
        ):
            vm.reach(Access(name, keys))
            channel = vm.channel()
            assert channel.name == name
            begin = time.monotonic()
            check_channel(channel)
            print(f"{name}: checked in {time.monotonic() - begin:.1f} s")
            with pytest.raises(ChannelError):
                channel.run(["/bin/sh", "-c", f"{end}; sleep 600"], timeout_s=120)
            assert channel.run(["/bin/echo", "back"], timeout_s=60).stdout == b"back\n"
        _check_keys(vm, keys, monkeypatch)
        _check_closed(vm)
        vm.kill()


def _check_keys(vm: RunningVM, keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has other keys than the guest's does not answer; ssh-agent has one of ours."""
    network = vm.config.management
    assert network is not None
    assert network.identity is not None
    port = forwarded_port(vm, 22)
    (own,) = (one for one in keys if one.startswith("ssh-ed25519"))
    kind, _blank, key = own.partition(" ")
    other = f"{kind} {key[:-10]}{'B' * 8 if key[-10:-2] != 'B' * 8 else 'C' * 8}{key[-2:]}"
    for pinned, words in ((other, "Host key verification failed"), (own, "Permission denied")):
        # The agent that is asked for keys is not there.
        channel = SshChannel(port, None, (pinned,))
        with pytest.raises(ChannelError, match=words):
            channel.ping(timeout_s=60)
        channel.close()
    folder = network.identity.parent
    place = folder / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", place], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(place))
        while not place.exists():
            assert process.poll() is None
            time.sleep(0.01)  # between two looks
        subprocess.run(["ssh-add", "-q", network.identity], check=True)
        assert offered(None) == offered(network.identity)
        channel = SshChannel(port, None, keys)
        channel.ping(timeout_s=60)
        channel.close()
    finally:
        process.kill()
        process.wait()


def _check_closed(vm: RunningVM) -> None:
    """The guest reaches a service of this host through its own network, and not by that of ssh."""
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = service.getsockname()[1]
        vm.set_links(up=True)
        for gateway, status in (("10.0.2.2", 0), ("10.77.0.2", 124)):
            connect = f"timeout 5 bash -c 'exec 3<>/dev/tcp/{gateway}/{port}'"
            done = vm.channel().run(["/bin/sh", "-c", connect], timeout_s=60)
            assert (gateway, done.exit_status) in ((gateway, status), ("10.77.0.2", 1)), done


def _agent_forbids(world: World) -> tuple[str, ...]:
    """The guest's agent may run nothing from now on, as of some distributions; its host keys."""
    with qemu.restore(world.config, links_up=False) as vm:
        vm.cont()
        keys = _host_keys(vm)
        conf = "[general]\nblock-rpcs=guest-exec,guest-exec-status\n"
        # The agent ends itself before its answer: it starts anew with this.
        with pytest.raises(ChannelError):
            guest_run(
                vm, f"echo '{conf}' >/etc/qemu/qemu-ga.conf; sync; pkill -x qemu-ga; sleep 60"
            )
        with pytest.raises(ChannelError, match="guest-exec"):
            guest_run(vm, "true")
        world.config.save.unlink()
        vm.suspend()
    return keys


def test_guest_whose_agent_may_run_nothing_is_updated_by_ssh_behind_the_closed_gate(
    sleeper: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = _agent_forbids(sleeper)
    both = sleeper.config
    _only(sleeper, AGENT)
    refused = sleeper.run("plan", "--install", "oua-extra")
    assert (refused.status, refused.code) == (23, "unsupported-guest"), refused
    assert "forbids guest-exec, guest-exec-status" in refused.value["error"]["message"]

    sleeper.toml.write_text(vmtoml.dump(replace(both, agent=None, management=None)))
    refused = sleeper.run("plan", "--install", "oua-extra")
    assert (refused.status, refused.code) == (23, "unsupported-guest"), refused
    assert "its description names none" in refused.value["error"]["message"]

    sleeper.toml.write_text(vmtoml.dump(replace(both, carried=True)))
    capture = with_capture(sleeper)
    before = sleeper.hashes()
    # One that is staged and one that is emulated.
    update = sleeper.run("update", "--install", "oua-live", "--install", "oua-extra")
    assert update.status == 0, update
    assert update.result["channel"] == SSH
    assert sleeper.hashes() == before

    frames: list[int] = []
    set_links = RunningVM.set_links
    # All of it comes by ssh: nothing is plugged in.
    monkeypatch.delattr(RunningVM, "attach_medium")

    def counted(vm: RunningVM, *, up: bool) -> None:
        if up:
            frames.append(count_frames(capture))
        set_links(vm, up=up)

    with Store(sleeper.home) as opened, monkeypatch.context() as patch:
        patch.setattr(RunningVM, "set_links", counted)
        resumed = pipeline.resume(sleeper.config, opened, Timeline())
    assert frames == [0]
    assert resumed.failed_actions == ()
    assert "completion marker of this change set" in resumed.verified
    assert {one.name: one.status for one in resumed.staged} == {"oua-live": "installed"}
    print(f"ssh: {resumed.online_s:.1f} s, {resumed.phases}")
    forgotten = sleeper.run("rollback", "--forget")
    assert forgotten.status == 0, forgotten
    assert forgotten.result["result"] == "forgotten"
    with qemu.attach(sleeper.config) as vm:
        vm.reach(Access(SSH, keys))
        done = vm.channel().run(["/bin/sh", "-c", _LEFT], timeout_s=60)
        assert done.stdout == b"extra\n"
