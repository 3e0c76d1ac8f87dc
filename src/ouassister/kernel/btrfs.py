"""What btrfs keeps in memory alone, beside pages of files; and which device it lies on.

btrfs changes nothing in place. Each change belongs to a transaction, which is on ``trans_list``
from its first change until the super block that makes it the newest one is on the disk; the log
that fsync(2) writes belongs to a transaction, too. What waits for one is asked for beside: data
whose blocks are written and not yet referred to (ordered extents; the pages carry no mark any
more) and inodes and entries that are written in bulk (delayed items).

Source: Linux v6.1 ``fs/btrfs/transaction.c`` (``join_transaction``, ``btrfs_commit_transaction``),
``ordered-data.c`` (``btrfs_add_ordered_extent``, ``btrfs_remove_ordered_extent``),
``delayed-inode.h`` (``struct btrfs_delayed_root``), ``disk-io.c`` (``btrfs_replay_log``),
``volumes.h`` (``struct btrfs_fs_devices``), ``ctree.h``. v6.12 has ``fs_error`` beside the bit of
``fs_state``; in v7.3 the delayed root is a member, no pointer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from drgn import Object, TypeKind

from ouassister.errors import UnsupportedGuestError
from ouassister.kernel.fields import Fields, has_member, offset, read_word
from ouassister.kernel.modules import module_types, struct
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from ouassister.kernel.btf_types import BtfTypes
    from ouassister.kernel.program import Kernel

_ERROR: Final = 1 << 0  # BTRFS_FS_STATE_ERROR


def uncommitted(kernel: Kernel, info: int) -> str:
    """Name something that no committed transaction has; empty when there is nothing.

    Args:
        kernel: The kernel.
        info: Address of ``struct btrfs_fs_info``.

    Raises:
        UnsupportedGuestError: It is in no state that a mount of it on another host would show; or
            this kernel keeps no types of btrfs, or is laid out otherwise.
        CorruptGuestError: Memory contradicts itself.
    """
    types = _types(kernel)
    with guest_reads("reading the state of btrfs"):
        kind = struct(types, "btrfs_fs_info")
        running, super_copy, state = Fields(
            kernel, kind, "running_transaction", "super_copy", "fs_state"
        ).read(info)
        error = 0
        if has_member(kernel, kind, "fs_error"):
            (error,) = Fields(kernel, kind, "fs_error").read(info)
        if error or state & _ERROR:
            raise UnsupportedGuestError("the guest's btrfs has found errors in itself")
        if running or _listed(kernel, info + offset(kernel, kind, "trans_list")):
            return "a transaction that is not committed"
        if _listed(kernel, info + offset(kernel, kind, "ordered_roots")):
            return "data that no committed transaction refers to (ordered extents)"
        delayed = info + offset(kernel, kind, "delayed_root")
        if Object(kernel.prog, kind, address=info).delayed_root.type_.kind == TypeKind.POINTER:
            delayed = read_word(kernel, delayed)
        delayed_type = struct(types, "btrfs_delayed_root")
        (items,) = Fields(kernel, delayed_type, "items.counter").read(delayed)
        if items:
            return f"{items} delayed items"
        on_disk = struct(types, "btrfs_super_block")
        (log_root,) = Fields(kernel, on_disk, "log_root").read(super_copy)
        if log_root:  # it was mounted with nologreplay
            raise UnsupportedGuestError("the log of the guest's btrfs was not replayed")
    return ""


def device(kernel: Kernel, info: int) -> int:
    """Return the address of the ``struct block_device`` of a file system that has but one.

    A super block of btrfs refers to none, since there may be several.

    Raises:
        UnsupportedGuestError: It has several, or this kernel keeps no types of btrfs.
    """
    types = _types(kernel)
    with guest_reads("reading the devices of btrfs"):
        (devices,) = Fields(kernel, struct(types, "btrfs_fs_info"), "fs_devices").read(info)
        kind = struct(types, "btrfs_fs_devices")
        (count,) = Fields(kernel, kind, "num_devices").read(devices)
        head = devices + offset(kernel, kind, "devices")
        first = read_word(kernel, head)
        seeds = devices + offset(kernel, kind, "seed_list")
        if count != 1 or first == head or read_word(kernel, first) != head:
            raise UnsupportedGuestError(f"the guest's btrfs lies on {count} devices")
        if _listed(kernel, seeds):
            raise UnsupportedGuestError("the guest's btrfs grows on a seed device")
        one = struct(types, "btrfs_device")
        (found,) = Fields(kernel, one, "bdev").read(first - offset(kernel, one, "dev_list"))
        if not found:
            raise UnsupportedGuestError("the device of the guest's btrfs is missing")
        address: int = found
        return address


def _types(kernel: Kernel) -> BtfTypes:
    if kernel.types.struct("btrfs_fs_info") is not None:
        return kernel.types
    return module_types(kernel, "btrfs")


def _listed(kernel: Kernel, head: int) -> bool:
    return read_word(kernel, head) != head
