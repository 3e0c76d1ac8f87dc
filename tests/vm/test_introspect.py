"""What the save file tells of the sleeping guest, against what the guest tells itself."""

from __future__ import annotations

import shutil
import uuid
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import TruncatedStateError
from ouassister.kernel import introspect
from ouassister.memory import open_save
from ouassister.provider import qemu, vmtoml
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

_TASKS = """for p in /proc/[0-9]*; do
  exe=$(readlink $p/exe) || continue
  read -r _ _ _ ppid _ <$p/stat; echo "${p#/proc/} $ppid $exe"
done"""


@pytest.fixture(scope="module")
def sample(suspended: Path) -> Path:
    return vmtoml.load(suspended).save


def test_inspect_says_what_the_live_guest_says(clone: Path) -> None:
    config = vmtoml.load(clone)
    with open_save(config.save) as save:
        view = introspect(save)
    with qemu.restore(config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        boot_id = guest_run(vm, "cat /proc/sys/kernel/random/boot_id").stdout.decode().strip()
        uts = guest_run(vm, "uname -snrvm").stdout.decode().strip()
        mounts = guest_run(vm, "cat /proc/1/mounts").stdout.splitlines()
        tasks = guest_run(vm, _TASKS, check=False).stdout.decode().splitlines()
        cpus = guest_run(vm, "nproc").stdout
        uptime = float(guest_run(vm, "cat /proc/uptime").stdout.split()[0])
    ours = view.uts
    told = (ours.sysname, ours.nodename, ours.release, ours.version, ours.machine)
    assert " ".join(told) == uts
    assert view.boot_id == boot_id
    assert view.cpus == int(cpus)
    assert 0 <= uptime - view.uptime_s < 120
    live_mounts = {tuple(line.split(b" ")[:3]) for line in mounts}
    assert {(m.source, m.target, m.fstype.encode()) for m in view.mounts} == live_mounts
    live = {}
    for line in tasks:
        pid, parent, exe = line.split(" ", 2)
        live[int(pid)] = (int(parent), exe.encode())
    for task in view.tasks:
        if task.exe is not None and task.pid in live:
            assert (task.parent, task.exe) == live[task.pid]
    gone = {task.comm for task in view.tasks if task.exe and task.pid not in live}
    assert gone <= {b"(udev-worker)"}  # workers of udevd end by themselves


def test_save_of_real_guest_tells_its_kernel(sample: Path) -> None:
    with open_save(sample) as save:
        view = introspect(save)
    assert view.degraded == ()
    assert view.uts.sysname == "Linux"
    assert str(uuid.UUID(view.boot_id)) == view.boot_id
    assert 0 < view.uptime_s < 86400
    assert view.suspended_at_s > 1_700_000_000
    assert view.cpus >= 1
    by_exe = {task.exe for task in view.tasks}
    assert {b"/usr/lib/systemd/systemd", b"/usr/sbin/nginx", b"/usr/sbin/sshd"} <= by_exe
    init = next(task for task in view.tasks if task.pid == 1)
    assert (init.parent, init.comm, init.kernel_thread) == (0, b"systemd", False)
    for task in view.tasks:
        assert not task.kernel_thread or (task.exe, task.cmdline) == (None, ())
    root = next(mount for mount in view.mounts if mount.target == b"/")
    assert root.fstype == "ext4"
    assert root.block is not None


@pytest.mark.parametrize("part", [0.0001, 0.3, 0.9, 0.9999])
def test_save_of_real_guest_cut_short_is_truncated(
    sample: Path, tmp_path: Path, part: float
) -> None:
    size = int(sample.stat().st_size * part)
    with sample.open("rb") as source, (tmp_path / "cut").open("wb") as target:
        shutil.copyfileobj(source, target)
        target.truncate(size)
    with pytest.raises(TruncatedStateError, match=f"{size:#x}"):
        open_save(tmp_path / "cut")
