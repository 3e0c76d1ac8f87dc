"""Does the disk say the same as the guest's memory? Called inside the shadow, where owners agree.

Dentries and inodes that the sleeping kernel has cached are the truth; a path whose inode number,
size, mode or time differs on the disk has changes that only memory knows.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from ouassister import codec
from ouassister.changeset.inodes import Inodes
from ouassister.model import CachedFile
from ouassister.text import to_text

_MOST: Final = 20


def disagreements(argument: dict[str, Any]) -> list[str]:
    """Compare cached files with the tree below ``argument["root"]``.

    Returns:
        One line for each path that differs, at most 20.
    """
    root = os.fsencode(argument["root"])
    found: list[str] = []
    with Inodes(Path(argument["image"])) as inodes:
        for value in argument["files"]:
            file = codec.from_value(CachedFile, value)
            difference = _difference(file, root + file.path, inodes)
            if difference:
                found.append(f"{to_text(file.path)}: {difference}")
                if len(found) == _MOST:
                    break
    return found


def _difference(file: CachedFile, path: bytes, inodes: Inodes) -> str:
    try:
        status = inodes.expected(os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return "" if file.inode == 0 else "only in memory"
    if file.inode == 0:
        return "removed in memory"
    on_disk = (status.inode, status.mode, status.size, status.mtime_ns)
    for name, ours, theirs in zip(
        ("inode", "mode", "size", "mtime"),
        (file.inode, file.mode, file.size, file.mtime_ns),
        on_disk,
        strict=True,
    ):
        if ours != theirs:
            return f"{name} {ours} in memory, {theirs} on disk"
    return ""
