"""A VM as it sleeps: opened for reading, and everything that forbids an update."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ouassister import kernel
from ouassister.disk.storage import RootDevice
from ouassister.errors import (
    DirtyDatabaseError,
    LockedError,
    NotSuspendedError,
    RunningVMError,
    UnsupportedGuestError,
)
from ouassister.memory import open_save
from ouassister.model import Fence, GuestView
from ouassister.packages import apt
from ouassister.provider import qemu
from ouassister.provider.backing import backing_chain
from ouassister.provider.vmtoml import VmConfig
from ouassister.state.fence import fence
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ouassister.model import Mount

# Issue of its own: until then a stale disk must at least be called stale.
UNFLUSHED_NOTE = (
    "the disk is read as it lies with its journal replayed: writes that the guest had not flushed"
    " when it was suspended are not seen (the package database was checked and is flushed)"
)


@dataclass(frozen=True, slots=True)
class Sleeping:
    """One suspended VM: what describes it, what its kernel knows, and what binds work to it."""

    config: VmConfig
    view: GuestView
    fence: Fence


@contextlib.contextmanager
def open_sleeping(config: VmConfig) -> Iterator[Sleeping]:
    """Open the saved VM; reads only.

    Raises:
        RunningVMError: It runs, or some process has its disk open for writing.
        NotSuspendedError: There is no save file.
        UnsupportedStateError: The save file, or the guest's kernel, is in no table.
    """
    refuse_running(config)
    if not config.save.exists():
        raise NotSuspendedError(f"{config.name} has no save file {config.save}")
    # qemu-img tells the backing files while memory is read.
    with ThreadPoolExecutor(1) as beside:
        binding = beside.submit(lambda: fence(config.save, chain(config)))
        with open_save(config.save) as save:
            view = kernel.introspect(save, (apt.DATABASE,))
    yield Sleeping(config, view, binding.result())


def refuse_running(config: VmConfig) -> None:
    """Raise when the VM runs.

    Raises:
        RunningVMError: It does.
    """
    if qemu.is_running(config):
        raise RunningVMError(f"{config.name} is running: its disk belongs to it")


def chain(config: VmConfig) -> tuple[Path, ...]:
    """All files that hold the VM's disks, backing files included."""
    files: dict[Path, None] = {}
    for disk in config.disks:
        files.update(dict.fromkeys(backing_chain(disk)))
    return tuple(files)


def refuse_unsafe(sleeping: Sleeping) -> None:
    """Raise when memory shows that the package database must not be touched.

    Raises:
        UnsupportedGuestError: The kernel does not tell enough to know.
        LockedError: An updater was running, or holds a lock.
        DirtyDatabaseError: The database has writes that exist in memory only.
    """
    view = sleeping.view
    for unknown in view.degraded:
        if unknown.startswith(("package database:", "uncommitted changes:")):
            raise UnsupportedGuestError(
                f"whether the package database is clean cannot be told: {unknown}"
            )
    for task in view.tasks:
        if task.exe in apt.UPDATERS:
            raise LockedError(
                f"{to_text(task.exe)} (pid {task.pid}) was running when the VM was suspended",
                hint="resume the VM, let it finish, and save it again",
            )
    for lock in view.locks:
        if lock.path in apt.LOCKS:
            raise LockedError(
                f"pid {lock.pid} held {to_text(lock.path)} when the VM was suspended",
                hint="resume the VM, let it finish, and save it again",
            )
    dirty = [file.path for file in view.database if file.dirty]
    if dirty:
        raise DirtyDatabaseError(
            "the package database has unflushed writes in memory: "
            + ", ".join(to_text(path) for path in dirty[:3])
            + (f" and {len(dirty) - 3} more" if len(dirty) > 3 else "")
        )


def root_device(sleeping: Sleeping) -> RootDevice:
    """Where the root file system lies, as the guest's kernel knows it.

    Raises:
        UnsupportedGuestError: It is not ext4 on one disk, or other disks hold parts of the tree.
    """
    blocks = [mount for mount in sleeping.view.mounts if mount.block is not None]
    roots = [mount for mount in blocks if mount.target == b"/"]
    if not roots:
        raise UnsupportedGuestError("the guest's root file system is not on a disk")
    root = roots[-1]  # the last one mounted covers the others
    if root.fstype != "ext4":
        raise UnsupportedGuestError(f"the guest's root file system is {root.fstype}, not ext4")
    for mount in blocks:
        if (mount.major, mount.minor) != (root.major, root.minor):
            raise UnsupportedGuestError(
                f"{to_text(mount.target)} is a file system of its own"
                f" ({mount.fstype} on {to_text(mount.source)}); only the root one can be updated"
            )
    return _on_disk(root, sleeping.config)


def _on_disk(root: Mount, config: VmConfig) -> RootDevice:
    """Match the kernel's disk with one of the VM's."""
    assert root.block is not None  # noqa: S101 - chosen so
    disks = config.disks
    if len(disks) > 1:
        disks = tuple(disk for disk in disks if disk.guest == root.block.disk)
    if len(disks) != 1:
        raise UnsupportedGuestError(
            f"which disk is {root.block.disk} in the guest cannot be told",
            hint=f'write guest = "{root.block.disk}" into its [[disk]] table of {config.source}',
        )
    return RootDevice(disks[0].path, disks[0].format, root.block.start, root.block.size)
