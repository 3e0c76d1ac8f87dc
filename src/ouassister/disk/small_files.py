"""Small files of the guest's disks, read as they lie. Called inside the shadow.

No symbolic link is followed, so that none leads out of the guest's tree.
"""

from __future__ import annotations

import errno
import os
import stat
from itertools import islice
from typing import Any

from ouassister.text import from_text, to_text

_LIMIT = 256 << 10
_MOST_NAMES = 1024


def read(argument: list[dict[str, Any]]) -> list[str | None]:
    """Read regular files; None for what is none, is not there or has more than 256 KiB.

    Args:
        argument: For each, ``root``: where a tree is mounted; ``path``: of the file in it.
    """
    return [_read(os.fsencode(one["root"]), from_text(one["path"])) for one in argument]


def names(argument: dict[str, Any]) -> list[str]:
    """Names in a folder, in their order; none where it is not there or has more than 1024."""
    try:
        folder = _open(os.fsencode(argument["root"]), from_text(argument["path"]), os.O_DIRECTORY)
    except OSError:
        return []
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in islice(entries, _MOST_NAMES + 1)]
    finally:
        os.close(folder)
    return [] if len(found) > _MOST_NAMES else sorted(to_text(os.fsencode(one)) for one in found)


def _read(root: bytes, path: bytes) -> str | None:
    try:
        descriptor = _open(root, path, os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(_LIMIT + 1)
    finally:
        os.close(descriptor)
    return to_text(data) if len(data) <= _LIMIT else None


def _open(root: bytes, path: bytes, flags: int) -> int:
    """Open step by step; ``..`` is no step."""
    names = [name for name in path.split(b"/") if name]
    if not names or b".." in names:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    at = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names[:-1]:
            below = os.open(
                name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at
            )
            os.close(at)
            at = below
        return os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=at)
    finally:
        os.close(at)
