"""Every way into a guest: the same rules, and the whole update behind the closed gate."""

from __future__ import annotations

import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import lacking, need
from tests.vm import lost_channel
from tests.vm.conftest import kill
from tests.vm.management import with_management
from tests.vm.port import with_port
from tests.vm.world import World, with_capture

from ouassister import pipeline
from ouassister.access import AGENT, PORT, SSH, Access
from ouassister.demo.frames import count_frames
from ouassister.errors import ChannelError, DeadlineError
from ouassister.provider import qemu, vmtoml
from ouassister.provider.qemu import RunningVM
from ouassister.provider.ssh import SshChannel, offered
from ouassister.store.database import Store
from ouassister.testing import clone as make_clone
from ouassister.testing import forwarded_port, guest_run
from ouassister.testing.channel import check_channel
from ouassister.testing.guest import Recipe
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

KNOCK = ["/bin/bash", "-c", "echo knock >/dev/udp/10.0.2.2/9"]
_LEFT = "oua-extra; dpkg --audit; ls -d /var/lib/.ouassister-* 2>/dev/null"
KEYS = "cat /etc/ssh/ssh_host_*_key.pub"


@pytest.fixture(scope="module")
def managed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared guest with a management network, and our helper on a port. Read only."""
    need("ssh-keygen")
    network = with_management(prepared, tmp_path_factory.mktemp("managed"))
    return with_port(network, tmp_path_factory.mktemp("port"))


@pytest.fixture
def sleeper(managed: Path, tmp_path: Path) -> Iterator[World]:
    """A fresh twin of it that every channel reaches."""
    toml = make_clone(managed, tmp_path / "sleeper")
    yield World(toml, tmp_path / "home")
    kill(vmtoml.load(toml))


def _host_keys(vm: RunningVM) -> tuple[str, ...]:
    lines = guest_run(vm, KEYS).stdout.decode().splitlines()
    return tuple(" ".join(line.split()[:2]) for line in lines)


def _only(world: World, channel: str) -> None:
    """Leave the VM with one channel."""
    config = world.config
    if channel != AGENT:
        config = replace(config, agent=None)
    if channel != PORT:
        config = replace(config, helper=None)
    if channel != SSH:
        config = replace(config, management=None)
    world.toml.write_text(vmtoml.dump(config))


def test_every_channel_keeps_the_rules_and_comes_back_when_its_other_end_dies(
    sleeper: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with qemu.restore(sleeper.config, links_up=False) as vm:
        vm.cont()
        keys = _host_keys(vm)
        for name, end in (
            (AGENT, "systemctl restart qemu-guest-agent"),
            (PORT, "systemctl restart ouassister-port"),
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
        _check_cut_off(sleeper, vm, keys)


# Until the guest has more to say on both ports than anybody takes.
_HELD_BACK = """d=/sys/kernel/debug; mountpoint -q $d || mount -t debugfs d $d
until [ "$(cat $d/virtio-ports/vport* | grep -c 'outvq_full: 1')" = 2 ]; do sleep 0.1; done"""


def _check_cut_off(world: World, vm: RunningVM, keys: tuple[str, ...]) -> None:
    """A guest that falls asleep while helper and agent say what nobody reads answers afterwards."""
    vm.reach(Access(PORT))
    with pytest.raises(DeadlineError):
        vm.channel().run(["/bin/sh", "-c", "while :; do echo line; done"], timeout_s=5)
    agent = vm.qga()
    handle = agent.execute("guest-file-open", path="/dev/zero")
    with pytest.raises(DeadlineError):
        agent.execute("guest-file-read", handle=handle, count=8_000_000, timeout_s=0.01)
    vm.reach(Access(SSH, keys))
    assert vm.channel().run(["/bin/sh", "-c", _HELD_BACK], timeout_s=120).exit_status == 0
    world.config.save.unlink()
    vm.suspend()
    with qemu.restore(world.config, links_up=False) as again:
        again.cont()
        for name in (AGENT, PORT):
            again.reach(Access(name))
            begin = time.monotonic()
            done = again.channel().run(["/bin/echo", "awake"], timeout_s=120)
            assert done.stdout == b"awake\n"
            print(f"{name}: awake in {time.monotonic() - begin:.1f} s")
        again.kill()


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
        # The agent is ended before its answer, and starts anew with this. Not by SIGTERM: in its
        # handler qemu-ga may wait for ever for a lock of its own. And nothing is forked after it:
        # what is, as systemd ends the control group, may escape, and be waited for (0025).
        end = "sleep 60 & pkill -KILL -x qemu-ga; wait"
        with pytest.raises(ChannelError):
            guest_run(vm, f"echo '{conf}' >/etc/qemu/qemu-ga.conf; sync; {end}")
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

    sleeper.toml.write_text(vmtoml.dump(replace(both, agent=None, helper=None, management=None)))
    refused = sleeper.run("plan", "--install", "oua-extra")
    assert (refused.status, refused.code) == (23, "unsupported-guest"), refused
    assert "its description names none" in refused.value["error"]["message"]

    sleeper.toml.write_text(vmtoml.dump(replace(both, carried=True, helper=None)))
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


# Whoever restarts that service restarts the helper, with all that it has started.
_TIED = """d=/etc/systemd/system/ouassister-port.service.d; mkdir -p $d
printf '[Unit]\\nPartOf=oua-script.service\\n' >$d/tied.conf; systemctl daemon-reload; sync"""


def test_guest_whose_agent_may_run_nothing_is_updated_by_the_helper_that_ends_in_the_middle(
    sleeper: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with qemu.restore(sleeper.config, links_up=False) as vm:
        vm.cont()
        guest_run(vm, _TIED, timeout_s=120)
        sleeper.config.save.unlink()
        vm.suspend()
    _agent_forbids(sleeper)
    _only(sleeper, PORT)
    capture = with_capture(sleeper)
    before = sleeper.hashes()
    plan = sleeper.run("plan", "--install", "oua-daemon")
    assert (plan.status, plan.result["channel"]) == (0, PORT), plan
    update = sleeper.run("update", "--install", "oua-daemon", "--install", "oua-extra")
    assert update.status == 0, update
    assert update.result["channel"] == PORT
    assert sleeper.hashes() == before

    lost_channel.resume(sleeper, capture, monkeypatch)
    with qemu.attach(sleeper.config) as vm:
        vm.reach(Access(PORT))
        done = vm.channel().run(["/bin/sh", "-c", _LEFT], timeout_s=60)
        assert done.stdout == b"extra\n"
        vm.kill()


def test_helper_that_is_not_there_is_told_while_the_guest_sleeps(sleeper: World) -> None:
    with qemu.restore(sleeper.config, links_up=False) as vm:
        vm.cont()
        guest_run(vm, "systemctl stop ouassister-port; sync", timeout_s=120)
        sleeper.config.save.unlink()
        vm.suspend()
    _only(sleeper, PORT)
    refused = sleeper.run("plan", "--install", "oua-extra")
    assert (refused.status, refused.code) == (23, "unsupported-guest"), refused
    assert "no ouassister-port ran" in refused.value["error"]["message"]


# Debian's sudo, a user that it lets do everything, and one whom it asks for a password.
_USERS = """cd /root; dpkg -i sudo.deb >/dev/null
for user in deploy asked; do useradd -m -s /bin/bash $user; chmod go-w /home/$user
install -d -m 700 -o $user /home/$user/.ssh
install -m 600 -o $user /root/.ssh/authorized_keys /home/$user/.ssh/authorized_keys; done
echo 'deploy ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/deploy
echo 'asked ALL=(ALL) ALL' >/etc/sudoers.d/asked
printf 'PermitRootLogin no\\n' >/etc/ssh/sshd_config.d/no-root.conf; systemctl restart ssh; sync"""


def test_other_user_than_root_logs_in_and_sudo_runs_the_update(
    sleeper: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    archive = _archive("sudo", tmp_path)
    with qemu.restore(sleeper.config, links_up=False) as vm:
        vm.cont()
        vm.qga().write_file("/root/sudo.deb", archive.read_bytes(), timeout_s=120)
        guest_run(vm, _USERS, timeout_s=180)
        keys = _host_keys(vm)
        port, network = forwarded_port(vm, 22), vm.config.management
        assert network is not None
        channel = SshChannel(port, network.identity, keys, "deploy")
        check_channel(channel)
        channel.close()
        channel = SshChannel(port, network.identity, keys, "asked")
        with pytest.raises(ChannelError, match=r"sudo lets asked run nothing.*password"):
            channel.ping(timeout_s=60)
        channel.close()
        sleeper.config.save.unlink()
        vm.suspend()

    _only(sleeper, SSH)
    for user, words in (("root", "PermitRootLogin no"), ("nobody9", "has no user 'nobody9'")):
        _log_in_as(sleeper, user)
        refused = sleeper.run("plan", "--install", "oua-extra")
        assert (refused.status, refused.code) == (23, "unsupported-guest"), refused
        assert words in refused.value["error"]["message"]
    _log_in_as(sleeper, "deploy")
    update = sleeper.run("update", "--install", "oua-extra", "--install", "oua-live")
    assert update.status == 0, update
    assert any("whether sudo lets deploy" in note for note in update.result["notes"])
    resumed = sleeper.run("resume")
    assert resumed.status == 0, resumed
    assert resumed.result["staged"][0]["status"] == "installed"


def _log_in_as(world: World, user: str) -> None:
    network = world.config.management
    assert network is not None
    changed = replace(world.config, management=replace(network, user=user))
    world.toml.write_text(vmtoml.dump(changed))


def _archive(package: str, folder: Path) -> Path:
    """A package of the release that host and guest have, by the host's own apt."""
    if f"={Recipe().suite}\n" not in Path("/etc/os-release").read_text():
        lacking(f"the host is no Debian {Recipe().suite}, of which it would fetch {package}")
    # apt drops its privileges where it can.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "-q", "download", package]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lacking(f"apt-get cannot fetch {package}: {done.stderr[-300:]}")
    (archive,) = folder.glob(f"{package}_*.deb")
    return archive
