"""Mounted file systems, whether or not a process sees them.

Source: Linux v6.1 ``include/linux/fs.h`` (``struct super_block``, ``SB_RDONLY``,
``SB_FREEZE_COMPLETE``), ``fs/super.c`` (``super_blocks``).
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from ouassister.guest_model import SuperBlock
from ouassister.kernel import walk
from ouassister.kernel.fields import Fields, offset, read_string, variable
from ouassister.kernel.program import guest_reads
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.program import Kernel

_SB_RDONLY: Final = 1
_SB_UNFROZEN: Final = 0
_MINOR_BITS: Final = 20
_MAX_SUPERBLOCKS: Final = 1 << 15


def addresses(kernel: Kernel) -> Iterator[int]:
    """Yield the addresses of all ``struct super_block``."""
    place = offset(kernel, "struct super_block", "s_list")
    for node in walk.list_nodes(kernel, variable(kernel, "super_blocks"), _MAX_SUPERBLOCKS):
        yield node - place


def module_of(kernel: Kernel, address: int) -> str:
    """Name the module whose driver serves a ``struct super_block``; "" for a built-in one."""
    (kind,) = Fields(kernel, "struct super_block", "s_type").read(address)
    (owner,) = Fields(kernel, "struct file_system_type", "owner").read(kind)
    if not owner:
        return ""
    (name,) = Fields(kernel, "struct module", "name").read(owner)
    return to_text(name.partition(b"\0")[0])


def read_superblocks(kernel: Kernel) -> tuple[SuperBlock, ...]:
    """Describe each mounted file system, in the order they were mounted.

    Raises:
        CorruptGuestError: The list does not end.
    """
    with guest_reads("reading the list of file systems"):
        fields = Fields(kernel, "struct super_block", "s_dev", "s_blocksize", "s_type", "s_flags",
                        "s_magic", "s_root", "s_bdev", "s_id", "s_uuid.b",
                        "s_writers.frozen")  # fmt: skip
        names = Fields(kernel, "struct file_system_type", "name")
        disks = Fields(kernel, "struct block_device", "bd_disk")
        disk_names = Fields(kernel, "struct gendisk", "disk_name")
        found = []
        for address in addresses(kernel):
            (dev, size, kind, flags, magic, root, bdev, short, raw, frozen) = fields.read(address)
            if not root:  # being mounted, or gone already
                continue
            disk = disk_names.read(disks.read(bdev)[0])[0] if bdev else b""
            found.append(
                SuperBlock(
                    fstype=to_text(read_string(kernel, names.read(kind)[0], 64)),
                    id=to_text(short.partition(b"\0")[0]),
                    uuid=str(uuid.UUID(bytes=raw)) if any(raw) else "",
                    major=dev >> _MINOR_BITS,
                    minor=dev & ((1 << _MINOR_BITS) - 1),
                    magic=magic,
                    block_size=size,
                    read_only=bool(flags & _SB_RDONLY),
                    frozen=frozen != _SB_UNFROZEN,
                    disk=to_text(disk.partition(b"\0")[0]),
                )
            )
        return tuple(found)
