"""Everything that forbids an update, each with a guest that it is true of."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ouassister.disk.storage import RootDevice
from ouassister.errors import (
    DirtyDatabaseError,
    LockedError,
    NotSuspendedError,
    RunningVMError,
    UnsupportedGuestError,
)
from ouassister.model import (
    BlockRange,
    CachedFile,
    Fence,
    FileLock,
    FileStamp,
    GuestPid,
    GuestView,
    Mount,
    Task,
    Uts,
)
from ouassister.provider.vmtoml import Disk, VmConfig
from ouassister.sleeping import Sleeping, open_sleeping, refuse_running, refuse_unsafe, root_device

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STAMP = FileStamp("/vms/web1.save", 1, 2, 3, 4, 5, "ab")
SYSTEMD = Task(
    GuestPid(1), GuestPid(0), b"systemd", "S", 0, b"/usr/lib/systemd/systemd", (), 1, False
)
ROOT = Mount(b"/dev/root", b"/", "ext4", 254, 1, False, BlockRange("vda", 1 << 20, 1 << 30))
PROC = Mount(b"proc", b"/proc", "proc", 0, 20, False)
STATUS = CachedFile(b"/var/lib/dpkg/status", 77, 0o100644, 1000, 5, dirty=False)
CLEAN = GuestView(
    uts=Uts("Linux", "web1", "6.1.0", "#1", "x86_64", "(none)"),
    boot_id="",
    suspended_at_s=1,
    uptime_s=1,
    cpus=1,
    memory_bytes=1 << 29,
    tasks=(SYSTEMD,),
    mounts=(ROOT, PROC),
    locks=(FileLock(b"/run/systemd/private", "flock", GuestPid(1), write=True),),
    database=(STATUS,),
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
    return Sleeping(config, replace(CLEAN, **changes), Fence(STAMP, ()))  # type: ignore[arg-type]


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
    held = FileLock(path, kind, GuestPid(7), write=True)
    with pytest.raises(LockedError, match=f"pid 7 held {path.decode()} when"):
        refuse_unsafe(sleeping(config, locks=(*CLEAN.locks, held)))


def test_dirty_database_is_refused_and_counted(config: VmConfig) -> None:
    dirty = replace(STATUS, dirty=True)
    other = replace(dirty, path=b"/var/lib/dpkg/info/\x1b.list")
    with pytest.raises(DirtyDatabaseError, match=r"in memory: /var/lib/dpkg/status$"):
        refuse_unsafe(sleeping(config, database=(STATUS, dirty)))
    with pytest.raises(DirtyDatabaseError, match=r"/info/\\x1b\.list, /var/lib/dpkg/status$"):
        refuse_unsafe(sleeping(config, database=(other, STATUS, dirty)))
    with pytest.raises(DirtyDatabaseError, match=r"status and 2 more$"):
        refuse_unsafe(sleeping(config, database=(dirty,) * 5))


@pytest.mark.parametrize(
    "unknown", ["package database: no dentries", "uncommitted changes: xfs: unread"]
)
def test_kernel_that_cannot_tell_is_unsupported(config: VmConfig, unknown: str) -> None:
    with pytest.raises(UnsupportedGuestError, match="cannot be told"):
        refuse_unsafe(sleeping(config, degraded=(unknown,)))


# --- the root file system ---


def test_root_device_is_where_the_kernel_says(config: VmConfig) -> None:
    found = root_device(sleeping(config))
    assert found == RootDevice(config.disks[0].path, "qcow2", 1 << 20, 1 << 30)


def test_root_that_was_mounted_last_counts(config: VmConfig) -> None:
    initial = Mount(b"rootfs", b"/", "rootfs", 0, 2, False)
    assert root_device(sleeping(config, mounts=(initial, ROOT, PROC))).start == 1 << 20


def test_bind_mount_of_the_root_is_no_other_file_system(config: VmConfig) -> None:
    bound = replace(ROOT, target=b"/srv/data")
    assert root_device(sleeping(config, mounts=(ROOT, bound))).size == 1 << 30


@pytest.mark.parametrize(
    ("mounts", "what"),
    [
        ((), "is not on a disk"),
        ((PROC,), "is not on a disk"),
        ((replace(ROOT, block=None),), "is not on a disk"),
        ((replace(ROOT, fstype="xfs"),), "is xfs, not ext4"),
        ((ROOT, replace(ROOT, fstype="btrfs", minor=2)), "is btrfs, not ext4"),
        (
            (ROOT, replace(ROOT, target=b"/boot", source=b"/dev/vda2", minor=2)),
            r"/boot is a file system of its own \(ext4 on /dev/vda2\)",
        ),
    ],
)
def test_other_layouts_are_unsupported(
    config: VmConfig, mounts: tuple[Mount, ...], what: str
) -> None:
    with pytest.raises(UnsupportedGuestError, match=what):
        root_device(sleeping(config, mounts=mounts))


def test_one_of_several_disks_is_chosen_by_its_name_in_the_guest(config: VmConfig) -> None:
    first = config.disks[0]
    named = replace(first, node="disk1", path=config.folder / "b.raw", format="raw", guest="vda")
    two = replace(config, disks=(replace(first, guest="vdb"), named))
    assert root_device(sleeping(two)).image == named.path
    for guests in (("", ""), ("vdb", "vdc"), ("vda", "vda")):
        disks = tuple(
            replace(disk, guest=guest) for disk, guest in zip(two.disks, guests, strict=True)
        )
        with pytest.raises(UnsupportedGuestError, match="which disk is vda") as caught:
            root_device(sleeping(replace(config, disks=disks)))
        assert 'guest = "vda"' in caught.value.hint


# --- the host forbids it ---


def test_vm_without_save_file_is_not_suspended(config: VmConfig) -> None:
    with pytest.raises(NotSuspendedError, match=r"has no save file .*web1\.save"):
        open_sleeping(config).__enter__()


@pytest.mark.parametrize("refused_by", [refuse_running, lambda one: open_sleeping(one).__enter__()])
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
