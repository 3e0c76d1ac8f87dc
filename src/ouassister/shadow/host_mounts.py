"""File systems that only this host's kernel can read, mounted from private copies.

Asked for by the user (`host_kernel_mounts` of the vm.toml), since it lets a guest's file system be
parsed by the host's kernel. It takes the host's root: no user namespace may mount XFS or btrfs.
Recovery of a log goes to the private copy. What programs see is a clone of the mount whose
owners are the guest's in the user namespace of the shadow.

A loop device lasts as long as something has it open: the mount, which ends with the last process
of its mount namespace, however that ends. The storage daemon, which serves the file below, must not
be in that namespace: as its last process it would have to unmount while it dies, waiting for an
answer of its own (XFS writes to its log then, read-only or not). So the mounts are made in a
namespace that is left to it no more. Two volumes of one device share one mount:
btrfs takes two devices with one UUID for the same file system.

Source: Linux v6.1 ``include/uapi/linux/loop.h`` (``struct loop_config``,
``LO_FLAGS_AUTOCLEAR``), ``drivers/block/loop.c``, Documentation/filesystems/idmappings.rst,
xfs(5), btrfs(5). Mapped ids: XFS since v5.12, btrfs since v5.15, below overlayfs since v5.19.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from ouassister.disk.storage import volume_name
from ouassister.shadow import raw, sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.disk.layout import Layout, Volume

_LOOP_CONTROL: Final = os.makedev(10, 237)  # Documentation/admin-guide/devices.txt
_LOOP_MAJOR: Final = 7
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LO_FLAGS_AUTOCLEAR: Final = 4
_CONFIG: Final = struct.Struct("<II QQQQQ IIII 64s 64s 32s QQ 64x")
_SECTOR: Final = 512
_TRIES: Final = 16  # somebody else takes the free loop device first
_PLACE: Final = "host"  # relative to the stage
# A copy has the UUID of what it was copied from. The whole of btrfs, whatever its default is.
_OPTIONS: Final = {"xfs": "nouuid", "btrfs": "subvolid=5"}


def mount(stage: Path, layout: Layout, base_uid: int, base_gid: int, *, ids: int) -> None:
    """Mount the volumes that only the host's kernel can read, where the shadow expects them.

    The calling process moves to a mount namespace of its own when there are any.

    Args:
        stage: Folder of the shadow; the volumes are served below it.
        layout: All volumes.
        base_uid: The guest's root, on the host.
        base_gid: Its group.
        ids: How many ids from there on are the guest's.

    Raises:
        OSError: The host cannot, or does not want to; the message says so.
    """
    chosen = [(number, one) for number, one in enumerate(layout.volumes) if one.by_host_kernel]
    if not chosen:
        return
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        raise OSError("the host's kernel mounts XFS and btrfs for the host's root alone: use sudo")
    raw.unshare(raw.CLONE_NEWNS)  # away from the storage daemon
    with _user_namespace(base_uid, base_gid, ids) as namespace:
        while chosen:
            first, volume = chosen[0]
            device = (volume.major, volume.minor)
            parts = [one for one in chosen if (one[1].major, one[1].minor) == device]
            chosen = [one for one in chosen if one not in parts]
            with _whole(stage, first, volume) as whole:
                for number, part in parts:
                    _show(whole, part, namespace, str(stage / sandbox.lower(number)))


@contextlib.contextmanager
def _whole(stage: Path, number: int, volume: Volume) -> Iterator[int]:
    """Mount a file system for as long as its parts are cloned; a descriptor of its root."""
    place = stage / _PLACE
    place.mkdir(exist_ok=True)
    target = place / volume_name(number)
    target.mkdir()
    flags = raw.MS_RDONLY | raw.MS_NOSUID | raw.MS_NODEV
    with _loop(place, stage / sandbox.export(number)) as device:
        try:
            raw.mount(str(device), str(target), volume.fstype, flags, _OPTIONS[volume.fstype])
        except OSError as error:
            why = error.strerror or ""
            if error.errno in (errno.EEXIST, errno.EBUSY):
                why = "this host has one with the same UUID"
            raise OSError(
                f"this host's kernel does not mount {volume.device} ({volume.fstype}): {why}"
            ) from error
    descriptor = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        raw.umount(str(target), raw.MNT_DETACH)


def _show(whole: int, volume: Volume, namespace: int, target: str) -> None:
    part = raw.open_part(whole, volume.root)
    try:
        if not stat.S_ISDIR(os.stat(part).st_mode):  # noqa: PTH116 - a descriptor
            raise OSError(f"what {volume.device} ({volume.fstype}) shows is no directory")
        try:
            tree = raw.clone_mapped(part, namespace)
        except OSError as error:
            raise OSError(
                f"this host's kernel does not map the owners of {volume.fstype}: {error.strerror}"
            ) from error
    finally:
        os.close(part)
    try:
        raw.attach(tree, target)
    finally:
        os.close(tree)


@contextlib.contextmanager
def _loop(place: Path, backing: Path) -> Iterator[Path]:
    """A loop device over a file; it is gone when nobody has it open any more."""
    control = _node(place / "loop-control", stat.S_IFCHR, _LOOP_CONTROL)
    with contextlib.ExitStack() as stack:
        file = os.open(backing, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, file)
        controller = os.open(control, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, controller)
        zeros = (0, 0, 0, 0, 0, 0, 0, 0, _LO_FLAGS_AUTOCLEAR, b"", b"", b"", 0, 0)
        config = _CONFIG.pack(file, _SECTOR, *zeros)
        for _ in range(_TRIES):
            number = fcntl.ioctl(controller, _LOOP_CTL_GET_FREE)
            node = _node(place / f"loop{number}", stat.S_IFBLK, os.makedev(_LOOP_MAJOR, number))
            device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise OSError(f"loop device {number}: {error.strerror}") from error
                continue
            stack.callback(os.close, device)
            yield node
            return
    raise OSError("all loop devices are taken by others")


def _node(path: Path, kind: int, device: int) -> Path:
    """A device of this host on the shadow's own tmpfs: containers lack it in /dev."""
    with contextlib.suppress(FileExistsError):
        os.mknod(path, kind | 0o600, device)
    return path


def _be_namespace(told: int) -> NoReturn:
    try:
        raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
        raw.unshare(raw.CLONE_NEWUSER)
        os.write(told, b"u")
        while True:
            signal.pause()
    finally:
        os._exit(1)


@contextlib.contextmanager
def _user_namespace(base_uid: int, base_gid: int, ids: int) -> Iterator[int]:
    """A descriptor of a user namespace where the guest's ids are as in the shadow."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        _be_namespace(told)
    os.close(told)
    try:
        if os.read(ready, 1) != b"u":
            raise OSError("this host's kernel makes no user namespace")
        for name, base in (("uid_map", base_uid), ("gid_map", base_gid)):
            Path(f"/proc/{child}/{name}").write_text(f"0 {base} {ids}\n")
        descriptor = os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
