"""Snapshots: a VM as it slept before a resume, and the way back to it.

A snapshot is a copy of every disk, made while the VM sleeps, and its save file, kept when the
resume puts that out of the way. Each lies beside what it is of, so that going back is one rename
for each. Where the file system can, a copy shares its blocks with the disk.

The record of all snapshots of a VM is one file, written anew for each step, before the step is
taken where that leaves something behind: what a run that was killed had begun is found by it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister import codec
from ouassister.durable import sync_folder
from ouassister.errors import (
    RollbackRefusedError,
    StaleError,
    StateError,
    TamperedError,
    WorkDiskFullError,
)
from ouassister.model import FileStamp
from ouassister.state.fence import stamp

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.model import Fence
    from ouassister.provider.interface import Vm

KEPT_BY_DEFAULT: Final = 3
LAST: Final = "last"
_RECORD: Final = "snapshots.json"
_ID: Final = 16  # digits of the change set's id
_CHUNK: Final = 4 << 20
_FICLONE: Final = 0x40049409  # ioctl_ficlone(2)
_NO_CLONE: Final = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV)
_GO_ON: Final = "'ouassister rollback VM --snapshot last' takes up where it stopped"
_LOST: Final = "nothing was done; 'ouassister discard VM --snapshots' gives the snapshots up"
_ROOM: Final = "free space there, lower --keep-snapshots, or resume without --snapshot"


class Stage(StrEnum):
    """How far a snapshot got."""

    COPYING = "copying"
    COPIED = "copied"  # the disks; the save file is still the VM's
    KEPT = "kept"
    RETURNING = "returning"  # the VM is being put back to it


@dataclass(frozen=True, slots=True)
class Copy:
    """One file of the VM, and its copy; ``stamp`` once there is one."""

    path: str
    copy: str
    stamp: FileStamp | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A VM as it slept before a change set was brought in.

    ``below`` are files that nothing is written to, as they were: the backing files of its disks.
    ``closed_by_gate`` is as `interface.Vm` has it.
    """

    snapshot_id: str
    changeset_id: str
    made_at_s: int
    stage: Stage
    disks: tuple[Copy, ...]
    save: Copy
    below: tuple[FileStamp, ...]
    closed_by_gate: tuple[str, ...] = ()

    @property
    def copies(self) -> tuple[Copy, ...]:
        """All files; the save file last, since with it the VM sleeps."""
        return (*self.disks, self.save)

    def size_bytes(self) -> int:
        """Room that the copies take; blocks that are shared count too."""
        found = 0
        for one in self.copies:
            with contextlib.suppress(FileNotFoundError):
                found += Path(one.copy).stat().st_blocks * 512
        return found


def known(folder: Path) -> tuple[Snapshot, ...]:
    """The snapshots of a VM, newest first.

    Args:
        folder: The VM's private folder.

    Raises:
        TamperedError: Their record cannot be read.
    """
    try:
        values = json.loads((folder / _RECORD).read_bytes())
        return tuple(codec.from_value(Snapshot, value) for value in values)
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError, RecursionError) as error:
        raise TamperedError(
            f"the record of snapshots in {folder} is unreadable: {error}",
            hint=f"remove {folder / _RECORD}; the copies are called NAME.ouassister-ID",
        ) from error


def take(vm: Vm, changeset_id: str, fence: Fence, folder: Path) -> None:
    """Copy the disks of a VM that sleeps; what an earlier call left half done goes first.

    Raises:
        WorkDiskFullError: There is no room; nothing is left of the snapshot.
    """
    sweep(folder)
    name = changeset_id[:_ID]
    drop(folder, (name,))
    disks = tuple(_beside(one.path.resolve(), name) for one in vm.disks)
    save = _beside(vm.save.absolute(), name)
    tops = {one.path for one in disks}
    below = tuple(one for one in fence.disks if str(Path(one.path).resolve()) not in tops)
    closed, now = vm.closed_by_gate, int(time.time())
    made = Snapshot(name, changeset_id, now, Stage.COPYING, disks, save, below, closed)
    _refuse_full([one for one in (*disks, save) if one is not save or vm.save.is_symlink()])
    _write(folder, (made, *known(folder)))
    try:
        copied = tuple(_copied(one) for one in disks)
        _put(folder, replace(made, stage=Stage.COPIED, disks=copied))
    except BaseException:
        drop(folder, (name,))
        raise


