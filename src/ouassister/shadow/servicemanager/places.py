"""Sockets in the shadow's /run stand where the guest's stood, and look as they did."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def in_the_place_of(path: Path, mode: int) -> Iterator[None]:
    """Let a socket be made that looks as the guest's; ``mode`` is for one that the guest lacks."""
    folder = path.parent.stat()
    before: os.stat_result | None = None
    with contextlib.suppress(FileNotFoundError):
        before = path.lstat()
        path.unlink()
    yield
    path.chmod(mode if before is None else stat.S_IMODE(before.st_mode))
    if before is not None:
        os.chown(path, before.st_uid, before.st_gid)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.utime(path.parent, ns=(folder.st_atime_ns, folder.st_mtime_ns))
