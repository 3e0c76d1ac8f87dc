"""The private copy of a disk: a qcow2 overlay in the work folder, served by QEMU's own daemon.

The suspended disk is opened read-only and without image locks: a VM that somebody starts during
the update must get its locks, and the update notices (`ouassister.state.running`).
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ouassister.errors import HostNotReadyError, UnsupportedError, WorkDiskFullError

EXPORT_NODE: Final = "guest-root"
_OVERLAY: Final = "overlay.qcow2"


@dataclass(frozen=True, slots=True)
class RootDevice:
    """Where the guest's root file system lies: a disk image and a range of bytes in it."""

    image: Path
    format: str
    start: int
    size: int


def create_overlay(root: RootDevice, folder: Path) -> tuple[str, ...]:
    """Create the overlay and describe the daemon that serves the root file system from it.

    Args:
        root: The range becomes the node `EXPORT_NODE`.
        folder: Where the overlay is put.

    Returns:
        The command line of qemu-storage-daemon, without an export.

    Raises:
        HostNotReadyError: qemu-img is missing.
        UnsupportedError: The image cannot be opened as its format.
        WorkDiskFullError: There is no room for the overlay.
    """
    overlay = folder / _OVERLAY
    size = _virtual_size(root)
    done = _qemu_img("create", "-q", "-f", "qcow2", str(overlay), str(size))
    if done.returncode != 0:
        if "No space left" in done.stderr:
            raise WorkDiskFullError(f"no room for {overlay}")
        raise HostNotReadyError(f"qemu-img create: {done.stderr.strip()}")
    suspended = {
        "node-name": "suspended",
        "driver": root.format,
        "read-only": True,
        "file": {
            "driver": "file",
            "filename": str(root.image),
            "read-only": True,
            "locking": "off",
            "auto-read-only": False,
        },
    }
    private = {
        "node-name": "private",
        "driver": "qcow2",
        "backing": "suspended",
        "file": {
            "driver": "file",
            "filename": str(overlay),
            # Lost with the run in any case: nothing to flush for.
            "cache": {"no-flush": True},
        },
        "cache": {"no-flush": True},
        "discard": "unmap",
    }
    partition = {
        "node-name": EXPORT_NODE,
        "driver": "raw",
        "file": "private",
        "offset": root.start,
        "size": root.size or size - root.start,
    }
    argv = ["qemu-storage-daemon"]
    for node in (suspended, private, partition):
        argv += ["--blockdev", json.dumps(node)]
    return tuple(argv)


def _virtual_size(root: RootDevice) -> int:
    done = _qemu_img("info", "--force-share", "--output=json", "-f", root.format, str(root.image))
    if done.returncode != 0:
        raise UnsupportedError(f"{root.image} as {root.format}: {done.stderr.strip()}")
    return int(json.loads(done.stdout)["virtual-size"])


def _qemu_img(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise HostNotReadyError("qemu-img is not installed (package qemu-utils)") from error
