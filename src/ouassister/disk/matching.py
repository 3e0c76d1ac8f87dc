"""Which of the VM's disk images is which disk of the guest: proven, not guessed.

The guest names its disks in the order in which it found them, which says nothing. What says
something: a name that the user wrote down, or the identity of a file system that the guest's
kernel has mounted and that lies on exactly one of the images, at that place. An image that is left
over belongs to the one disk that is left over, when their sizes agree.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from ouassister.disk import images, layout
from ouassister.errors import HostNotReadyError, UnsupportedGuestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

# Where a file system keeps its UUID, from its start: Documentation/filesystems/ext4/super.rst,
# fs/xfs/libxfs/xfs_format.h (sb_uuid), fs/btrfs (BTRFS_SUPER_INFO_OFFSET, fsid).
_UUID_AT: Final = {
    **dict.fromkeys(layout.EXT, 1024 + 0x68),
    "xfs": 0x20,
    "btrfs": 0x10000 + 0x20,
}


@dataclass(frozen=True, slots=True)
class Image:
    """A disk image of the VM. ``guest`` is the guest's name for it, where the user gave one."""

    path: Path
    format: str
    guest: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """A file system that the guest's kernel has mounted, at a place of one of its disks."""

    disk: str
    start: int
    fstype: str
    uuid: str


def match_disks(
    needed: Sequence[str],
    known: Iterable[Known],
    sizes: Mapping[str, int],
    disk_images: Sequence[Image],
    read: Callable[[Image, int, int], bytes] | None = None,
) -> dict[str, Image]:
    """Find the image of each disk.

    Args:
        needed: The guest's names of the disks that are wanted.
        known: What lies on them.
        sizes: Bytes of the guest's disks, as far as they are known.
        disk_images: The VM's, in any order.
        read: Reads bytes of the disk that an image holds; for tests.

    Raises:
        UnsupportedGuestError: A disk fits no image, or more than one.
    """
    if len(disk_images) == 1 and len(needed) == 1:
        return {needed[0]: disk_images[0]}
    read = read or _read
    found = {image.guest: image for image in disk_images if image.guest}
    facts = tuple(one for one in known if one.uuid and one.fstype in _UUID_AT)
    for name in needed:
        if name in found:
            continue
        taken = set(found.values())
        free = [image for image in disk_images if image not in taken]
        of_it = [one for one in facts if one.disk == name]
        fits = [image for image in free if of_it and all(_holds(image, one, read) for one in of_it)]
        if len(fits) == 1:
            found[name] = fits[0]
        elif fits:
            raise _unknown(name, f"{len(fits)} images hold its file systems")
    left = [name for name in needed if name not in found]
    free = [image for image in disk_images if image not in set(found.values())]
    if left:
        if len(left) > 1 or len(free) != 1:
            raise _unknown(left[0], "nothing on it tells")
        size = images.virtual_size(free[0].path, free[0].format)
        if sizes.get(left[0]) != size:
            raise _unknown(left[0], f"the image that is left over has {size} bytes")
        found[left[0]] = free[0]
    return {name: found[name] for name in needed}


def _unknown(name: str, why: str) -> UnsupportedGuestError:
    return UnsupportedGuestError(
        f"which disk is {name} in the guest cannot be told: {why}",
        hint=f'write guest = "{name}" into its [[disk]] table of the vm.toml',
    )


def _holds(image: Image, one: Known, read: Callable[[Image, int, int], bytes]) -> bool:
    return read(image, one.start + _UUID_AT[one.fstype], 16) == UUID(one.uuid).bytes


def _read(image: Image, offset: int, size: int) -> bytes:
    """Read through QEMU's own drivers, read-only and past all image locks; empty when it ends."""
    try:
        done = subprocess.run(
            [
                "qemu-io",
                "-U",
                "-r",
                "-f",
                image.format,
                "-c",
                f"read -v {offset} {size}",
                str(image.path),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostNotReadyError("qemu-io is not installed (package qemu-utils)") from error
    # 001004e8:  28 f6 8d 2c 5a 65 46 4e 8f 5e 66 de b0 13 d1 6b  ....Zef.
    lines = re.findall(r"^[0-9a-f]+: {2}((?:[0-9a-f]{2} )+)", done.stdout, re.MULTILINE)
    return b"".join(bytes.fromhex(line) for line in lines)
