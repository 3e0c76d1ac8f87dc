"""What the recorders wrote, as ordered actions for the guest."""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Final

from ouassister.errors import UpdaterError
from ouassister.model import Action

if TYPE_CHECKING:
    from io import BufferedReader
    from pathlib import Path

_MAX_BYTES: Final = 1 << 20
_MAX_ACTIONS: Final = 4096
_WORD: Final = re.compile(r"[A-Za-z0-9:_.@\\=/-]{1,255}")  # unit names: systemd.unit(5)
_QUERIES: Final = frozenset(
    ("is-active", "is-failed", "is-system-running", "show", "status", "list-units")
)
_RELOADS: Final = frozenset(("daemon-reload", "daemon-reexec"))


def read_actions(
    path: Path, programs: frozenset[str]
) -> tuple[tuple[Action, ...], tuple[str, ...]]:
    """Read the recorders' file.

    Args:
        path: The file; a missing one means that nothing was recorded.
        programs: The names that recorders have.

    Returns:
        The actions, reload of the service manager first and once, and notes on what was recorded
        but will not be done, each with its reason.
    """
    try:
        with open_regular(path) as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return (), ()
    notes: list[str] = []
    if len(raw) > _MAX_BYTES:
        notes.append("more than 1 MiB of recorded calls; the rest is not done")
        raw = raw[:_MAX_BYTES].rpartition(b"\n")[0]
    actions: list[Action] = []
    reload = False
    for line in raw.decode("ascii", "surrogateescape").splitlines():
        words = tuple(line.split("\t"))
        verb = next((word for word in words[1:] if not word.startswith("-")), "")
        if words[0] not in programs or not all(_WORD.fullmatch(word) for word in words):
            notes.append(f"a recorded call with odd words is not done: {line[:80]!a}")
        elif verb in _QUERIES:
            notes.append(f"a script asked '{' '.join(words)}' and was told: unknown")
        elif words[0] == "systemctl" and verb in _RELOADS:
            reload = True
        else:
            actions.append(Action(words))
    merged = _merge(actions)
    if len(merged) > _MAX_ACTIONS:
        notes.append(f"{len(merged) - _MAX_ACTIONS} recorded calls over the limit are not done")
        merged = merged[:_MAX_ACTIONS]
    head = (Action(("systemctl", "daemon-reload")),) if reload else ()
    return head + tuple(merged), tuple(dict.fromkeys(notes))


def open_regular(path: Path) -> BufferedReader:
    """Open a file of a folder that the guest's programs can write to.

    Raises:
        FileNotFoundError: It is not there.
        UpdaterError: It is something else: a link would lead to the host's files, a pipe would
            never end.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:  # ELOOP: a link; ENXIO: a socket
        raise UpdaterError(f"a program in the shadow replaced {path.name}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UpdaterError(f"a program in the shadow replaced {path.name}")
    return os.fdopen(descriptor, "rb")


def _merge(actions: list[Action]) -> list[Action]:
    """Drop repeated calls; a later one stands for the earlier."""
    last = {action: index for index, action in enumerate(actions)}
    return [action for index, action in enumerate(actions) if last[action] == index]
