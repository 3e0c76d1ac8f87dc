"""One ordered list of actions: what package scripts asked for, and what memory says is due.

Reload first, then what scripts asked for in their order, then one call for all units that are
left: the service manager starts independent ones side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.model import Action, Verdict

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from ouassister.model import Restart

_AGENT: Final = "qemu-guest-agent.service"
_RESTARTERS: Final = ("systemctl", "deb-systemd-invoke", "invoke-rc.d", "service")
_VERBS: Final = frozenset(
    ("restart", "try-restart", "start", "stop", "reload-or-restart", "force-reload")
)
_ENDS: Final = frozenset(("restart", "try-restart", "stop"))
_RELOAD: Final = Action(("systemctl", "daemon-reload"))
_REEXECUTE: Final = Action(("systemctl", "daemon-reexec"))  # loads all units again, too
_LATER_S: Final = 30
_SIGNAL: Final = "kill"  # with the pid as its last word (`shadow.events`)
_MERGED: Final = ("systemctl", "deb-systemd-invoke")  # these take any number of units
_MOST_UNITS: Final = 128  # of one call, whose words have a limit
_CREATE: Final = ("systemd-tmpfiles", "--create")
_JOBS: Final = _VERBS | {"reload", "try-reload-or-restart"}


def coalesce(
    recorded: Iterable[Action], restarts: Iterable[Restart], again: Container[str] = ()
) -> tuple[Action, ...]:
    """Merge both.

    A unit that a script restarts or stops is not restarted again, unless it is in ``again``:
    packages that follow will replace what it runs. Signals are sent first, while the processes
    that they are meant for are still there, and not to those of a unit that a script restarts or
    stops as well. Whatever ends the guest agent
    is put off until the resume needs it no more: its children, the resume's own commands, would
    end with it. Calls that follow one another with the same verb become one (`merge`).
    """
    recorded, restarts = list(recorded), list(restarts)
    done: set[str] = set()
    actions: list[Action] = []
    later = False
    for action in recorded:
        verb, units = _units(action)
        if verb in _ENDS and _AGENT in units:
            later = later or verb != "stop"
            units = [unit for unit in units if unit != _AGENT]
            if not units:
                continue
            action = Action((*action.argv[: head_of(action)], *units))
        if verb in _ENDS:
            done.update(units)
        actions.append(action)
    actions = _signals_first(
        actions,
        {one.pid for restart in restarts if restart.unit in done for one in restart.processes},
    )
    actions = merge(_create_first(actions))
    due = []
    for restart in restarts:
        if restart.verdict is Verdict.LATER:
            later = True
        elif restart.verdict is Verdict.RESTART and (
            restart.unit not in done or restart.unit in again
        ):
            due.append(restart.unit)
    if due:
        if _RELOAD not in actions and _REEXECUTE not in actions:
            # A unit's file may be among what was replaced, and nobody said so.
            actions.insert(0, _RELOAD)
        actions.append(Action(("systemctl", "try-restart", *due)))
    if later:
        timer = ("systemd-run", f"--on-active={_LATER_S}", "systemctl", "try-restart", _AGENT)
        actions.append(Action(timer))
    return tuple(actions)


def merge(actions: Iterable[Action]) -> list[Action]:
    """Make one call of neighbours that differ in their units alone, and reload once, first.

    Each program that a just restored guest starts costs 0.2 s or more under TCG; and of one call
    the service manager does all jobs side by side, in the order that the units themselves ask for.
    """
    merged: list[Action] = []
    reload = False
    for action in actions:
        if action == _RELOAD:
            reload = True
            continue
        before = merged[-1] if merged else _RELOAD
        head, units = _call(before)
        also_head, also = _call(action)
        together = tuple(dict.fromkeys((*units, *also)))
        if head and head == also_head and len(together) <= _MOST_UNITS:
            merged[-1] = Action((*head, *together))
        else:
            merged.append(action)
    return [_RELOAD, *merged] if reload else merged


def _create_first(actions: Iterable[Action]) -> list[Action]:
    """Make one call of those that make what tmpfiles.d(5) describes, before what needs it.

    All files are in place by then, so that what a later script asks for may come earlier; not
    before a call that stops something, which may take away what it had.
    """
    gathered: list[Action] = []
    at = -1  # of the call that takes more
    for action in actions:
        if action.argv[:2] != _CREATE or any(word.startswith("-") for word in action.argv[2:]):
            if _units(action)[0] == "stop":
                at = -1
            gathered.append(action)
        elif at < 0 or len(action.argv) == len(_CREATE):  # without names: all that there are
            at = len(gathered) if len(action.argv) > len(_CREATE) else at
            gathered.append(action)
        else:
            names = dict.fromkeys((*gathered[at].argv[2:], *action.argv[2:]))
            if len(names) > _MOST_UNITS:
                at = len(gathered)
                gathered.append(action)
            else:
                gathered[at] = Action((*_CREATE, *names))
    return gathered


def side_by_side(actions: Iterable[Action]) -> list[list[int]]:
    """Which actions may go on at once, by their numbers; each group ends before the next begins.

    Calls of the service manager for units of their own: it orders its jobs as the units ask for,
    whoever queued them. Not those that stop beside those that start: a unit that is started pulls
    in others, whose jobs to stop are cancelled then (systemd.unit(5), ``Requires=``; systemctl(1),
    ``--job-mode=replace``).
    """
    groups: list[list[int]] = []
    busy: set[str] = set()
    stopping = False
    for number, action in enumerate(actions):
        stops, units = _jobs(action)
        if units and busy and stops == stopping and busy.isdisjoint(units):
            groups[-1].append(number)
            busy |= units
        else:
            groups.append([number])
            busy, stopping = set(units), stops
    return groups


def _jobs(action: Action) -> tuple[bool, frozenset[str]]:
    """Whether a call stops, and the units that it queues jobs for; none for any other call."""
    program, *words = action.argv
    plain = [word for word in words if not word.startswith("-")]
    if program in ("invoke-rc.d", "service"):
        plain = plain[1::-1]
    if program not in _RESTARTERS or len(plain) < 2 or plain[0] not in _JOBS:
        return False, frozenset()
    units = frozenset(unit if "." in unit else f"{unit}.service" for unit in plain[1:])
    return plain[0] == "stop", units


def _call(action: Action) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A call that may be merged: program, options and verb; and its units. Else nothing."""
    at = head_of(action)
    head, units = action.argv[:at], action.argv[at:]
    options = head[1:-1]
    if head[0] not in _MERGED or not units or any(not word.startswith("-") for word in options):
        return (), ()
    if any(word.startswith("-") for word in units):  # an option that follows is none of our own
        return (), ()
    return head, units