def keep_save(vm: Vm, changeset_id: str, folder: Path) -> None:
    """Complete the snapshot of this change set, if one was begun: keep the VM's save file.

    It is for the moment before the save file is put out of the way. A second name of the file
    costs nothing; a save that is a symbolic link is somebody else's and is copied.

    Raises:
        WorkDiskFullError: There is no room for a copy.
    """
    name = changeset_id[:_ID]
    for one in known(folder):
        if one.snapshot_id != name or one.stage is not Stage.COPIED:
            continue
        copy = Path(one.save.copy)
        try:
            if vm.save.is_symlink():
                raise OSError(errno.EXDEV, "another folder's")
            os.link(vm.save, copy)
            sync_folder(copy.parent)
            save = replace(one.save, stamp=_stamp(copy))
        except OSError:
            copy.unlink(missing_ok=True)
            save = _copied(one.save)
        _put(folder, replace(one, stage=Stage.KEPT, save=save))


def sweep(folder: Path, resuming: str = "") -> None:
    """Remove what is not complete, as runs leave it that failed or were killed.

    Args:
        folder: The VM's private folder.
        resuming: The change set that an earlier resume began with; its disks are copied, and its
            save file is perhaps still to come.
    """
    half = [one for one in known(folder) if one.stage in (Stage.COPYING, Stage.COPIED)]
    gone = [o for o in half if o.stage is Stage.COPYING or o.changeset_id != resuming]
    drop(folder, [one.snapshot_id for one in gone])


def has(changeset_id: str, folder: Path) -> bool:
    """Tell whether there is a complete snapshot from before this change set."""
    name = changeset_id[:_ID]
    return any(o.snapshot_id == name and o.stage is Stage.KEPT for o in known(folder))


def prune(folder: Path, keep: int) -> tuple[str, ...]:
    """Remove all complete snapshots but the newest; returns the ids of what went."""
    complete = [one.snapshot_id for one in known(folder) if one.stage is Stage.KEPT]
    return drop(folder, complete[keep:])


