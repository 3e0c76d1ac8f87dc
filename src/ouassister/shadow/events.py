"""What happened in a shadow and belongs to the running guest: records, and actions made of them.

Records come from the stand-in of the service manager and, through it, from the recorders: one JSON
object a line, in the order in which things happened. The file lies where no program of the guest
reaches it; its words are a guest's all the same.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from ouassister import codec
from ouassister.errors import InternalError, UpdaterError
from ouassister.model import Action

if TYPE_CHECKING:
    from collections.abc import Iterable
    from io import BufferedReader
    from pathlib import Path

MAX_RECORDS: Final = 1 << 24
_MAX_VALUES: Final = 1 << 22
_MAX_ACTIONS: Final = 4096
_MAX_SHOWN: Final = 80
_WORD: Final = re.compile(r"[A-Za-z0-9:_.@\\=/+-]{1,255}")  # unit names: systemd.unit(5)
_RELOAD, _REEXECUTE = "daemon-reload", "daemon-reexec"
_POLICY: Final = ("apparmor_parser",)


class Outcome(StrEnum):
    """What became of a call."""

    DEFERRED = "deferred"  # recorded, to be done in the guest; the caller was told that it is done
    DONE = "done"  # by the guest's own program, on the files of the shadow
    WITHHELD = "withheld"  # the caller was told that it is done; it will not be, by policy
    REFUSED = "refused"  # the caller was told so
    UNKNOWN = "unknown"  # in no table: the caller got an error
    FOREIGN = "foreign"  # meant for a daemon that nothing stands in for: the caller got an error
    EXPIRED = "expired"  # no call: a package's script ran for too long, and was killed
    LIMITED = "limited"  # no call: programs took more of the host than they may
    LOST = "lost"  # the rest of the records is not here


@dataclass(frozen=True, slots=True)
class Event:
    """One record.

    ``words`` is the command that does the same in the guest, or else what was called.
    """

    outcome: Outcome
    words: tuple[str, ...]
    package: str = ""  # whose script called; empty when none did
    script: str = ""
    detail: str = ""


_OF_CALLS: Final = {
    "recorded": Outcome.WITHHELD,
    "passed": Outcome.DONE,
    "denied": Outcome.REFUSED,
    "foreign": Outcome.FOREIGN,
    "unknown": Outcome.UNKNOWN,
    "expired": Outcome.EXPIRED,
    "limited": Outcome.LIMITED,
}
_SIGNALS: Final = frozenset(("kill", "tkill", "tgkill", "rt_sigqueueinfo", "pidfd_send_signal"))

END: Final = b'{"end":true}\n'


def encode(event: Event) -> bytes:
    """One line for a file of records."""
    return json.dumps(codec.to_value(event), separators=(",", ":")).encode() + b"\n"


def read_events(path: Path) -> tuple[Event, ...]:
    """Read what the stand-in recorded.

    Raises:
        FileNotFoundError: There is no such file.
        InternalError: The file is not what the stand-in writes, or ends early: it died.
    """
    with open_regular(path) as file:
        content = file.read(MAX_RECORDS * 2)
    *lines, last = content.split(b"\n")
    ended = False
    events: list[Event] = []
    for line in lines:  # each program of a shadow has a stand-in of its own, that ends its records
        if line + b"\n" == END:
            ended = True
            continue
        ended = False
        try:
            events.append(codec.from_value(Event, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise InternalError(f"a record of the service manager: {error}") from error
    if last or not (ended or not lines):
        raise InternalError("the records of the service manager end early")
    return tuple(events)


def read_values(path: Path) -> tuple[Event, ...]:
    """Read what was written below /proc/sys or /sys; see the ``record`` of procfs and sysfs.

    Raises:
        InternalError: The file is not what the servers write.
    """
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_VALUES)
    except FileNotFoundError:
        return ()
    try:
        return tuple(codec.from_value(Event, json.loads(one)) for one in content.splitlines())
    except (ValueError, RecursionError) as error:
        raise InternalError(f"a record of values below /proc/sys or /sys: {error}") from error


def read_syscalls(path: Path) -> tuple[Event, ...]:
    """Read what the supervisor wrote of system calls; see `ouassister.shadow.syscalls.records`.

    Raises:
        InternalError: The file is not what the supervisor writes.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_RECORDS)
    except FileNotFoundError:
        return ()
    events: list[Event] = []
    for line in content.splitlines():
        try:
            record = json.loads(line)
            outcome = _OF_CALLS[record["outcome"]]
            words = (record["name"], *(str(one) for one in record["args"]))
            package, script = record["package"], record["program"]
        except (ValueError, KeyError, RecursionError) as error:
            raise InternalError(f"a record of system calls: {error}") from error
        detail = "a system call, for the running guest alone"
        if record["name"] in _SIGNALS and outcome is Outcome.WITHHELD:
            outcome, words = Outcome.DEFERRED, ("kill", "-s", words[-1][3:], words[-2])
        elif outcome is Outcome.FOREIGN:
            detail = "a daemon of the sleeping guest, which answers nobody"
        elif outcome is Outcome.REFUSED:
            detail = "a system call that the shadow denies"
        elif outcome is Outcome.UNKNOWN:
            detail = "a system call in no table"
        elif outcome in (Outcome.EXPIRED, Outcome.LIMITED):
            detail = str(record.get("detail", ""))
        events.append(Event(outcome, words, package, script, detail))
        if "truncated" in record:
            events.append(Event(Outcome.LOST, (), detail="further system calls are not listed"))
    return tuple(events)