def _signals_first(actions: list[Action], ending: Container[int]) -> list[Action]:
    """A pid may be another process's by the time that its own has been restarted."""
    signals = [action for action in actions if action.argv[0] == _SIGNAL]
    meant = [action for action in signals if int(action.argv[-1]) not in ending]
    others = [action for action in actions if action.argv[0] != _SIGNAL]
    at = 1 if others[:1] == [_RELOAD] else 0
    return [*others[:at], *meant, *others[at:]]


def head_of(action: Action) -> int:
    """How many words of an action there are up to its verb."""
    for at, word in enumerate(action.argv[1:], 1):
        if word in _VERBS:
            return at + 1
    return len(action.argv)


def _units(action: Action) -> tuple[str, list[str]]:
    """The verb and the units of a call that starts or ends some; ``""`` for any other."""
    program, *words = action.argv
    if program not in _RESTARTERS:
        return "", []
    plain = [word for word in words if not word.startswith("-")]
    if program in ("invoke-rc.d", "service"):  # NAME VERB
        plain = plain[1::-1]
    if len(plain) < 2 or plain[0] not in _VERBS:
        return "", []
    return plain[0], [unit if "." in unit else f"{unit}.service" for unit in plain[1:]]


def units_of(action: Action) -> tuple[str, tuple[str, ...]]:
    """The verb and the units of a call that starts or ends some; ``""`` for any other."""
    verb, units = _units(action)
    return verb, tuple(units)
