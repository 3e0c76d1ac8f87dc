"""Everything that forbids an update, each with a guest that it is true of."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ouassister.disk.layout import Layout, Volume
from ouassister.errors import (
    LockedError,
    NotSuspendedError,
    RunningVMError,
    UnsupportedGuestError,
)
from ouassister.guest_model import HeldLock
from ouassister.looking import look_at
from ouassister.model import (
    BlockRange,
    Fence,
    FileStamp,
    GuestPid,
    GuestView,
    Mount,
    Task,
    Uts,
)
from ouassister.provider.vmtoml import Disk, VmConfig
from ouassister.sleeping import Memory, Sleeping, open_sleeping, refuse_running, refuse_unsafe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STAMP = FileStamp("/vms/web1.save", 1, 2, 3, 4, 5, "ab")
SYSTEMD = Task(
    GuestPid(1), GuestPid(0), b"systemd", "S", 0, b"/usr/lib/systemd/systemd", (), 1, False
)
ROOT = Mount(b"/dev/root", b"/", "ext4", 254, 1, False, BlockRange("vda", 1 << 20, 1 << 30))
PROC = Mount(b"proc", b"/proc", "proc", 0, 20, False)


def lock(path: bytes, kind: str, pid: int) -> HeldLock:
    return HeldLock(kind, True, GuestPid(pid), path, 254, 1, 77, 0, None)


CLEAN = GuestView(
    uts=Uts("Linux", "web1", "6.1.0", "#1", "x86_64", "(none)"),
    boot_id="",
    suspended_at_s=1,
    uptime_s=1,
    cpus=1,
    memory_bytes=1 << 29,
    tasks=(SYSTEMD,),
    mounts=(ROOT, PROC),
    held_locks=(lock(b"/run/systemd/private", "flock", 1),),
)


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    disk = tmp_path / "a.qcow2"
    disk.write_bytes(bytes(512))
    return VmConfig(
        source=tmp_path / "vm.toml",
        folder=tmp_path,
        name="web1",
        save=tmp_path / "web1.save",
        command=("qemu-system-x86_64",),
        qmp=tmp_path / "qmp.sock",
        agent=None,
        disks=(Disk("disk0", disk, "qcow2"),),
        nets=(),
    )


def sleeping(config: VmConfig, **changes: object) -> Sleeping:
    view = replace(CLEAN, **changes)  # type: ignore[arg-type]
    memory = Memory(None, None)  # type: ignore[arg-type]  # nobody asks it
    return Sleeping(config, memory, view, Fence(STAMP, ()), Layout((), ()), {})


# --- memory forbids it ---


def test_quiet_guest_is_safe(config: VmConfig) -> None:
    refuse_unsafe(sleeping(config))
    refuse_unsafe(sleeping(config, degraded=("mounts: no cgroups",)))


@pytest.mark.parametrize("exe", [b"/usr/bin/dpkg", b"/usr/bin/apt", b"/usr/bin/apt-get"])
def test_running_updater_is_locked(config: VmConfig, exe: bytes) -> None:
    updater = replace(SYSTEMD, pid=GuestPid(812), exe=exe)
    with pytest.raises(LockedError, match=rf"{exe.decode()} \(pid 812\) was running") as caught:
        refuse_unsafe(sleeping(config, tasks=(SYSTEMD, updater)))
    assert "let it finish" in caught.value.hint


@pytest.mark.parametrize("kind", ["posix", "flock"])
@pytest.mark.parametrize(
    "path", [b"/var/lib/dpkg/lock-frontend", b"/var/lib/dpkg/lock", b"/var/cache/apt/archives/lock"]
)
def test_held_lock_is_locked(config: VmConfig, path: bytes, kind: str) -> None:
    held = lock(path, kind, 7)
    with pytest.raises(LockedError, match=f"pid 7 held {path.decode()} when"):
        refuse_unsafe(sleeping(config, held_locks=(held,)))


def test_kernel_that_does_not_tell_of_locks_is_unsupported(config: VmConfig) -> None:
    unread = sleeping(config, held_locks=None, degraded=("locks: no types",))
    with pytest.raises(UnsupportedGuestError, match="cannot be told: locks: no types"):
        refuse_unsafe(unread)


def test_frozen_guest_is_not_updated(config: VmConfig) -> None:
    frozen = replace(sleeping(config), frozen=("vdb1",))
    with pytest.raises(UnsupportedGuestError, match="vdb1 is frozen") as caught:
        refuse_unsafe(frozen)
    assert "fsfreeze -u" in caught.value.hint


@pytest.mark.parametrize("fstype", ["xfs", "btrfs"])
def test_labels_of_selinux_are_supported_on_ext4_alone(config: VmConfig, fstype: str) -> None:
    volumes = (Volume("vda1", 254, 1, "ext4", ()), Volume("vdb1", 254, 17, fstype, ()))
    guest = replace(sleeping(config), labelled=True, layout=Layout(volumes[:1], ()))
    refuse_unsafe(guest)
    with pytest.raises(UnsupportedGuestError, match=f"SELinux policy, and vdb1 is {fstype}") as one:
        refuse_unsafe(replace(guest, layout=Layout(volumes, ())))
    assert "awake" in one.value.hint
    refuse_unsafe(replace(guest, labelled=False, layout=Layout(volumes, ())))


def opens(config: VmConfig) -> None:
    open_sleeping(config).__enter__()


def looks(config: VmConfig) -> None:
    look_at(config, frozenset())


@pytest.mark.parametrize("refused_by", [opens, looks])
def test_vm_without_save_file_is_not_suspended(
    config: VmConfig, refused_by: Callable[[VmConfig], object]
) -> None:
    with pytest.raises(NotSuspendedError, match=r"has no save file .*web1\.save"):
        refused_by(config)


@pytest.mark.parametrize("refused_by", [refuse_running, opens, looks])
def test_listening_qemu_is_running(
    config: VmConfig, monkeypatch: pytest.MonkeyPatch, refused_by: Callable[[VmConfig], object]
) -> None:
    monkeypatch.chdir(config.folder)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("qmp.sock")
        refuse_running(config)  # bound, but nobody listens
        listener.listen()
        with pytest.raises(RunningVMError, match="web1 is running"):
            refused_by(config)
    refuse_running(config)  # the socket of a QEMU that was killed


def test_disk_open_for_writing_is_running(config: VmConfig) -> None:
    refuse_running(config)
    descriptor = os.open(config.disks[0].path, os.O_RDWR)
    byte = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 101, 1, 0)
    fcntl.fcntl(descriptor, 37, byte)  # F_OFD_SETLK, as QEMU announces that it writes
    with pytest.raises(RunningVMError):
        refuse_running(config)
    os.close(descriptor)
    refuse_running(config)
