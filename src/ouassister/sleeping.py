"""A VM as it sleeps: opened for reading, and everything that forbids an update."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister import kernel
from ouassister.disk import handover, names_proof
from ouassister.disk.layout import Layout, make_layout, needs_devices
from ouassister.disk.matching import Image, Known, match_disks
from ouassister.errors import (
    CorruptGuestError,
    LockedError,
    NotSuspendedError,
    UnsupportedGuestError,
    UnsupportedStateError,
)
from ouassister.guest_model import Subject
from ouassister.kernel import cached_names
from ouassister.kernel.flushed import find, is_frozen, unflushed_part
from ouassister.kernel.program import guest_reads
from ouassister.kernel.selinux import has_policy
from ouassister.kernel.unflushed import collect
from ouassister.memory import SaveFile, open_save
from ouassister.model import Fence, GuestView
from ouassister.packages import apt
from ouassister.provider.backing import backing_chain
from ouassister.provider.interface import Vm
from ouassister.provider.running import refuse_running as refuse_running
from ouassister.state.fence import fence
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_DISKS: Final = frozenset((Subject.FILE_SYSTEMS, Subject.BLOCK_DEVICES))


@dataclass(frozen=True, slots=True)
class Memory:
    """The open save file and the kernel in it, to be asked more; by one thread at a time."""

    save: SaveFile
    kernel: kernel.Guest

    def look(self, view: GuestView, want: frozenset[Subject]) -> GuestView:
        """Add to what is known; raises as `kernel.look`."""
        return kernel.add(self.kernel, self.save, view, want)


@dataclass(frozen=True, slots=True)
class Sleeping:
    """One suspended VM: what describes it, what its kernel knows, and what binds work to it.

    ``memory`` lasts as long as the context of `open_sleeping`.
    """

    config: Vm
    memory: Memory
    view: GuestView
    fence: Fence
    layout: Layout
    disks: Mapping[str, Image]  # by the guest's name
    frozen: tuple[str, ...] = ()  # devices of volumes that nobody can write to before they thaw
    labelled: bool = False  # by an SELinux policy


@contextlib.contextmanager
def open_sleeping(
    config: Vm,
    want: frozenset[Subject] = frozenset(),
    unflushed: Callable[[int], Path] | None = None,
    *,
    tree: bool = True,
) -> Iterator[Sleeping]:
    """Open the saved VM; nothing of it is written.

    Args:
        config: The VM.
        want: What the view contains beside the basics.
        unflushed: Names a file for each volume, where what memory holds of it and the disk does
            not is put (`ouassister.disk.handover`); without it, that is not collected.
        tree: Lay out the file systems of its tree; without it, ``layout`` and ``disks`` are empty,
            and a guest whose tree cannot be laid out can still be looked at.

    Raises:
        RunningVMError: It runs, or some process has its disk open for writing.
        NotSuspendedError: There is no save file.
        UnsupportedStateError: The save file is in no table.
        UnsupportedGuestError: The guest's kernel or its file systems are in none.
        CorruptGuestError: Its memory contradicts itself.
    """
    refuse_running(config)
    if not config.save.exists():
        raise NotSuspendedError(f"{config.name} has no save file {config.save}")
    with contextlib.ExitStack() as stack:
        # qemu-img tells the backing files while memory is read.
        beside = stack.enter_context(ThreadPoolExecutor(1))
        binding = beside.submit(lambda: fence(config.save, chain(config)))
        save = stack.enter_context(open_save(config.save))
        if unflushed is not None:
            save.require_full("update")
            if save.format.name not in config.formats:
                raise UnsupportedStateError(
                    "format", 0, save.format.name, "not what this VM is resumed from"
                )
            config.refuse_unresumable()
        guest = kernel.open_guest(save)
        subjects = _subjects(config) | want
        view = kernel.look(guest, save, subjects)
        if tree and not subjects >= _DISKS and needs_devices(view.mounts):
            view = kernel.add(guest, save, view, _DISKS)
        layout = Layout((), ())
        if tree:
            layout = make_layout(view, host_kernel_mounts=config.host_kernel_mounts)
        frozen: tuple[str, ...] = ()
        labelled = False
        if unflushed is not None:
            labelled = has_policy(guest.kernel)
            with guest_reads("reading what is not on the disks yet"):
                frozen = _hand_over(guest.kernel, save, layout, unflushed)
        disks = _match(config, view, layout)
        bound = binding.result()
        beside.shutdown()  # no thread of ours is left: who has the record may fork
        yield Sleeping(config, Memory(save, guest), view, bound, layout, disks, frozen, labelled)


def _hand_over(
    running: kernel.Kernel, save: SaveFile, layout: Layout, unflushed: Callable[[int], Path]
) -> tuple[str, ...]:
    """Write down what memory holds of each volume and its disk does not; name frozen ones."""
    frozen: list[str] = []
    found = {(one.file_system.major, one.file_system.minor): one for one in collect(running)}
    for number, volume in enumerate(layout.volumes):
        known = find(running, volume.major, volume.minor)
        if known is not None and is_frozen(running, known):
            frozen.append(volume.device)
        one = found.get((volume.major, volume.minor))
        if volume.fstype == "ext2" and one is None:
            raise UnsupportedGuestError(
                f"{volume.device} is served by the driver of ext2, not by that of ext4"
            )
        if volume.is_ext and one is None:
            raise CorruptGuestError(f"the kernel has mounted {volume.device} without a super block")
        if one is not None:
            handover.write(unflushed(number), one, save.memory)
            continue
        left = unflushed_part(running, volume.major, volume.minor)
        if left:
            raise UnsupportedGuestError(
                f"{volume.device} ({volume.fstype}) has writes that are in memory alone: {left}",
                hint="run 'sync' in the guest, or freeze the file system, before it is suspended",
            )
        if volume.by_host_kernel and known is not None:
            names = cached_names.collect(running, known)
            names_proof.write(unflushed(number), names, volume.root)
    return tuple(frozen)


def _subjects(config: Vm) -> frozenset[Subject]:
    """What must be known of the guest's disks; a single one need not be told from others."""
    if len(config.disks) == 1 and not config.disks[0].guest:
        return frozenset()
    return _DISKS


