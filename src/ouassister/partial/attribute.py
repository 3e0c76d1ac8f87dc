"""Say of each entry of a change set which package it belongs to; nothing here runs anything.

Sources: dpkg-query(1), ``--listfiles``; dpkg's lib/dpkg/infodb-format.c (``NAME.EXT`` or
``NAME:ARCH.EXT`` in /var/lib/dpkg/info); dpkg(1), ``--force-confold``, which leaves the new file
of a package beside the administrator's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ouassister.model import Kind
from ouassister.packages.apt_status import at_work
from ouassister.partial import status
from ouassister.partial_model import Call, Portions, Stanza

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ouassister.model import Entry
    from ouassister.packages.apt_status import Work
    from ouassister.shadow.events import Event

_NS: Final = 1_000_000_000
_INFO: Final = re.compile(
    rb"/var/lib/dpkg/info/([a-z0-9][a-z0-9+.-]{1,254})(?::[a-z0-9-]+)?\.[a-z0-9-]+"
)
_BESIDE: Final = re.compile(rb"\.(?:dpkg|ucf)-(?:dist|new|old|bak|tmp)$")
_TIMELESS: Final = frozenset((Kind.DELETE, Kind.HARDLINK))


def portions_of(
    entries: tuple[Entry, ...],
    lists: Mapping[str, frozenset[bytes]],
    works: tuple[Work, ...],
    database: bytes,
    calls: Iterable[Event],
) -> Portions:
    """Record what belongs to which package.

    Args:
        entries: Of the change set.
        lists: Paths of each package that changes, of the old version and the new one.
        works: What dpkg worked on.
        database: The guest's, as it fell asleep.
        calls: What scripts asked for.
    """
    owners, writers = attribute(entries, lists, works)
    try:
        known = status.parse(database)
        stanzas = tuple(_stanza(known, name) for name in lists)
    except status.StatusError:  # one that nothing can be left out of
        stanzas = ()
    recorded = tuple(Call(event.package, event.words) for event in calls)
    return Portions(owners, writers, stanzas, recorded)


def _stanza(known: tuple[status.Package, ...], name: str) -> Stanza:
    package = status.one(known, name)
    return Stanza(name, package.text if package is not None else b"")


def attribute(
    entries: Iterable[Entry], lists: Mapping[str, frozenset[bytes]], works: tuple[Work, ...]
) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """Name the packages of each entry.

    Args:
        entries: Of the change set.
        lists: Paths of each package, of the old version and the new one.
        works: What dpkg worked on.

    Returns:
        `Portions.owners` and `Portions.writers`.
    """
    of_path: dict[bytes, set[str]] = {}
    for name, paths in lists.items():
        for path in paths:
            of_path.setdefault(path, set()).add(name)
    owners: list[tuple[str, ...]] = []
    writers: list[tuple[str, ...]] = []
    for entry in entries:
        found = _owners(entry, of_path)
        owners.append(tuple(sorted(found)))
        timed = not found and entry.kind not in _TIMELESS
        writers.append(at_work(works, entry.mtime_ns // _NS) if timed else ())
    return tuple(owners), tuple(writers)


def _owners(entry: Entry, of_path: Mapping[bytes, set[str]]) -> set[str]:
    match = _INFO.fullmatch(entry.path)
    if match is not None:
        return {match[1].decode("ascii")}
    paths = (entry.path, _BESIDE.sub(b"", entry.path), *(path for path, _state in entry.below))
    return set().union(*(of_path.get(path, ()) for path in paths))
