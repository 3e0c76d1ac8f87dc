"""Removes a folder in which subordinate ids own files: what a user may only do as their root.

Started as ``python -I -m ouassister.shadow.remove FOLDER``; it leaves for a user namespace, writes
one line, and waits for one byte: by then the caller has written the maps.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from ouassister.errors import HostNotReadyError
from ouassister.shadow import ids, raw

if TYPE_CHECKING:
    from pathlib import Path


def remove_tree(folder: Path) -> None:
    """Remove a folder of a shadow, whoever owns what is in it.

    Raises:
        HostNotReadyError: The user's subordinate ids are gone, or the kernel says no.
        OSError: Something cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except PermissionError:
        if os.geteuid() == 0:
            raise
    else:
        return
    command = [sys.executable, "-I", "-m", "ouassister.shadow.remove", str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None  # noqa: S101 - PIPE was asked for
        if child.stdout.readline():
            ids.map_for_user(child.pid, ids.choose())
        _output, errors = child.communicate(b"m")
    if child.returncode != 0:
        last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise HostNotReadyError(f"{folder} cannot be removed: {last}")


def main() -> None:
    """Entry point; see the module."""
    raw.unshare(raw.CLONE_NEWUSER)
    sys.stdout.write("map\n")
    sys.stdout.flush()
    if sys.stdin.buffer.read(1) != b"m":
        sys.exit(1)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    shutil.rmtree(sys.argv[1])


if __name__ == "__main__":
    main()
