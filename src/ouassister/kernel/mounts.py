"""Mounts of init's namespace, as /proc/1/mounts shows them.

Source: Linux v6.1 ``fs/mount.h``, ``fs/proc_namespace.c`` (``show_vfsmnt``), ``fs/namespace.c``.
A namespace keeps its mounts in a red-black tree since 2eea9ce4310d ("mounts: keep list of
mounts in an rbtree", v6.8), in a list before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drgn import Object

from ouassister.errors import UnsupportedGuestError
from ouassister.kernel import btrfs, walk
from ouassister.kernel.paths import path_in_file_system, path_of
from ouassister.kernel.program import guest_reads
from ouassister.model import BlockRange, Mount
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.program import Kernel

_MNT_READONLY: Final = 0x40
_SB_RDONLY: Final = 1
_MINOR_BITS: Final = 20  # include/linux/kdev_t.h
_MAX_STRING: Final = 4096
_SECTOR: Final = 512


@dataclass(frozen=True, slots=True)
class Namespace:
    """Init's view of the tree.

    Attributes:
        mounts: ``struct mount`` objects that are reachable from the root, with their paths.
        root: vfsmount and dentry of the root directory.
        over: (mount address, dentry address) of a mount point to what is mounted there.
    """

    mounts: tuple[tuple[bytes, Object], ...]
    root: tuple[Object, Object]
    over: dict[tuple[int, int], Object]


def read_namespace(kernel: Kernel, init: Object) -> Namespace:
    """Read the mount namespace of a task (pid 1)."""
    with guest_reads("listing the mounts of pid 1"):
        path = init.fs.root
        root = (path.mnt.read_(), path.dentry.read_())
        where = (root[0].value_(), root[1].value_())
        mounts = []
        over = {}
        for mount in _mounts(kernel, init.nsproxy.mnt_ns):
            if not mount.mnt.mnt_sb:  # a cursor of a reader of /proc/mounts (v5.8 to v6.7)
                continue
            parent = mount.mnt_parent.value_()
            if parent != mount.address_:
                over[parent, mount.mnt_mountpoint.value_()] = mount
            target, reachable = path_of(
                kernel, mount.mnt.address_of_(), mount.mnt.mnt_root.read_(), where
            )
            if reachable:
                mounts.append((target, mount))
    return Namespace(tuple(mounts), root, over)


def read_mounts(kernel: Kernel, namespace: Namespace) -> tuple[Mount, ...]:
    """Describe each mount."""
    with guest_reads("reading the mounts of pid 1"):
        return tuple(_mount(kernel, target, mount) for target, mount in namespace.mounts)


def _mounts(kernel: Kernel, namespace: Object) -> Iterator[Object]:
    try:
        root = namespace.mounts
        root.rb_node  # noqa: B018 - before v6.8 this member is a number
    except (AttributeError, TypeError):
        for node in walk.list_nodes(kernel, namespace.list.address_of_().value_()):
            yield kernel.container("struct mount", "mnt_list", node)
        return
    for node in walk.rbtree_nodes(root):
        yield kernel.container("struct mount", "mnt_node", node)


def _mount(kernel: Kernel, target: bytes, mount: Object) -> Mount:
    sb = mount.mnt.mnt_sb
    device = sb.s_dev.value_()
    fstype = _string(sb.s_type.name)
    subtype = sb.s_subtype.read_()
    if subtype:
        fstype += b"." + _string(subtype)
    name = mount.mnt_devname.read_()
    return Mount(
        source=_string(name) if name else b"none",
        target=target,
        fstype=to_text(fstype),
        major=device >> _MINOR_BITS,
        minor=device & ((1 << _MINOR_BITS) - 1),
        read_only=bool(
            mount.mnt.mnt_flags.value_() & _MNT_READONLY or sb.s_flags.value_() & _SB_RDONLY
        ),
        block=_block(_btrfs_device(kernel, sb) if fstype == b"btrfs" else sb.s_bdev.read_()),
        root=path_in_file_system(mount.mnt.mnt_root.read_()),
        number=mount.mnt_id.value_(),
        parent=mount.mnt_parent.mnt_id.value_(),
    )


def _btrfs_device(kernel: Kernel, sb: Object) -> Object:
    """The device of a super block that names none; a null pointer where it cannot be told."""
    kind = sb.s_bdev.type_
    try:
        return Object(kernel.prog, kind, btrfs.device(kernel, sb.s_fs_info.value_()))
    except UnsupportedGuestError:
        return Object(kernel.prog, kind, 0)


def _block(device: Object) -> BlockRange | None:
    """Return the place of a ``struct block_device *`` on its disk.

    The range moved into the device with "block: move the start_sect field to struct
    block_device" (v5.11) and "block: cache inode size in bdev" (v5.16, ``bd_nr_sectors``);
    before v5.11 ``struct hd_struct`` had it.
    """
    if not device:
        return None
    try:
        start, size = device.bd_start_sect, device.bd_nr_sectors
    except AttributeError:
        start, size = device.bd_part.start_sect, device.bd_part.nr_sects
    return BlockRange(
        disk=to_text(device.bd_disk.disk_name.string_()),
        start=start.value_() * _SECTOR,
        size=size.value_() * _SECTOR,
    )


def _string(pointer: Object) -> bytes:
    text: bytes = pointer.prog_.read_c_string(pointer.value_(), max_size=_MAX_STRING)
    return text