def actions_of(events: Iterable[Event]) -> tuple[tuple[Action, ...], tuple[str, ...]]:
    """Make what the guest shall do out of records.

    Returns:
        The actions, reload of the service manager or of its program first and once, then policies
        that services shall be started with; and notes on what was recorded but will not be done,
        each with its reason.
    """
    notes: list[str] = []
    actions: list[Action] = []
    policies: list[Action] = []
    manager = ""  # what is to be done to the service manager itself
    for event in events:
        called = f"{' '.join(event.words)[:_MAX_SHOWN]!a}"
        by = f" (package {event.package})" if event.package else ""
        match event.outcome:
            case Outcome.DEFERRED if not all(map(_WORD.fullmatch, event.words)):
                notes.append(f"a recorded call with odd words is not done: {called}{by}")
            case Outcome.DEFERRED if verb := _of_manager(event.words):
                manager = manager if manager == _REEXECUTE else verb
            case Outcome.DEFERRED:
                one = policies if event.words[:1] == _POLICY else actions
                one.append(Action(event.words))
            case Outcome.WITHHELD:
                notes.append(f"a script asked for {called}{by}: {_shown(event)}")
            case Outcome.REFUSED | Outcome.UNKNOWN | Outcome.FOREIGN:
                notes.append(f"a script called {called}{by} and got an error: {_shown(event)}")
            case Outcome.LOST | Outcome.EXPIRED | Outcome.LIMITED:
                notes.append(_shown(event))
    merged = _merge(policies) + _merge(actions)
    if len(merged) > _MAX_ACTIONS:
        notes.append(f"{len(merged) - _MAX_ACTIONS} recorded calls over the limit are not done")
        merged = merged[:_MAX_ACTIONS]
    head = (Action(("systemctl", manager)),) if manager else ()
    return head + tuple(merged), tuple(dict.fromkeys(notes))


def deferred(events: Iterable[Event]) -> tuple[Event, ...]:
    """Those that `actions_of` makes actions of."""
    return tuple(
        event
        for event in events
        if event.outcome is Outcome.DEFERRED and all(map(_WORD.fullmatch, event.words))
    )


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


def _of_manager(words: tuple[str, ...]) -> str:
    """Whether the service manager shall load its units again, or itself, which does both."""
    if words[:1] == ("telinit",):  # init(8) of sysvinit: "q" and "u"
        letter = words[1].lower() if len(words) > 1 else ""
        return {"q": _RELOAD, "u": _REEXECUTE}.get(letter, "")
    verb = next((word for word in words[1:] if not word.startswith("-")), "")
    return verb if words[:1] == ("systemctl",) and verb in (_RELOAD, _REEXECUTE) else ""


def _shown(event: Event) -> str:
    return "".join(char if char.isprintable() else "?" for char in event.detail[:200])


def _merge(actions: list[Action]) -> list[Action]:
    """Drop repeated calls; a later one stands for the earlier."""
    last = {action: index for index, action in enumerate(actions)}
    return [action for index, action in enumerate(actions) if last[action] == index]
