"""The coherent view of a suspended guest's file system, made and mounted without a shadow.

What the shadow does in its sandbox is done here on a copy of the partition, so that a test can
compare every path of it with what the resumed guest says.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ouassister import kernel
from ouassister.disk import coherent, handover, proof
from ouassister.errors import HostNotReadyError, UnsupportedGuestError, UsageError
from ouassister.kernel.unflushed import collect
from ouassister.memory import open_save
from ouassister.provider import vmtoml
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.model import Mount


def build_view(vm_toml: Path, folder: Path, target: bytes = b"/") -> Path:
    """Make one of the guest's file systems as its sleeping kernel knows it.

    Args:
        vm_toml: A suspended VM; nothing of it is written.
        folder: Where the image, what was read from memory, and ``report.json`` are put.
        target: Where the guest has mounted it.

    Returns:
        A raw sparse image of the partition, without a partition table: e2fsck clean, journal
        empty, in agreement with the guest's memory.

    Raises:
        UnsupportedGuestError: The file system is not one whose memory can be read.
        CorruptGuestError: Disk and memory do not agree; the message says where.
    """
    config = vmtoml.load(vm_toml)
    folder.mkdir(parents=True, exist_ok=True)
    memory, image = folder / "unflushed", folder / "view.img"
    with open_save(config.save) as save:
        mount = _mount(kernel.introspect(save).mounts, target)
        for one in collect(kernel.open_guest(save).kernel):
            if (one.file_system.major, one.file_system.minor) == (mount.major, mount.minor):
                handover.write(memory, one, save.memory)
                break
        else:
            raise UnsupportedGuestError(f"{to_text(target)} is {mount.fstype} in the guest")
    block = mount.block
    assert block is not None  # noqa: S101 - chosen so
    disks = [disk for disk in config.disks if len(config.disks) == 1 or disk.guest == block.disk]
    if len(disks) != 1:
        raise UsageError(f"{vm_toml} does not tell which disk is {block.disk} in the guest")
    source = {
        "driver": "raw",
        "offset": block.start,
        "size": block.size,
        "file": {
            "driver": disks[0].format,
            "file": {"driver": "file", "filename": str(disks[0].path)},
        },
    }
    _run("qemu-img", "convert", "-O", "raw", f"json:{json.dumps(source)}", str(image))
    where = {"image": str(image), "handover": str(memory)}
    done = {"applied": coherent.apply(where), "proven": proof.prove(where)}
    (folder / "report.json").write_text(json.dumps(done))
    return image


def _mount(mounts: tuple[Mount, ...], target: bytes) -> Mount:
    found = [mount for mount in mounts if mount.target == target and mount.block is not None]
    if not found:
        raise UnsupportedGuestError(f"nothing on a disk is mounted at {to_text(target)}")
    return found[-1]  # the last one covers the others


@contextlib.contextmanager
def mounted_view(image: Path) -> Iterator[Path]:
    """Mount an image that `build_view` made, read-only, through this host's own ext4.

    The host's kernel shows every attribute, ACLs and trusted.* too, which one by FUSE does not.
    Needs root and a loop device; for images of our own guests alone.
    """
    with tempfile.TemporaryDirectory(prefix="view-") as place:
        _run("mount", "-t", "ext4", "-o", "loop,ro,noload", str(image), place)
        try:
            yield Path(place)
        finally:
            _run("umount", place)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HostNotReadyError(f"{command[0]}: {done.stderr.strip()}")
