"""Maintainer scripts have a time each: who passes it is killed, with all that it started.

A script is a process that dpkg started with its package and name in the environment (dpkg(1),
"Internal environment"); what it starts inherits both. They are words of a guest: a script that
hides has the time of the whole program. Its dpkg learns of the end by waitpid(2) and reports the
failure of that package itself.

What belongs to a script: its children, theirs, and what of them went to the background, which is
now a child of the program's first process and younger than the script. dpkg runs one script at
a time, and nothing beside it. All are stopped before any is killed, until none is found any more:
what is stopped cannot fork; one that is only about to stop may be in the middle of a fork. The
script itself goes last.

Source: dpkg src/main/script.c (``maintscript_exec``); proc_pid_stat(5); proc_pid_environ(5).
"""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ouassister.shadow.servicemanager.callers import Caller, from_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ouassister.shadow.syscalls.records import Recorder

LOOK_S: Final = 1.0
_PATIENCE_S: Final = 20.0
_POLL_S: Final = 0.02  # nothing tells of processes that are nobody's children here
_MAX_FILE: Final = 1 << 17
_ENDED: Final = b"ZX"  # states of processes that only have to be waited for
_STOPPED: Final = b"Tt"


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc/PID/stat. ``started`` is in ticks of the clock since the host's start."""

    pid: int
    parent: int = field(compare=False)
    started: int
    state: bytes = field(compare=False)

    @property
    def ended(self) -> bool:
        """Whether it only has to be waited for."""
        return self.state in _ENDED


@dataclass(frozen=True, slots=True)
class Expired:
    """A script that was killed."""

    package: str
    script: str
    limit_s: float

    def __str__(self) -> str:
        """As a person would say it."""
        return f"the {self.script} of {self.package} did not end within {self.limit_s:g} s"


class UncontainedError(Exception):
    """A script cannot be stopped."""


class ScriptWatch:
    """Looks at the scripts of one program.

    Args:
        limit_s: Seconds that each has.
        recorder: Takes a record of each that was killed.
        patience_s: Seconds until all of a script has stopped, or it counts as uncontained; and
            until what was killed is gone, or the script itself is killed all the same.
    """

    def __init__(self, limit_s: float, recorder: Recorder, patience_s: float = _PATIENCE_S) -> None:
        self._limit_s = limit_s
        self._recorder = recorder
        self._patience_s = patience_s
        self._since: dict[tuple[int, int], float] = {}
        self.expired: list[Expired] = []

    def look(self, first: int) -> None:
        """Find the scripts that run now, and kill what has run for too long.

        Args:
            first: The first process of the program's pid namespace.

        Raises:
            UncontainedError: One could not be killed.
        """
        now = time.monotonic()
        running: dict[tuple[int, int], float] = {}
        for process, caller in find_scripts(processes(), first, _environment):
            key = (process.pid, process.started)
            running[key] = self._since.get(key, now)
            if now - running[key] >= self._limit_s:
                del running[key]
                expired = Expired(caller.package, caller.script, self._limit_s)
                self.expired.append(expired)
                self._recorder(_record(expired))
                self._kill(process, first)
        self._since = running

    def _kill(self, script: Process, first: int) -> None:
        stopped = self._stop(script, first)
        others = {one for one in stopped if one.pid != script.pid}
        send(others, signal.SIGKILL)
        self._await_gone(others, script)
        send(stopped - others, signal.SIGKILL)

    def _stop(self, script: Process, first: int) -> set[Process]:
        """Stop all that belongs to a script."""
        stopped: set[Process] = set()
        quiet = 0  # looks in a row at which all had stopped: a child may come after the first
        end = time.monotonic() + self._patience_s
        while quiet < 2:
            found = members(processes(), script, first)
            new = found - stopped
            send(new, signal.SIGSTOP)
            stopped |= new
            quiet = 0 if new or any(one.state not in _STOPPED for one in found) else quiet + 1
            if time.monotonic() >= end:
                raise UncontainedError
            if not new:
                time.sleep(_POLL_S)
        return stopped

    def _await_gone(self, killed: set[Process], script: Process) -> None:
        """Wait until they take no room any more, but for children that the script has to reap.

        dpkg goes on as soon as the script has ended, and would find no room for a process.
        """
        starts = {one.pid: one.started for one in killed}
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            left = (one for one in processes().values() if starts.get(one.pid) == one.started)
            if all(one.ended and one.parent == script.pid for one in left):
                break
            time.sleep(_POLL_S)


def find_scripts(
    table: Mapping[int, Process], first: int, environment: Callable[[int], bytes]
) -> Iterator[tuple[Process, Caller]]:
    """Find the scripts that dpkg waits for.

    What has the words of a script and no parent but the first process is no script any more: it was
    left behind by one.
    """
    children = _children(table.values())
    left = [child for one in children[first] for child in children[one.pid]]
    while left:
        process = left.pop()
        if process.ended:
            continue
        caller = from_environment(environment(process.pid))
        if not (caller.package and caller.script):
            left += children[process.pid]
        elif not from_environment(environment(process.parent)).package:
            yield process, caller


def members(table: Mapping[int, Process], script: Process, first: int) -> set[Process]:
    """All that belongs to a script, and has not ended."""
    children = _children(table.values())
    above = set()
    pid = script.pid
    while pid in table and pid not in above and pid != first:
        above.add(pid)
        pid = table[pid].parent
    left = [
        one for one in children[first] if one.started >= script.started and one.pid not in above
    ]
    now = table.get(script.pid)
    if now is not None and now == script:
        left.append(now)
    found: set[Process] = set()
    while left:
        process = left.pop()
        if process not in found:
            found.add(process)
            left += children[process.pid]
    return {one for one in found if not one.ended}


def processes() -> dict[int, Process]:
    """All that this /proc shows."""
    found = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - thousands of names, each second
        if name.isdigit() and (process := read_process(int(name))) is not None:
            found[process.pid] = process
    return found


def read_process(pid: int) -> Process | None:
    """One process; None when it is gone."""
    # The second field, a name in brackets, may contain anything.
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    if len(fields) < 20:
        return None
    return Process(pid, int(fields[1]), int(fields[19]), fields[0])


def send(targets: Iterable[Process], number: signal.Signals) -> None:
    """Signal processes, and nobody who has got the pid of one meanwhile."""
    for process in targets:
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        try:
            now = read_process(process.pid)
            if now is not None and now.started == process.started:
                signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            continue
        finally:
            os.close(descriptor)


def _children(table: Iterable[Process]) -> defaultdict[int, list[Process]]:
    children: defaultdict[int, list[Process]] = defaultdict(list)
    for process in table:
        children[process.parent].append(process)
    return children


def _environment(pid: int) -> bytes:
    return _read(f"/proc/{pid}/environ")


def _read(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""  # it has ended
    try:
        return os.read(descriptor, _MAX_FILE)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _record(expired: Expired) -> dict[str, object]:
    """For `ouassister.shadow.events.read_syscalls`."""
    return {
        "kind": "script",
        "name": expired.script,
        "outcome": "expired",
        "args": [],
        "package": expired.package,
        "program": expired.script,
        "detail": f"{expired} and was killed",
    }
