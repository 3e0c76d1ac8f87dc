"""Every way in which a resume fails: no frame leaves while the gate is closed.

Test by test: the applier killed, `test_interrupted.py`; the verification failed and a signal while
the policy waits, ouassister killed, `test_gate.py`; the rest is here. In each, the guest sends a
frame to both its networks many times a second from its first program on, and is heard as soon as
a link is up.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.vm.world import World

from ouassister.changeset import archive
from ouassister.demo.frames import count_frames
from ouassister.errors import DeadlineError, OUassisterError
from ouassister.interrupts import interruptible
from ouassister.model import Action
from ouassister.provider import qemu, vmtoml
from ouassister.provider.qemu import RunningVM
from ouassister.provider.qga import Qga
from ouassister.provider.vmtoml import VmConfig
from ouassister.reflect import reflection, verify
from ouassister.reflect.gate import OnFailure
from ouassister.store.database import ChangesetState, Store
from ouassister.testing import clone as make_clone
from ouassister.testing import guest_run
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ouassister.model import ResumeReport

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

_APART: Final = "user,id=net1,ipv6=off,net=10.9.0.0/24"
_KNOCKER: Final = """
use Socket; socket(S, AF_INET, SOCK_DGRAM, 0);
while (1) {
    send(S, "knock", 0, pack_sockaddr_in(9, inet_aton($_))) for ("10.0.2.2", "10.9.0.2");
    select(undef, undef, undef, 0.05);
}
"""
_FILL: Final = (
    "n=0; for size in 1024M 256M 64M 16M 4M 1M 64K 4K; do"
    " while fallocate -l $size /fill$n 2>/dev/null; do n=$((n + 1)); done; done"
)
_HOLD: Final = """
perl -e 'use Fcntl; open(F, ">>", "/var/lib/dpkg/lock-frontend") or die;
$lock = pack("s s x4 l! l! i x4", F_WRLCK, 0, 0, 0, 0);
fcntl(F, F_SETLK, $lock) or die; open(G, ">", "/run/held"); close(G); sleep 600
' </dev/null >/dev/null 2>&1 &
until test -e /run/held; do sleep 0.1; done
"""
_UNMARK: Final = "rm /var/lib/ouassister/applied"


@dataclass(frozen=True)
class Asleep:
    """A guest with two networks, asleep, and a change set for it."""

    toml: Path
    changeset_id: str
    changesets: Path


@pytest.fixture(scope="module")
def asleep(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Asleep:
    folder = tmp_path_factory.mktemp("failing")
    toml = make_clone(prepared, folder / "vm")
    config = vmtoml.load(toml)
    device = {"driver": "virtio-net-pci", "netdev": "net1", "id": "nic1", "addr": "9"}
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            kind, *words = _APART.split(",")
            back_end = dict(word.split("=") for word in words) | {"type": kind, "ipv6": False}
            vm.qmp.execute_with("netdev_add", dict(back_end))
            vm.qmp.execute_with("device_add", {**device, "bus": "pci.0"})
            guest_run(
                vm,
                "until ip link set eth1 up; do sleep 0.1; done;"
                " ip address add 10.9.0.15/24 dev eth1",
            )
            config.save.unlink()  # a link to the other guest's
            vm.suspend()
        except BaseException:
            vm.kill()
            raise
    front_end = ",".join([device.pop("driver"), *(f"{k}={v}" for k, v in device.items())])
    command = (*config.command, "-netdev", _APART, "-device", f"{front_end},bus=pci.0")
    for netdev in ("net0", "net1"):
        command += ("-object", f"filter-dump,id=dump-{netdev},netdev={netdev},file={netdev}.pcap")
    apart = vmtoml.Net("nic1", "net1", quarantine=True)
    toml.write_text(vmtoml.dump(replace(config, command=command, nets=(*config.nets, apart))))
    world = World(toml, folder / "home")
    update = world.run("update", "--install", "oua-extra")
    assert update.status == 0, update
    with Store(world.home) as store:
        return Asleep(toml, update.result["changeset_id"], store.changesets(world.config.name))


@dataclass
class Resume:
    """One twin of that guest, resumed with something in the way."""

    config: VmConfig
    asleep: Asleep
    folder: Path
    states: list[ChangesetState]
    actions: tuple[Action, ...] = ()

    def __call__(self, policy: OnFailure) -> ResumeReport:
        changeset, layer = archive.load(self.asleep.changesets, self.asleep.changeset_id)
        return reflection.reflect(
            self.config,
            replace(changeset, actions=(*changeset.actions, *self.actions)),
            layer,
            self.folder,
            Timeline(),
            on_state=self.states.append,
            again=False,
            on_failure=policy,
        )

    def frames(self) -> tuple[int, int]:
        """So far, on the guest's network and on that of the quarantine."""
        main, apart = (count_frames(self.config.folder / f"net{n}.pcap") for n in (0, 1))
        return main, apart

    def await_frames(self) -> tuple[bool, bool]:
        """What is heard of the guest by now; it knocks all the time."""
        end = time.monotonic() + 30
        while not any(self.frames()):
            assert time.monotonic() < end, "nobody knocks"
            time.sleep(0.05)  # between two looks
        main, apart = self.frames()
        return main > 0, apart > 0


