"""A real suspended guest is restored behind a closed gate, driven, and suspended again."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import (
    AgentError,
    DeadlineError,
    NotSuspendedError,
    OUassisterError,
    QemuLostError,
    RunningVMError,
    StateError,
    UsageError,
)
from ouassister.provider import qemu, sockets, vmtoml
from ouassister.provider.backing import backing_chain
from ouassister.provider.qga import Qga
from ouassister.testing import guest_run, http_get

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

PCAP_HEADER = 24  # bytes of a capture without frames
SEND = "for i in 1 2 3; do echo hello > /dev/udp/10.0.2.2/9; done"
NGINX = "cat /proc/sys/kernel/random/boot_id /run/nginx.pid"


def _pids_of(config: vmtoml.VmConfig) -> list[int]:
    """Processes whose working directory is the VM's folder: its QEMU, if any."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - numbers, not paths
        try:
            if name.isdigit() and os.readlink(f"/proc/{name}/cwd") == str(config.folder):  # noqa: PTH115
                found.append(int(name))
        except OSError:
            continue  # ended meanwhile
    return found


def _stamp(path: Path) -> tuple[str, int, int, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    stat = path.stat()
    return digest, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def test_guest_serves_after_restore_and_again_after_a_second_suspension(clone: Path) -> None:
    config = vmtoml.load(clone)
    vm = qemu.restore(config, links_up=False)
    assert vm.status() == "paused"
    assert qemu.is_running(config)
    agent = vm.qga()
    vm.cont()
    agent.ping(timeout_s=30)
    assert agent.enabled("guest-exec", "guest-exec-status")
    before = guest_run(vm, NGINX).stdout
    vm.set_links(up=True)
    assert b"nginx" in http_get(vm)
    vm.suspend()
    assert not qemu.is_running(config)
    assert not config.qmp.exists()

    with qemu.restore(config, links_up=True) as vm:
        vm.cont()
        assert b"nginx" in http_get(vm)
        assert guest_run(vm, NGINX).stdout == before
        vm.quit()
    assert _pids_of(config) == []


def test_a_clone_leaves_the_original_as_it_was(suspended: Path, clones: Callable[[], Path]) -> None:
    original = vmtoml.load(suspended)
    files = [original.save, *backing_chain(original.disks[0])]
    before = [_stamp(path) for path in files]
    vms = [qemu.restore(vmtoml.load(clones()), links_up=True) for _ in range(2)]
    for vm in vms:
        vm.cont()
    for vm in vms:
        assert b"nginx" in http_get(vm)
        guest_run(vm, "echo changed > /etc/motd; sync")
        vm.suspend()
    assert [_stamp(path) for path in files] == before


def test_no_frame_passes_while_the_links_are_down(clone: Path, tmp_path: Path) -> None:
    capture = tmp_path / "frames.pcap"
    with qemu.restore(vmtoml.load(clone), links_up=False) as vm:
        vm.add_frame_capture("net0", capture)
        vm.cont()
        # The guest tries to send, and a host tries to reach it.
        guest_run(vm, ["/bin/bash", "-c", SEND], check=False)
        with pytest.raises(DeadlineError):
            http_get(vm, timeout_s=1)
        assert "NO-CARRIER" in guest_run(vm, "ip link show eth0").stdout.decode()
        assert capture.stat().st_size == PCAP_HEADER

        vm.set_links(up=True)
        guest_run(vm, ["/bin/bash", "-c", SEND])
        http_get(vm)
        assert capture.stat().st_size > PCAP_HEADER
        vm.quit()


def test_link_that_stays_down_is_not_opened_with_the_gate(clone: Path, tmp_path: Path) -> None:
    config = vmtoml.load(clone)
    nets = tuple(replace(net, stays_down=True) for net in config.nets)
    with qemu.restore(replace(config, nets=nets), links_up=False) as vm:
        vm.add_frame_capture("net0", tmp_path / "frames.pcap")
        vm.set_links(up=True)
        vm.cont()
        guest_run(vm, ["/bin/bash", "-c", SEND], check=False)
        assert (tmp_path / "frames.pcap").stat().st_size == PCAP_HEADER
        vm.kill()


def test_truncated_save_is_refused_and_leaves_no_process(clone: Path) -> None:
    config = vmtoml.load(clone)
    whole = config.save.read_bytes()
    config.save.unlink()
    config.save.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(QemuLostError, match="cannot load") as caught:
        qemu.restore(config, links_up=False)
    # QEMU's own words reach the user.
    assert "load" in caught.value.message.split(str(config.save))[1]
    assert _pids_of(config) == []
    assert not qemu.is_running(config)


def test_garbage_for_a_save_is_refused_and_leaves_no_process(clone: Path) -> None:
    config = vmtoml.load(clone)
    config.save.unlink()
    config.save.write_bytes(b"not a migration stream\n" * 100)
    with pytest.raises(QemuLostError, match="cannot load"):
        qemu.restore(config, links_up=False)
    assert _pids_of(config) == []


def test_missing_save_is_refused(clone: Path) -> None:
    config = vmtoml.load(clone)
    config.save.unlink()
    with pytest.raises(NotSuspendedError):
        qemu.restore(config, links_up=False)
    assert _pids_of(config) == []


def test_command_that_qemu_rejects_tells_why(clone: Path) -> None:
    config = vmtoml.load(clone)
    with pytest.raises(QemuLostError, match="no-such-option"):
        qemu.restore(config, links_up=False, extra_args=("-no-such-option",))
    assert _pids_of(config) == []


def test_running_vm_is_not_restored_twice(clone: Path) -> None:
    config = vmtoml.load(clone)
    with qemu.restore(config, links_up=False) as vm:
        with pytest.raises(RunningVMError):
            qemu.restore(config, links_up=False)
        assert _pids_of(config) == [vm.pid]
        assert vm.status() == "paused"
        vm.quit()


def test_qemu_outlives_its_starter(clone: Path) -> None:
    config = vmtoml.load(clone)
    with pytest.raises(StateError, match="no QEMU"):
        qemu.attach(config)
    starter = (
        "import sys; from pathlib import Path; from ouassister.provider import qemu, vmtoml;"
        "vm = qemu.restore(vmtoml.load(Path(sys.argv[1])), links_up=False); print(vm.pid)"
    )
    told = subprocess.run(
        [sys.executable, "-c", starter, str(clone)], capture_output=True, check=True, timeout=300
    )
    with qemu.attach(config) as vm:
        assert vm.pid == int(told.stdout)
        vm.cont()
        vm.qga().ping(timeout_s=30)
        vm.suspend()
    assert _pids_of(config) == []


def test_failed_suspension_leaves_the_guest_running_and_no_file(
    clone: Path, tmp_path: Path
) -> None:
    with qemu.restore(vmtoml.load(clone), links_up=False) as vm:
        vm.cont()
        target = tmp_path / "full.save"
        target.with_name("full.save.part").symlink_to("/dev/full")
        with pytest.raises(StateError, match="could not save"):
            vm.suspend(target)
        assert vm.status() == "running"
        vm.qga().ping(timeout_s=30)
        assert not target.exists()
        vm.quit()


def test_medium_is_seen_by_the_guest_and_let_go(clone: Path, tmp_path: Path) -> None:
    medium = tmp_path / "medium,with=comma.img"
    medium.write_bytes(os.urandom(2 << 20))
    digest = hashlib.sha256(medium.read_bytes()).hexdigest()
    with qemu.restore(vmtoml.load(clone), links_up=False) as vm:
        with pytest.raises(UsageError, match="20 bytes"):
            vm.attach_medium(medium, "x" * 21)
        vm.attach_medium(medium, "OUA-0123")
        agent = vm.qga()
        begin = time.monotonic()
        vm.cont()
        wait = "while ! [ -b /dev/vdb ]; do read -t 0.005 <&9; done 9<> <(:); cat /sys/block/vdb/"
        result = agent.run(["/bin/bash", "-c", f"{wait}{{serial,ro}}"], timeout_s=60)
        print(f"medium visible {time.monotonic() - begin:.2f} s after cont")
        assert result.stdout.replace(b"\n", b"") == b"OUA-01231"
        assert digest in guest_run(vm, "sha256sum /dev/vdb").stdout.decode()
        assert guest_run(vm, "echo > /dev/vdb", check=False).exit_status != 0
        vm.detach_medium()
        guest_run(vm, "! [ -e /sys/block/vdb ]")
        vm.attach_medium(medium, "OUA-0123")  # all of it is gone: the names are free again
        vm.detach_medium()
        vm.quit()


def test_medium_that_cannot_be_opened_leaves_nothing_behind(clone: Path, tmp_path: Path) -> None:
    with qemu.restore(vmtoml.load(clone), links_up=False) as vm:
        with pytest.raises(OUassisterError, match="No such file"):
            vm.attach_medium(tmp_path / "missing.img", "S")
        (tmp_path / "medium.img").write_bytes(bytes(1 << 20))
        vm.attach_medium(tmp_path / "medium.img", "S")
        vm.quit()


def test_agent_reports_exit_signal_output_and_input(clone: Path) -> None:
    with qemu.restore(vmtoml.load(clone), links_up=False) as vm:
        vm.cont()
        agent = vm.qga()
        result = agent.run(["/bin/sh", "-c", "cat; echo e >&2; exit 7"], stdin=b"in", timeout_s=60)
        assert (result.exit_status, result.stdout, result.stderr) == (7, b"in", b"e\n")
        result = agent.run(["/bin/sh", "-c", "kill -9 $$"], timeout_s=60)
        assert result.exit_status == -9
        with pytest.raises(AgentError, match="guest-exec"):
            agent.run(["/no/such/program"], timeout_s=60)
        with pytest.raises(DeadlineError):
            agent.run(["/bin/sleep", "60"], timeout_s=1)
        with pytest.raises(StateError, match="status 3"):
            guest_run(vm, "exit 3")
        vm.quit()


def test_agent_drops_what_an_earlier_client_left(clone: Path) -> None:
    config = vmtoml.load(clone)
    assert config.agent is not None
    with qemu.restore(config, links_up=False) as vm:
        vm.cont()
        with sockets.connect(config.agent) as rude:
            rude.sendall(b'{"execute":"guest-info"}\n{"execute":"guest-pi')
            rude.recv(1, socket.MSG_PEEK)  # the reply is under way
        with Qga(config.agent) as agent:
            agent.ping(timeout_s=30)
            assert agent.run(["/bin/echo", "mine"], timeout_s=60).stdout == b"mine\n"
        vm.quit()


def test_paused_guest_lets_the_agent_run_into_its_deadline(clone: Path) -> None:
    with qemu.restore(vmtoml.load(clone), links_up=False) as vm:
        with pytest.raises(DeadlineError):
            vm.qga().ping(timeout_s=0.3)
        vm.cont()
        vm.qga().ping(timeout_s=30)  # the late reply is not taken for this one's
        vm.quit()


def test_closed_connection_is_named(clone: Path) -> None:
    vm = qemu.restore(vmtoml.load(clone), links_up=False)
    vm.quit()
    with pytest.raises(QemuLostError):
        vm.status()
