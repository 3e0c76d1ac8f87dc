"""Whose files a change set replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.model import Exposed, Kind

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from ouassister.model import Entry
    from ouassister.restart.uses import ProcessUse

_MOST_FILES: Final = 16  # told of each process


def exposed(
    uses: Iterable[ProcessUse], entries: Iterable[Entry], also: Container[bytes] = frozenset()
) -> tuple[tuple[ProcessUse, Exposed], ...]:
    """Find the processes that run what is replaced or deleted, or was before the guest slept.

    A mapped file is told by its inode as well as by its path, so that a file which another mount
    covers, or a container's, is not taken for the guest's. Directories and links are no program;
    what only gets another time is not replaced. ``also`` are paths that packages will replace in
    the guest; their inodes are not known.
    """
    old: dict[bytes, int] = {}
    for entry in entries:
        if entry.same:
            continue
        if entry.expected is not None and entry.kind in (Kind.FILE, Kind.HARDLINK, Kind.SYMLINK):
            old[entry.path] = entry.expected.inode
        elif entry.kind is Kind.DELETE:
            if entry.expected is not None:
                old[entry.path] = entry.expected.inode
            old.update((path, expected.inode) for path, expected in entry.below)
    found = []
    for use in uses:
        files = [
            file.path
            for file in use.files
            if file.gone or old.get(file.path, 0) == file.inode != 0 or file.path in also
        ]
        if use.script in old or use.script in also:
            files.append(use.script)
        if files:
            told = tuple(sorted(dict.fromkeys(files)))[:_MOST_FILES]
            found.append((use, Exposed(use.pid, use.comm, told)))
    return tuple(found)
