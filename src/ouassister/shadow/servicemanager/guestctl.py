"""What is decided by files alone is asked of, and done by, the guest's own systemctl.

With SYSTEMD_OFFLINE=1 it works on the tree and contacts nobody (systemd docs/ENVIRONMENT.md):
enabling a unit makes the same links as in the guest, whatever its version thinks they are. It runs
inside the shadow like any other program there: in its namespaces, under its filter.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from ouassister.shadow import raw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ouassister.shadow.servicemanager.unitfiles import UnitFiles

_LIMIT_S: Final = 30.0
_MAX_OUTPUT: Final = 1 << 20
_MAX_ASKED: Final = 1024
_NOT_STARTED: Final = 127
_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
    "SYSTEMD_OFFLINE": "1",
    "SYSTEMCTL_SKIP_SYSV": "1",  # the caller's systemctl has dealt with init scripts
    "SYSTEMD_LOG_LEVEL": "info",
    "SYSTEMD_LOG_TARGET": "console",
    "SYSTEMD_COLORS": "0",
    "SYSTEMD_PAGER": "",
}
_CREATED: Final = re.compile(r"Created symlink '?(/\S+?)'? (?:->|→) '?(/\S+?)'?\.?")
_REMOVED: Final = re.compile(r"Removed (?:symlink )?[\"']?(/\S+?)[\"']?\.?")
_STATE: Final = re.compile(r"[a-z-]{1,24}")


@dataclass(frozen=True, slots=True)
class Output:
    """What a program left."""

    status: int
    text: str


@dataclass(frozen=True, slots=True)
class FileState:
    """Whether a unit file is enabled, and whether the vendor would have it so."""

    state: str
    preset: str


class GuestPrograms:
    """Starts programs of the guest from the process that serves, which has joined its namespaces.

    Args:
        confine: Called in the child before the program starts: installs the filter of system
            calls, and sees to it that somebody answers its notifications.
    """

    def __init__(self, confine: Callable[[], None]) -> None:
        self._confine = confine

    def run(self, argv: Sequence[str]) -> Output:
        """Run a program to its end; what takes or tells too much is killed, and has failed."""
        reader, writer = os.pipe()
        try:
            child = os.fork()
        except OSError as error:  # the first process of the namespace has ended
            os.close(reader)
            os.close(writer)
            return Output(_NOT_STARTED, error.strerror or "")
        if child == 0:
            self._become(argv, writer)
        os.close(writer)
        collected, deadline = b"", time.monotonic() + _LIMIT_S
        while len(collected) <= _MAX_OUTPUT:
            if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
                break
            data = os.read(reader, 65536)
            if not data:
                break
            collected += data
        os.close(reader)
        if time.monotonic() >= deadline or len(collected) > _MAX_OUTPUT:
            os.kill(child, signal.SIGKILL)
        _pid, status = os.waitpid(child, 0)
        return Output(os.waitstatus_to_exitcode(status), collected.decode("utf-8", "replace"))

    def _become(self, argv: Sequence[str], output: int) -> NoReturn:
        with contextlib.suppress(OSError):
            raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            null = os.open("/dev/null", os.O_RDONLY)
            for source, target in ((null, 0), (output, 1), (output, 2)):
                os.dup2(source, target)
            for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.umask(0o022)
            os.chdir("/")
            self._confine()
            os.execvpe(argv[0], list(argv), _ENVIRONMENT)
        os._exit(_NOT_STARTED)


class GuestSystemctl:
    """Questions and orders about unit files.

    Args:
        run: Runs a program of the guest (`GuestPrograms.run`).
        files: Tells when an answer may have changed.
    """

    def __init__(self, run: Callable[[Sequence[str]], Output], files: UnitFiles) -> None:
        self._run = run
        self._files = files
        self._stamp: object = None
        self._version: str | None = None
        self._listed: dict[str, FileState] | None = None
        self._asked: dict[str, FileState] = {}

    def unit_paths(self) -> tuple[str, ...]:
        """The load path; empty when the guest cannot tell."""
        output = self._run(["systemd-analyze", "unit-paths"])
        lines = output.text.split("\n")
        paths = tuple(line for line in lines if line.startswith("/") and "\0" not in line)
        return paths[:64] if output.status == 0 else ()

    def version(self) -> str:
        """The version, as the manager tells its own; empty when the guest cannot tell."""
        if self._version is None:
            output = self._run(["systemctl", "--version"])
            found = re.match(r"systemd \d+ \(([0-9A-Za-z.~+:-]{1,80})\)", output.text)
            self._version = found[1] if found is not None else ""
        return self._version

    def states(self) -> dict[str, FileState]:
        """All unit files by name, links among them."""
        self._refresh()
        if self._listed is None:
            self._listed = self._list()
        return self._listed

    def state(self, name: str) -> FileState:
        """One unit file, instances of templates included; empty when there is none."""
        self._refresh()
        listed = self._listed if self._listed is not None else self._asked
        if name in listed:
            return listed[name]
        if name not in self._asked and len(self._asked) < _MAX_ASKED:
            self._asked.update(self._list(name))
        if name not in self._asked and len(self._asked) < _MAX_ASKED:
            output = self._run(["systemctl", "is-enabled", "--", name])
            last = output.text.strip().rpartition("\n")[2]
            known = _STATE.fullmatch(last) is not None and last != "not-found"
            self._asked[name] = FileState(last if known else "", "")
        return self._asked.get(name, FileState("", ""))

    def change(self, words: Sequence[str]) -> tuple[Output, list[tuple[str, str, str]]]:
        """Enable, disable, mask, ...; return also what changed, as systemctl's own words tell."""
        output = self._run(["systemctl", *words])
        changes = []
        for line in output.text.split("\n"):
            created, removed = _CREATED.fullmatch(line.strip()), _REMOVED.fullmatch(line.strip())
            if created is not None:
                changes.append(("symlink", created[1], created[2]))
            elif removed is not None:
                changes.append(("unlink", removed[1], ""))
        self._stamp = None
        return output, changes

    def _list(self, *names: str) -> dict[str, FileState]:
        options = ["--no-legend", "--full", "--all"]
        output = self._run(["systemctl", *options, "list-unit-files", "--", *names])
        found = {}
        for line in output.text.split("\n"):
            words = line.split()
            if len(words) in (2, 3) and all(map(_STATE.fullmatch, words[1:])):
                preset = words[2] if len(words) == 3 else "-"
                found[words[0]] = FileState(words[1], "" if preset == "-" else preset)
        return found

    def _refresh(self) -> None:
        stamp = self._files.stamp()
        if stamp != self._stamp:
            self._stamp, self._listed, self._asked = stamp, None, {}
