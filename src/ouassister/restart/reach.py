"""Which services nobody on a network reaches, by the sockets that their processes have.

Proven by what is in memory, or not at all: all processes of a unit are known, with all that they
have open; none has a socket but unnamed Unix ones and those of the kernel (netlink); and none of
these leads to the system bus, where others would find it. Who has a socket with a name, or of the
host itself (loopback), may be asked by a service that listens, so it counts as reached.

Source: docs/design/0024-exposed-gate.md.
"""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING, Final

from ouassister.model import Action
from ouassister.restart.actions import head_of, units_of

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from ouassister.model import GuestView, OpenFile

_UNIT: Final = re.compile(r"[A-Za-z0-9:_.@\\-]{1,200}\.service")
_SOCKET: Final = b"socket:["
_BUS: Final = re.compile(rb".*/dbus/system_bus_socket")
# Its menu is read when the guest boots.
_AFTER: Final = frozenset(("update-grub", "update-grub2", "grub-mkconfig"))
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


def split(
    actions: Iterable[Action], unreached: Container[str]
) -> tuple[tuple[Action, ...], tuple[Action, ...]]:
    """What must be done before the links go up, and what may follow; each in its order.

    The second is empty where it would have a timer alone.

    Units that are not known to run (others that a script starts, a firewall that is no process)
    are not known to be out of reach either.
    """
    before: list[Action] = []
    after: list[Action] = []
    for action in actions:
        verb, units = units_of(action)
        if not verb:
            later = action.argv[0] in _AFTER or action.argv[0] == _TIMER
            (after if later else before).append(action)
            continue
        away = [unit for unit in units if unit in unreached]
        if not away:
            before.append(action)
        elif len(away) == len(units):
            after.append(action)
        else:
            head = action.argv[: head_of(action)]
            before.append(Action((*head, *(unit for unit in units if unit not in unreached))))
            after.append(Action((*head, *away)))
    if all(action.argv[0] == _TIMER for action in after):
        return (*before, *after), ()
    return tuple(before), tuple(after)


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
