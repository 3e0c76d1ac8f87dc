"""Runs programs with a shadow's /proc, without the rest of a shadow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.conftest import lacking

if TYPE_CHECKING:
    from collections.abc import Sequence

INSIDE: Final = Path(__file__).with_name("procfs_inside.py")


def run(
    snapshot: Path,
    argv: Sequence[str] | str,
    tree: Path = Path("/"),
    timeout_s: float = 120,
    before: Sequence[str] = (),
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a program, or a script for sh; return it and what it wrote below /proc/sys.

    Args:
        snapshot: What the guest's part of /proc is made of.
        argv: The program.
        tree: What it has as its root.
        timeout_s: Until it is killed.
        before: A program that starts it all, with its arguments.
    """
    if os.geteuid() != 0:
        lacking("root")
    command = ["sh", "-c", argv] if isinstance(argv, str) else list(argv)
    reader, writer = os.pipe()
    try:
        done = subprocess.run(
            [*before, sys.executable, str(INSIDE), str(snapshot), str(tree), str(writer), *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            pass_fds=[writer],
            timeout=timeout_s,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
    finally:
        os.close(writer)
    with open(reader) as pipe:  # noqa: PTH123 - a descriptor
        return done, pipe.read().splitlines()
