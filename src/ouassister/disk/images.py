"""What qemu-img says of disk images; none is ever opened for writing."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from ouassister.errors import HostNotReadyError, UnsupportedError, WorkDiskFullError

if TYPE_CHECKING:
    from pathlib import Path


def virtual_size(path: Path, image_format: str) -> int:
    """Bytes of the disk that an image holds.

    Raises:
        UnsupportedError: The image cannot be opened as its format.
        HostNotReadyError: qemu-img is missing.
    """
    done = _qemu_img("info", "--force-share", "--output=json", "-f", image_format, str(path))
    if done.returncode != 0:
        raise UnsupportedError(f"{path} as {image_format}: {done.stderr.strip()}")
    return int(json.loads(done.stdout)["virtual-size"])


def create_qcow2(path: Path, size: int) -> None:
    """Create an empty qcow2 image.

    Raises:
        HostNotReadyError: qemu-img is missing, or fails.
        WorkDiskFullError: There is no room for it.
    """
    done = _qemu_img("create", "-q", "-f", "qcow2", str(path), str(size))
    if done.returncode != 0:
        if "No space left" in done.stderr:
            raise WorkDiskFullError(f"no room for {path}")
        raise HostNotReadyError(f"qemu-img create: {done.stderr.strip()}")


def _qemu_img(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise HostNotReadyError("qemu-img is not installed (package qemu-utils)") from error
