"""Does the disk say the same as the guest's memory? Called inside the shadow, where owners agree.

Dentries and inodes that the sleeping kernel has cached are the truth; a path whose inode number,
size, mode or time differs on the disk has changes that only memory knows.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from ouassister import codec
from ouassister.disk.ext4_inodes import Inodes
from ouassister.model import CachedFile
from ouassister.text import to_text

_MOST: Final = 20


def compare(argument: dict[str, Any]) -> dict[str, Any]:
    """Compare cached files with a tree.

    Args:
        argument: ``root``: where the tree is mounted; ``image``: its file system; ``files``:
            what memory says.

    Returns:
        ``disagreements``: one line for each path that differs, at most 20; ``machine_id``: of the
        tree, empty when it has none.
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
    return {"disagreements": found, "machine_id": _machine_id(root)}


def _machine_id(root: bytes) -> str:
    """Read machine-id(5); anything but a regular file with 32 hex digits counts as none."""
    try:
        descriptor = os.open(root + b"/etc/machine-id", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        text = file.read(64).strip().decode("ascii", "replace")
    return text if re.fullmatch("[0-9a-f]{32}", text) else ""


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
