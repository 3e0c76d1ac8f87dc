"""What programs left in a tmpfs of the shadow. Called in the sandbox, between programs.

All that was there before was made anew when the shadow was (`ouassister.shadow.tmpfs_fill`), so
what is younger is of a program, or of a stand-in: ctime, which no program can set, tells.

Source: ``tmpfs(5)``; Linux v6.1 ``mm/shmem.c`` (``shmem_getattr``).
"""

from __future__ import annotations

import base64
import os
import re
import stat
from typing import TYPE_CHECKING, Any, Final

from ouassister.disk import small_files
from ouassister.text import from_text, to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LEGACY: Final = re.compile(rb"^/var/run(?=/)")
_MOST_NODES: Final = 1 << 16
_MOST_TOLD: Final = 1024
_MOST_DEPTH: Final = 16
_MOST_BYTES: Final = 8 << 10  # of one file


def list_made(argument: dict[str, Any]) -> list[dict[str, Any]]:
    """List directories, regular files and links that came or changed since a moment.

    Args:
        argument: ``folder``: where the tmpfs is mounted. ``since_ns``: seconds of the host's clock,
            times 10^9. ``apart``: names at its top that are not looked at, escaped. ``where``: its
            place in the guest. ``rules``: folders of tmpfiles.d(5), each the ``root`` of a tree and
            a ``path`` in it.

    Returns:
        For each, a directory before what is in it: ``path`` from the top, escaped; ``mode``,
        ``uid``, ``gid``, ``size``, ``mtime_ns`` as of lstat(2); ``content`` in base64, None where
        it is too long or none; ``target`` of a link, escaped; ``ruled``: a rule speaks of it.
    """
    found: list[dict[str, Any]] = []
    top = os.open(argument["folder"], _FOLDER_FLAGS)
    try:
        for folder, name, path, status in _each(
            top, b"", frozenset(argument["apart"]), [_MOST_NODES]
        ):
            if status.st_ctime_ns >= argument["since_ns"]:
                found.append(_told(folder, name, path, status))
                if len(found) == _MOST_TOLD:
                    break
    finally:
        os.close(top)
    ruled = _ruled(argument["rules"]) if found else frozenset()
    where = argument["where"].encode()
    return [one | {"ruled": where + from_text(one["path"]) in ruled} for one in found]


def names(argument: dict[str, Any]) -> list[str]:
    """List the paths in a tmpfs, of whatever kind.

    Args:
        argument: ``folder`` and ``apart``, as of `list_made`.

    Returns:
        Paths from the top, escaped; nothing of a tmpfs that has more than is looked at.
    """
    found: list[str] = []
    left = [_MOST_NODES]
    top = os.open(argument["folder"], _FOLDER_FLAGS)
    try:
        for _folder, _name, path, _status in _each(top, b"", frozenset(argument["apart"]), left):
            found.append(to_text(path))
    finally:
        os.close(top)
    return found if left[0] >= 0 else []


def _ruled(folders: list[dict[str, str]]) -> frozenset[bytes]:
    """Paths that rules of tmpfiles.d(5) speak of; names of folders in memory are /run's."""
    paths: set[bytes] = set()
    for folder in folders:
        names = small_files.names(folder)
        files = [
            {"root": folder["root"], "path": f"{folder['path']}/{name}"}
            for name in names
            if name.endswith(".conf")
        ]
        for content in small_files.read(files):
            for line in from_text(content or "").splitlines():
                words = line.split(None, 2)
                if len(words) > 1 and not line.startswith(b"#"):
                    paths.add(_LEGACY.sub(b"/run", words[1].rstrip(b"/")))
    return frozenset(paths)


def _each(
    folder: int, path: bytes, apart: frozenset[str], left: list[int]
) -> Iterator[tuple[int, bytes, bytes, os.stat_result]]:
    """Each file with its open folder, name and path; ``left`` goes below 0 when there are more."""
    with os.scandir(folder) as entries:
        inside = sorted(os.fsencode(entry.name) for entry in entries)
    for name in inside:
        if not path and to_text(name) in apart:
            continue
        left[0] -= 1
        if left[0] < 0:
            return
        below = path + b"/" + name
        status = os.lstat(name, dir_fd=folder)
        yield folder, name, below, status
        if stat.S_ISDIR(status.st_mode) and below.count(b"/") < _MOST_DEPTH:
            try:
                opened = os.open(name, _FOLDER_FLAGS, dir_fd=folder)
            except OSError:  # something is mounted there, or it is gone
                continue
            try:
                if os.fstat(opened).st_dev == status.st_dev:
                    yield from _each(opened, below, apart, left)
            finally:
                os.close(opened)


def _told(folder: int, name: bytes, path: bytes, status: os.stat_result) -> dict[str, Any]:
    content = target = None
    if stat.S_ISREG(status.st_mode) and status.st_size <= _MOST_BYTES:
        descriptor = os.open(name, _FILE_FLAGS, dir_fd=folder)
        with os.fdopen(descriptor, "rb") as file:
            content = base64.b64encode(file.read(_MOST_BYTES)).decode("ascii")
    elif stat.S_ISLNK(status.st_mode):
        target = to_text(os.readlink(name, dir_fd=folder))
    return {
        "path": to_text(path),
        "mode": status.st_mode,
        "uid": status.st_uid,
        "gid": status.st_gid,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "content": content,
        "target": target,
    }
