"""What the open gate need not wait for, and which services nobody on a network reaches.

Proven by what is in memory, or not at all: all processes of a unit are known, with all that they
have open; none has a socket but unnamed Unix ones and those of the kernel (netlink); and none of
these leads to the system bus, where others would find it. Who has a socket with a name, or of the
host itself (loopback), may be asked by a service that listens, so it counts as reached.

Source: docs/design/0024-exposed-gate.md.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.model import Action, Verdict
from ouassister.restart.actions import units_of

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from ouassister.model import GuestView, OpenFile, Restart

_UNIT: Final = re.compile(r"[A-Za-z0-9:_.@\\-]{1,200}\.service")
_SOCKET: Final = b"socket:["
_BUS: Final = re.compile(rb".*/dbus/system_bus_socket")
# Its menu is read when the guest boots.
_AFTER: Final = frozenset(("update-grub", "update-grub2", "grub-mkconfig"))
_RESTARTS: Final = frozenset(("restart", "try-restart"))
_TIMER: Final = "systemd-run"  # restarts the agent later, which the resume talks to until its end


def out_of_reach(view: GuestView) -> frozenset[str]:
    """Units that run and are not reached.

    Args:
        view: With details of tasks, open files and sockets; without them, nothing is proven.
    """
    if view.files is None or view.sockets is None:
        return frozenset()
    named = {one.inode for one in view.sockets.bound}
    files = {process.pid: process.files for process in view.files}
    known: set[str] = set()
    reached: set[str] = set()
    for task in view.tasks:
        if task.kernel_thread or task.detail is None:
            continue
        unit = task.detail.unit
        known.add(unit)
        if task.pid not in files or any(_reaches(one, named) for one in files[task.pid]):
            reached.add(unit)
    if any(task.detail is None and not task.kernel_thread for task in view.tasks):
        return frozenset()  # nobody knows whose it is
    return frozenset(unit for unit in known - reached if _UNIT.fullmatch(unit))


@dataclass(frozen=True, slots=True)
class Parts:
    """Actions of a resume whose gate opens as soon as nothing old is in reach.

    ``begun`` are begun before the gate, in their order; it waits for the first ``awaited`` of
    them, and until ``pids``, which run what was replaced, have ended. ``left`` follow after the
    end of the others.
    """

    begun: tuple[Action, ...]
    awaited: int
    pids: tuple[int, ...]
    left: tuple[Action, ...]

    @property
    def follow(self) -> tuple[Action, ...]:
        """What the gate does not wait for."""
        return (*self.begun[self.awaited :], *self.left)


def part(
    actions: Iterable[Action], restarts: Iterable[Restart], unreached: Container[str]
) -> Parts:
    """Divide the actions.

    A process that has ended is in nobody's reach, so the gate need not wait for the one that takes
    its place. It waits for all that is no restart of units that ran when the guest fell asleep: a
    firewall has no process, and of a unit that is new nobody knows what it is for.

    Args:
        actions: In their order.
        restarts: What memory tells of units.
        unreached: Units that nobody on a network reaches.
    """
    begun: list[Action] = []
    after: list[Action] = []
    for action in actions:
        away = action.argv[0] in _AFTER or action.argv[0] == _TIMER
        (after if away else begun).append(action)
    due = {one.unit: one for one in restarts if one.unit and one.verdict is Verdict.RESTART}
    awaited = 0
    for number, action in enumerate(begun, 1):
        verb, units = units_of(action)
        plain = all(unit in due or unit in unreached for unit in units)
        if verb not in _RESTARTS or not units or not plain:
            awaited = number
    if awaited == len(begun) and all(action.argv[0] == _TIMER for action in after):
        return Parts((*begun, *after), awaited + len(after), (), ())
    later = {unit for action in begun[awaited:] for unit in units_of(action)[1]}
    pids = (
        process.pid
        for unit in sorted(later - {one for one in later if one in unreached})
        for process in due[unit].processes
    )
    return Parts(tuple(begun), awaited, tuple(dict.fromkeys(pids)), tuple(after))


def of_actions(actions: Iterable[Action], unreached: Container[str]) -> tuple[str, ...]:
    """Those of the units that actions are about."""
    units = {unit for action in actions for unit in units_of(action)[1]}
    return tuple(sorted(unit for unit in units if unit in unreached))


def _reaches(file: OpenFile, named: Container[int]) -> bool:
    if not file.path.startswith(_SOCKET) or file.family == socket.AF_NETLINK:
        return False
    if file.family != socket.AF_UNIX:
        return True  # of a network, or of what cannot be told
    return file.inode in named or _BUS.fullmatch(file.peer) is not None
