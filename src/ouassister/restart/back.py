"""What becomes of services when an update is taken back.

A unit whose file goes with the update is stopped; whoever runs what is replaced a second time is
restarted. The rest is as with an update (`restart.actions`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.model import Action, Kind, Verdict
from ouassister.restart.actions import coalesce, units_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.model import Changeset

_PLACES: Final = (b"/etc/systemd/system/", b"/lib/systemd/system/", b"/usr/lib/systemd/system/")
_STARTS: Final = frozenset(("restart", "try-restart", "start", "reload-or-restart", "force-reload"))


def actions_back(changeset: Changeset) -> tuple[Action, ...]:
    """What is done once the files are as they were: reload, stop, restart."""
    came, gone = _unit_files(changeset)
    started = list(_units(changeset, _STARTS))
    exposed = [one.unit for one in changeset.restarts if one.verdict is Verdict.RESTART]
    later = [one for one in changeset.restarts if one.verdict is Verdict.LATER]
    new = [unit for unit in started if unit in came]
    old = [unit for unit in dict.fromkeys((*started, *exposed)) if unit and unit not in came]
    if not (came or gone or old or later):
        return ()
    recorded = [
        Action(("systemctl", verb, *units))
        for verb, units in (("stop", new), ("try-restart", old))
        if units
    ]
    # A unit that runs is known to the manager without its file.
    return (Action(("systemctl", "daemon-reload")), *coalesce(recorded, later))


def stopped_for_good(changeset: Changeset) -> tuple[str, ...]:
    """Units that the update stopped and whose files come back; nobody knows if they ran."""
    _, gone = _unit_files(changeset)
    return tuple(unit for unit in _units(changeset, frozenset(("stop",))) if unit in gone)


def _unit_files(changeset: Changeset) -> tuple[frozenset[str], frozenset[str]]:
    """Names of unit files that the update brought, and of those that it took away."""
    came, gone = set(), set()
    for entry in changeset.entries:
        folder, _, name = entry.path.rpartition(b"/")
        if folder + b"/" not in _PLACES:
            continue
        if entry.kind is Kind.DELETE:
            gone.add(name.decode("utf-8", "replace"))
        elif entry.expected is None:
            came.add(name.decode("utf-8", "replace"))
    return frozenset(came), frozenset(gone)


def _units(changeset: Changeset, verbs: frozenset[str]) -> Iterable[str]:
    found: dict[str, None] = {}
    for action in changeset.actions:
        verb, units = units_of(action)
        if verb in verbs:
            found.update(dict.fromkeys(units))
    return found
