"""The program that shows an ext4 file system in a file, read-only, by FUSE; made from ``ext4/``.

It parses what a guest wrote, so it runs with ids that nobody on the host has. Its file may be
out of their reach, so that whoever gives up its own ids opens it before.
"""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import Final

PROGRAM: Final = Path(__file__).with_name("bin") / "ext4-view-x86_64"


@functools.cache
def open_program() -> int:
    """Return a descriptor of the program, the same one at each call and in each child.

    Raises:
        OSError: It was not built, or cannot be read.
    """
    return os.open(PROGRAM, os.O_RDONLY | os.O_CLOEXEC)


def mount(image: Path, folder: Path) -> str:
    """Mount a file system that nobody writes to.

    Args:
        image: File that holds it, its journal empty.
        folder: Where; it goes with the mount namespace, or by umount(8).

    Returns:
        "", or why it could not be mounted.

    Raises:
        OSError: As `open_program`.
    """
    program = open_program()
    done = subprocess.run(
        [f"/proc/self/fd/{program}", str(image), str(folder)],
        pass_fds=(program,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        check=False,
    )
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stdout.strip().splitlines()[-3:]]
    return " / ".join(lines) or f"it ended with {done.returncode}"