def drop(folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Remove snapshots and their files; returns the ids of those that were there."""
    wanted = set(names)
    all_known = known(folder)
    gone = [one for one in all_known if one.snapshot_id in wanted]
    for one in gone:
        for copy in one.copies:
            Path(copy.copy).unlink(missing_ok=True)
    if gone:  # last: what the record does not name is never found again
        _write(folder, [one for one in all_known if one not in gone])
    return tuple(one.snapshot_id for one in gone)


def discard(folder: Path) -> tuple[str, ...]:
    """Remove all snapshots.

    Raises:
        StaleError: The VM is half way back to one of them.
    """
    if any(one.stage is Stage.RETURNING for one in known(folder)):
        raise StaleError("the VM is half way back to a snapshot", hint=_GO_ON)
    return drop(folder, [one.snapshot_id for one in known(folder)])


def find(folder: Path, word: str) -> Snapshot:
    """The complete snapshot of an id; ``last`` is the newest, or the one half gone back to.

    Raises:
        RollbackRefusedError: There is none.
    """
    complete = [one for one in known(folder) if one.stage in (Stage.KEPT, Stage.RETURNING)]
    for begun in (one for one in complete if one.stage is Stage.RETURNING):
        if word not in (begun.snapshot_id, LAST):
            raise RollbackRefusedError(
                f"the VM is half way back to the snapshot {begun.snapshot_id}", hint=_GO_ON
            )
        return begun
    for one in complete:
        if word in (one.snapshot_id, LAST):
            return one
    raise RollbackRefusedError(
        "there is no snapshot" if word == LAST else f"there is no snapshot {word!r}",
        hint="'ouassister status VM' lists them; 'resume --snapshot' takes one",
    )


def go_back(vm: Vm, snapshot: Snapshot, folder: Path) -> None:
    """Put a VM that does not run back to a snapshot, which is used up by it.

    What the disks hold now is lost. The save file comes last: half way, the VM does not sleep, and
    the next call goes on from there.

    Raises:
        StaleError: A copy, or a backing file, is not what it was; nothing was done.
        RollbackRefusedError: The VM is described by other files now; nothing was done.
    """
    now = {str(one.path.resolve()) for one in vm.disks} | {str(vm.save.absolute())}
    if now != {one.path for one in snapshot.copies}:
        raise RollbackRefusedError(f"the snapshot is of other files than {vm.name} has now")
    again = snapshot.stage is Stage.RETURNING
    left = [one for one in snapshot.copies if not again or Path(one.copy).exists()]
    _check([one.stamp for one in left] + list(snapshot.below))
    _put(folder, replace(snapshot, stage=Stage.RETURNING))
    vm.keep_closed(snapshot.closed_by_gate)
    if snapshot.save in left:
        vm.retire_save()  # of a later sleep: it would contradict the disks
    for one in left:
        Path(one.copy).replace(one.path)
        sync_folder(Path(one.path).parent)
    _write(folder, [one for one in known(folder) if one.snapshot_id != snapshot.snapshot_id])


def _beside(path: Path, name: str) -> Copy:
    return Copy(str(path), str(path.with_name(f"{path.name}.ouassister-{name}")))


def _check(stamps: Iterable[FileStamp | None]) -> None:
    for one in stamps:
        if one is None:
            raise StaleError("the snapshot is not complete")
        try:
            changed = _stamp(Path(one.path)) != replace(one, ctime_ns=0)
        except (FileNotFoundError, StateError) as error:
            raise StaleError(f"{one.path} is gone: there is no way back", hint=_LOST) from error
        if changed:
            raise StaleError(f"{one.path} is not what it was", hint=_LOST)


def _stamp(path: Path) -> FileStamp:
    """Without the time of the last change: names and owners come and go."""
    return replace(stamp(path), ctime_ns=0)


def _refuse_full(copies: Iterable[Copy]) -> None:
    """Raise when the file systems have no room for what is to be copied, and cannot share it."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for one in copies:
        place = Path(one.copy).parent
        device = place.stat().st_dev
        places[device] = place
        if not _clones(Path(one.path), place):
            size = Path(one.path).stat().st_blocks * 512
            needed[device] = needed.get(device, 0) + size
    for device, size in needed.items():
        room = os.statvfs(places[device])
        free = room.f_bavail * room.f_frsize
        if size > free:
            raise WorkDiskFullError(
                f"a snapshot takes {size >> 20} MiB in {places[device]}, which has {free >> 20}",
                hint=_ROOM,
            )


def _clones(source: Path, place: Path) -> bool:
    """Tell whether a file can share its blocks with a new one in a folder."""
    with source.open("rb") as old:
        try:
            probe = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        try:
            return _clone(old.fileno(), probe)
        finally:
            os.close(probe)


def _clone(old: int, new: int) -> bool:
    try:
        fcntl.ioctl(new, _FICLONE, old)
    except OSError as error:
        if error.errno in _NO_CLONE:
            return False
        raise
    return True


def _copied(one: Copy) -> Copy:
    """Copy a file with its holes, attributes and owner, durably."""
    target = Path(one.copy)
    target.unlink(missing_ok=True)
    try:
        with Path(one.path).open("rb") as file:
            old = file.fileno()
            new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if not _clone(old, new):
                    _copy_data(old, new)
                status = os.fstat(old)
                os.fchown(new, status.st_uid, status.st_gid)
                os.fchmod(new, stat.S_IMODE(status.st_mode))
                shutil.copystat(one.path, target)
                os.fsync(new)
            finally:
                os.close(new)
        sync_folder(target.parent)
    except OSError as error:
        target.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no room for a snapshot in {target.parent}: {error.strerror}"
            raise WorkDiskFullError(message, hint=_ROOM) from error
        raise
    return replace(one, stamp=_stamp(target))


def _copy_data(old: int, new: int) -> None:
    size = os.fstat(old).st_size
    os.ftruncate(new, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(old, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        end = os.lseek(old, at, os.SEEK_HOLE)
        while at < end:
            data = memoryview(os.pread(old, min(_CHUNK, end - at), at))
            if not data:  # it became shorter: the fence will tell
                return
            while data:
                done = os.pwrite(new, data, at)
                data = data[done:]
                at += done


def _put(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot's new stage."""
    same = snapshot.snapshot_id
    _write(folder, [snapshot if one.snapshot_id == same else one for one in known(folder)])


def _write(folder: Path, snapshots: Iterable[Snapshot]) -> None:
    part = folder / f"{_RECORD}.part"
    with part.open("w") as file:
        json.dump([codec.to_value(one) for one in snapshots], file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / _RECORD)
    sync_folder(folder)