def _match(config: Vm, view: GuestView, layout: Layout) -> dict[str, Image]:
    needed = tuple(
        dict.fromkeys(piece.disk for volume in layout.volumes for piece in volume.pieces)
    )
    uuids = {(one.major, one.minor): one.uuid for one in view.superblocks or ()}
    known = [
        Known(
            volume.pieces[0].disk,
            volume.pieces[0].start,
            volume.fstype,
            uuids.get((volume.major, volume.minor), ""),
        )
        for volume in layout.volumes
    ]
    return match_disks(
        needed,
        known,
        {one.name: one.size for one in view.block_devices or ()},
        tuple(Image(disk.path, disk.format, disk.guest) for disk in config.disks),
    )


def chain(config: Vm) -> tuple[Path, ...]:
    """All files that hold the VM's disks, backing files included."""
    files: dict[Path, None] = {}
    for disk in config.disks:
        files.update(dict.fromkeys(backing_chain(disk)))
    return tuple(files)


def refuse_unsafe(sleeping: Sleeping) -> None:
    """Raise when memory shows that the package database must not be touched.

    Raises:
        UnsupportedGuestError: The kernel does not tell who holds locks, or labels files.
        LockedError: An updater was running, or held a lock.
    """
    view = sleeping.view
    for device in sleeping.frozen:
        raise UnsupportedGuestError(
            f"{device} is frozen: an update could not be written to it when the guest wakes up",
            hint="resume the VM, thaw it (fsfreeze -u), run 'sync' and save it again",
        )
    for volume in sleeping.layout.volumes:
        if sleeping.labelled and volume.by_host_kernel:
            raise UnsupportedGuestError(
                f"the guest has loaded an SELinux policy, and {volume.device} is {volume.fstype}:"
                " a union over it cannot change what has a label",
                hint="update it awake; labels are supported on ext4",
            )
    if view.held_locks is None:
        raise UnsupportedGuestError(
            f"who holds locks cannot be told: {'; '.join(view.degraded) or 'not asked for'}"
        )
    for task in view.tasks:
        if task.exe in apt.UPDATERS:
            raise LockedError(
                f"{to_text(task.exe)} (pid {task.pid}) was running when the VM was suspended",
                hint="resume the VM, let it finish, and save it again",
            )
    for lock in view.held_locks:
        if lock.path in apt.LOCKS:
            raise LockedError(
                f"pid {lock.pid} held {to_text(lock.path)} when the VM was suspended",
                hint="resume the VM, let it finish, and save it again",
            )