@pytest.fixture
def resume(asleep: Asleep, tmp_path: Path) -> Iterator[Resume]:
    config = vmtoml.load(make_clone(asleep.toml, tmp_path / "twin"))
    yield Resume(config, asleep, tmp_path, [])
    if qemu.is_running(config):
        with qemu.attach(config) as vm:
            vm.kill()


def _first(script: str, patch: pytest.MonkeyPatch) -> None:
    """The guest knocks, and then does something, before the applier is asked for."""
    cont = RunningVM.cont

    def continued(self: RunningVM) -> None:
        cont(self)
        guest_run(
            self, ["/bin/sh", "-c", 'perl -e "$1" </dev/null >/dev/null 2>&1 &', "", _KNOCKER]
        )
        guest_run(self, script, timeout_s=120)

    patch.setattr(RunningVM, "cont", continued)


def _silent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reflection, "APPLY_S", 3.0)
    _first("true", patch)
    cont = RunningVM.cont

    def stopped(self: RunningVM) -> None:
        cont(self)
        with pytest.raises(DeadlineError):  # it stops itself: its own answer is the first to miss
            guest_run(self, "kill -STOP $(pidof qemu-ga)", timeout_s=2)

    patch.setattr(RunningVM, "cont", stopped)


def _signalled(patch: pytest.MonkeyPatch) -> None:
    _first("true", patch)
    start = Qga.start

    def started(self: Qga, argv: Sequence[str], **more: bytes | float) -> int:
        pid = start(self, argv, **more)  # type: ignore[arg-type]
        if "apply" in argv:
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    patch.setattr(Qga, "start", started)


def _unmarked(patch: pytest.MonkeyPatch) -> None:
    _first("true", patch)
    command = verify.command

    def after(*arguments: Any) -> list[str]:  # noqa: ANN401 - handed on
        argv = command(*arguments)
        return [*argv[:2], f"{_UNMARK}\n{argv[2]}", *argv[3:]]

    patch.setattr(verify, "command", after)


CLOSED: Final = OnFailure()
APART: Final = OnFailure(quarantine=True)
CASES: Final[dict[str, tuple[Callable[[pytest.MonkeyPatch], None], OnFailure, int, str]]] = {
    "conflict": (lambda p: _first("echo mine >/usr/bin/oua-extra", p), APART, 21, "conflict"),
    "locked": (lambda p: _first(_HOLD, p), APART, 22, "locked"),
    "full": (lambda p: _first(_FILL, p), CLOSED, 40, "could not write what starts"),
    "nearly full": (
        lambda p: _first(f"fallocate -l 16K /room; {_FILL}; rm /room", p),
        CLOSED,
        40,
        "space",
    ),
    "agent silent": (_silent, CLOSED, 41, "did not answer"),
    "signal": (_signalled, CLOSED, 41, "SIGTERM"),
    "verification": (_unmarked, APART, 41, "the VM is in quarantine"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_frame_leaves_before_a_link_is_opened_after_a_failure(
    resume: Resume, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    hinder, policy, status, words = CASES[case]
    quarantined = case == "verification"
    if quarantined:  # without an action the applier is the verification
        resume.actions = (Action(("/bin/true",)),)
    with monkeypatch.context() as patch, interruptible():
        hinder(patch)
        with pytest.raises(OUassisterError, match=words) as caught:
            resume(policy)
    assert caught.value.exit_status == status
    if quarantined:
        assert resume.await_frames() == (False, True)
    assert resume.frames()[0] == 0
    if not quarantined:
        assert resume.frames()[1] == 0
        with qemu.attach(resume.config) as vm:  # who knocks was there all the time
            vm.set_links(up=True)
        assert resume.await_frames() == (True, False)


def test_action_that_fails_does_not_open_the_gate_before_its_time(
    resume: Resume, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[int, int]] = []
    set_links = RunningVM.set_links

    def watched(self: RunningVM, *, up: bool) -> None:
        if up:
            opened.append(resume.frames())
        set_links(self, up=up)

    _first("true", monkeypatch)
    monkeypatch.setattr(RunningVM, "set_links", watched)
    resume.actions = (Action(("/bin/false",)),)
    report = resume(APART)
    assert report.failed_actions == ("/bin/false: status 1",)
    assert opened == [(0, 0)]
    assert resume.await_frames() == (True, False)
    assert resume.states[-1] is ChangesetState.APPLIED


def test_medium_that_qemu_refuses_leaves_the_vm_asleep_without_a_frame(resume: Resume) -> None:
    save = resume.config.save
    resume.config = replace(resume.config, medium_bus="nowhere")
    with pytest.raises(OUassisterError, match="QEMU refused device_add") as caught:
        resume(APART)
    assert caught.value.exit_status == 20
    assert resume.states == [ChangesetState.APPLYING, ChangesetState.READY]
    assert (qemu.is_running(resume.config), save.exists()) == (False, True)
    assert resume.frames() == (0, 0)


def test_stale_change_set_starts_no_vm(asleep: Asleep) -> None:
    world = World(asleep.toml, asleep.changesets.parents[2])
    disk = world.config.disks[0].path
    disk.chmod(disk.stat().st_mode)  # its change time is another's
    done = world.run("resume", "--on-failure", "quarantine")
    assert (done.status, done.code) == (21, "stale"), done
    assert not qemu.is_running(world.config)
    assert not (world.config.folder / "net0.pcap").exists()
