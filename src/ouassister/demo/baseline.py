"""The same installation in a plain chroot of the same tree, for comparison.

The tree is a raw copy of the suspended disk, mounted by the host's kernel in a mount namespace of
its own, which takes the mounts and the loop device along when it ends. Lists and archives are
those that the update has fetched. Only apt-get's own time is taken.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

from ouassister.errors import HostNotReadyError

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.disk.layout import Piece
    from ouassister.disk.matching import Image

# $1 raw image, $2 offset, $3 mount point, $4 cache folder, from $5 on packages
_SCRIPT: Final = r"""
set -eu
mount --make-rprivate /
mount -o "loop,offset=$2" "$1" "$3"
mount -t proc proc "$3/proc"
mount --rbind /dev "$3/dev"
mount -t tmpfs tmpfs "$3/run"
mount --bind "$4/lists" "$3/var/lib/apt/lists"
mount --bind "$4/apt" "$3/var/cache/apt"
printf '#!/bin/sh\nexit 101\n' >"$3/usr/sbin/policy-rc.d"
chmod 755 "$3/usr/sbin/policy-rc.d"
export DEBIAN_FRONTEND=noninteractive
log=$1.log tree=$3
shift 4
before=$(date +%s%N)
chroot "$tree" apt-get -q -y --no-download install "$@" >"$log" 2>&1
after=$(date +%s%N)
echo $((after - before))
"""


def chroot_install_s(image: Image, root: Piece, cache: Path, folder: Path, *packages: str) -> float:
    """Seconds that ``apt-get install`` takes in the chroot.

    Raises:
        HostNotReadyError: The host cannot mount a loop device, or the installation fails.
    """
    raw, mount_point = folder / "chroot.raw", folder / "chroot"
    mount_point.mkdir(exist_ok=True)
    try:
        subprocess.run(
            [
                "qemu-img",
                "convert",
                "-U",
                "-f",
                image.format,
                "-O",
                "raw",
                str(image.path),
                str(raw),
            ],
            check=True,
            capture_output=True,
        )
        done = subprocess.run(
            [
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "sh",
                "-c",
                _SCRIPT,
                "sh",
                str(raw),
                str(root.start),
                str(mount_point),
                str(cache),
                *packages,
            ],
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        detail = error.stderr if isinstance(error.stderr, str) else error.stderr.decode()
        raise HostNotReadyError(f"the chroot for comparison: {detail.strip()}") from error
    finally:
        raw.unlink(missing_ok=True)
    return int(done.stdout) / 1e9
