"""The methods of org.freedesktop.systemd1.Manager: answered, recorded, withheld or refused.

What would change the running system is recorded as the command that does the same in the guest, and
the caller is told that it is done. What changes unit files is done, by the guest's own systemctl.

Source: org.freedesktop.systemd1(5); systemd v252 src/core/dbus-manager.c, src/core/dbus-unit.c
(``bus_unit_queue_job``), src/core/dbus.c for the signals of jobs.
"""

from __future__ import annotations

import fnmatch
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ouassister.shadow.events import Event, Outcome
from ouassister.shadow.servicemanager import properties as tables
from ouassister.shadow.servicemanager.callers import Caller
from ouassister.shadow.servicemanager.unitfiles import is_unit_name, split_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.shadow.servicemanager.guestctl import GuestSystemctl
    from ouassister.shadow.servicemanager.units import Unit, Units

Answer = tuple[str, tuple[Any, ...]]
NOTHING: Final[Answer] = ("", ())
ERRORS: Final = "org.freedesktop.DBus.Error."
_SYSTEMD: Final = "org.freedesktop.systemd1."
_MAX_NAMES: Final = 1024
_MODES: Final = frozenset(
    ("replace", "fail", "replace-irreversibly", "ignore-dependencies", "ignore-requirements",
     "flush", "triggering", "restart-dependencies")
)  # fmt: skip
# systemd.special(7): reaching them ends what runs. A guest is not to be shut down by an update.
_ENDINGS: Final = frozenset(
    f"{name}.target"
    for name in (
        "reboot", "poweroff", "halt", "kexec", "soft-reboot", "shutdown", "exit", "rescue",
        "emergency", "suspend", "hibernate", "hybrid-sleep", "suspend-then-hibernate", "sleep",
        "umount", "final",
    )
)  # fmt: skip
_ENDS: Final = "the guest goes on running; do it when it suits"
_FILE: Final = re.compile(r"/?[A-Za-z0-9:_.\\@/+-]{1,1023}")
_RUNTIME, _FORCE = 1, 2  # org.freedesktop.systemd1(5), EnableUnitFilesWithFlags()
_INSTALL_INFO: Final = "no installation config"


class RefusalError(Exception):
    """The answer is a D-Bus error.

    Attributes:
        name: Its name.
        text: For people.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name
        self.text = text


@dataclass(frozen=True, slots=True)
class Who:
    """Who calls; ``uid`` is as the shadow counts."""

    uid: int
    caller: Caller = field(default_factory=Caller)


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal of the manager's object."""

    member: str
    signature: str
    body: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """What a method that queues jobs means: systemctl's verb for it."""

    verb: str
    starts: bool | None  # None: leaves the unit as it is


JOBS: Final = {
    "Start": Job("start", True),
    "Stop": Job("stop", False),
    "Restart": Job("restart", True),
    "TryRestart": Job("try-restart", None),
    "Reload": Job("reload", None),
    "ReloadOrRestart": Job("reload-or-restart", True),
    "ReloadOrTryRestart": Job("try-reload-or-restart", None),
}


class Manager:
    """The manager's object.

    Args:
        units: The units.
        systemctl: The guest's own, for unit files.
        record: Takes each event.
    """

    def __init__(
        self, units: Units, systemctl: GuestSystemctl, record: Callable[[Event], None]
    ) -> None:
        self.units = units
        self._systemctl = systemctl
        self._record = record
        self._jobs = 0
        self._environment: dict[str, str] = {}
        self.signals: list[Signal] = []  # to be sent after the answer

    # --- what is recorded ---

    def job(self, who: Who, method: str, name: str, mode: str) -> Answer:
        """Queue a job, by the method's name without ``Unit``."""
        job = JOBS[method]
        self._check_name(name)
        if mode == "isolate" or name in _ENDINGS:
            self._privileged(who, job.verb, name)
            self._note(Outcome.WITHHELD, who, (job.verb, name), _ENDS)
            return self._finish_job(name, "done")
        if mode not in _MODES:
            raise RefusalError(f"{ERRORS}InvalidArgs", f"Job mode {mode} invalid")
        self._privileged(who, job.verb, name)
        unit = self.units.get(name)
        _check_job(job, unit)
        if job.verb == "reload" and not unit.running:
            return self._finish_job(unit.name, "invalid")
        options = () if mode == "replace" else (f"--job-mode={mode}",)
        self._note(Outcome.DEFERRED, who, (job.verb, *options, unit.name))
        if job.starts is not None:
            self.units.record(unit, active=job.starts)
        return self._finish_job(unit.name, "done")

    def reload(self, who: Who) -> Answer:
        """Reload: unit files are read anew here, and in the guest."""
        self._privileged(who, "daemon-reload")
        self._note(Outcome.DEFERRED, who, ("daemon-reload",))
        self.units.reload()
        self.signals.append(Signal("Reloading", "b", (True,)))
        self.signals.append(Signal("Reloading", "b", (False,)))
        return NOTHING

    def reexecute(self, who: Who) -> Answer:
        """Reexecute; the real one hangs up instead of answering, and clients take both."""
        self._privileged(who, "daemon-reexec")
        self._note(Outcome.DEFERRED, who, ("daemon-reexec",))
        self.units.reload()
        return NOTHING

    def kill(self, who: Who, name: str, whom: str, number: int) -> Answer:
        """Send a signal to a unit's processes: recorded."""
        self._check_name(name)
        self._privileged(who, "kill", name)
        target, dash, rest = whom.partition("-")
        if target not in ("all", "main", "control") or (dash and rest != "fail"):
            raise RefusalError(f"{ERRORS}InvalidArgs", f"Invalid who argument: {whom}")
        if not 0 < number <= signal.SIGRTMAX:
            raise RefusalError(f"{ERRORS}InvalidArgs", "Signal number out of range.")
        unit = self._loaded(name)
        if not unit.running:
            raise RefusalError(f"{_SYSTEMD}NoSuchProcess", "No matching processes to kill")
        options = ("--fail",) if rest else ()
        words = ("kill", *options, f"--kill-who={target}", f"--signal={number}", unit.name)
        self._note(Outcome.DEFERRED, who, words)
        return NOTHING

    def reset_failed(self, who: Who, *names: str) -> Answer:
        """Forget failures: recorded, since nobody here knows of any."""
        for name in names:
            self._check_name(name)
        self._privileged(who, "reset-failed", *names)
        self._note(Outcome.DEFERRED, who, ("reset-failed", *names))
        return NOTHING

    def set_environment(self, who: Who, unset: list[str], assignments: list[str]) -> Answer:
        """Change the environment of what the manager starts."""
        self._privileged(who, "set-environment")
        for name in unset[:_MAX_NAMES]:
            self._environment.pop(name.partition("=")[0], None)
        for assignment in assignments[:_MAX_NAMES]:
            name, _, value = assignment.partition("=")
            self._environment[name] = value
        for verb, words in (("unset-environment", unset), ("set-environment", assignments)):
            if words:
                self._note(Outcome.DEFERRED, who, (verb, *words[:_MAX_NAMES]))
        return NOTHING

    def withhold(self, who: Who, verb: str) -> Answer:
        """Reboot and the like."""
        self._privileged(who, verb)
        self._note(Outcome.WITHHELD, who, (verb,), _ENDS)
        return NOTHING

    def refuse(self, who: Who, what: str, why: str) -> Answer:
        """Decline, loudly."""
        self._record(
            Event(Outcome.REFUSED, (what,), who.caller.package, who.caller.script, why)
        )  # fmt: skip
        raise RefusalError(f"{ERRORS}NotSupported", f"{what}: {why}")

    # --- unit files ---

    def change_files(self, who: Who, verb: str, words: list[str], flags: int) -> Answer:
        """Enable, disable, mask and the like, as the answer ``ba(sss)``."""
        runtime, force = bool(flags & _RUNTIME), bool(flags & _FORCE)
        if len(words) > _MAX_NAMES or not all(map(_FILE.fullmatch, words)):
            raise RefusalError(f"{ERRORS}InvalidArgs", "Invalid unit name or path.")
        self._privileged(who, verb, *words)
        options = ["--runtime"] * runtime + ["--force"] * force
        output, changes = self._systemctl.change([verb, *options, "--", *words])
        lines = [line for line in output.text.strip().split("\n") if line]
        if output.status != 0:
            last = lines[-1] if lines else f"systemctl ended with status {output.status}"
            text = re.sub(r"^Failed to [^:]{1,40}: (?:Failed to [a-z]+ unit, )?", "", last)
            self._note(Outcome.REFUSED, who, (verb, *words), text)
            raise RefusalError(f"{ERRORS}FileNotFound", text)
        if runtime:  # made below /run, which does not travel
            self._note(Outcome.DEFERRED, who, (verb, *options, *words))
        elif changes:
            self._note(Outcome.DONE, who, (verb, *options, *words))
        self.signals.append(Signal("UnitFilesChanged", "", ()))
        return "ba(sss)", (not any(_INSTALL_INFO in line for line in lines), changes)

    def file_state(self, name: str) -> str:
        """Whether a unit file is enabled.

        Raises:
            RefusalError: There is no such file.
        """
        self._check_name(name)
        found = self._systemctl.state(name)
        if not found.state:
            raise RefusalError(f"{ERRORS}FileNotFound", "No such file or directory")
        return found.state

    def list_files(self, states: list[str], patterns: list[str]) -> Answer:
        """All unit files, with their states."""
        wanted = [
            (self.units.files.locate(name), state.state)
            for name, state in self._systemctl.states().items()
            if (not states or state.state in states) and _matches(name, patterns)
        ]
        wanted += [
            (path, "generated")
            for path in self.units.files.generated()
            if (not states or "generated" in states) and _matches(Path(path).name, patterns)
        ]
        return "a(ss)", ([item for item in wanted if item[0]],)

    # --- questions about units ---

    def get_unit(self, name: str) -> Answer:
        """The object of a unit that is loaded."""
        self._check_name(name)
        unit = self.units.get(name)
        if not unit.running and unit.name not in self.units.loaded():
            raise RefusalError(f"{_SYSTEMD}NoSuchUnit", f"Unit {name} not loaded.")
        return "o", (tables.unit_path(unit.name),)

    def load_unit(self, name: str) -> Answer:
        """The object of a unit, whether it exists or not."""
        self._check_name(name)
        return "o", (tables.unit_path(name),)

    def unit_of_pid(self, pid: int) -> Answer:
        """The object of the unit that a process of the guest is in."""
        name = self.units.of_pid(pid)
        if not name:
            raise RefusalError(
                f"{_SYSTEMD}NoUnitForPID", f"PID {pid} does not belong to any loaded unit."
            )
        return "o", (tables.unit_path(name),)

    def list_units(self, names: list[str], states: list[str], patterns: list[str]) -> Answer:
        """Units as ``systemctl list-units`` shows them."""
        rows = []
        for name in names[: _MAX_NAMES * 16]:
            if not is_unit_name(name) or not _matches(name, patterns):
                continue
            unit = self.units.get(name)
            status = unit.status
            if states and not {unit.load, status.active, status.sub} & set(states):
                continue
            description = tables.TABLES[tables.UNIT]["Description"][1](self.asked(unit))
            path = tables.unit_path(unit.name)
            rows.append(
                (unit.name, description, unit.load, status.active, status.sub, "", path, 0, "", "/")
            )
        return "a(ssssssouso)", (rows,)

    def processes(self, name: str) -> Answer:
        """The processes of a unit: control group, pid, command line."""
        self._check_name(name)
        status = self._loaded(name).status
        rows = [(status.cgroup, process.pid, process.command) for process in status.processes]
        return "a(sus)", (rows,)

    def asked(self, unit: Unit) -> tables.Asked:
        """A unit with what its properties are found by."""
        return tables.Asked(unit, self.units, self._systemctl)

    def own_properties(self, name: str | None = None) -> dict[str, tuple[str, Any]]:
        """The manager's own properties; only ``name`` is worked out if given."""
        environment = [f"{key}={value}" for key, value in self._environment.items()]
        table: dict[str, tuple[str, Callable[[], Any]]] = {
            "Version": ("s", self._systemctl.version),
            "Features": ("s", str),
            "Architecture": ("s", lambda: "x86-64"),
            "Virtualization": ("s", str),
            "Tainted": ("s", str),
            "SystemState": ("s", lambda: "running"),
            "NNames": ("u", lambda: len(self.units.loaded())),
            "NFailedUnits": ("u", int),
            "NJobs": ("u", int),
            "NInstalledJobs": ("u", lambda: self._jobs),
            "NFailedJobs": ("u", int),
            "Progress": ("d", lambda: 1.0),
            "Environment": ("as", lambda: environment),
            "UnitPath": ("as", lambda: list(self.units.files.paths)),
            "ControlGroup": ("s", str),
            "UserspaceTimestamp": ("t", lambda: self.units.booted_us),
        }
        return {
            key: (signature, value())
            for key, (signature, value) in table.items()
            if name in (None, key)
        }

    # --- helpers ---

    def _note(self, outcome: Outcome, who: Who, words: tuple[str, ...], why: str = "") -> None:
        caller = who.caller
        self._record(Event(outcome, ("systemctl", *words), caller.package, caller.script, why))

    def _privileged(self, who: Who, *words: str) -> None:
        """What polkit says without an agent to ask for a password."""
        if who.uid != 0:
            self._note(Outcome.REFUSED, who, words, f"uid {who.uid} may not")
            raise RefusalError(f"{ERRORS}AccessDenied", "Access denied")

    def _check_name(self, name: str) -> None:
        if not is_unit_name(name):
            raise RefusalError(f"{ERRORS}InvalidArgs", f"Unit name {name[:300]} is not valid.")

    def _loaded(self, name: str) -> Unit:
        unit = self.units.get(name)
        if unit.load == "not-found" and not unit.running:
            raise RefusalError(f"{_SYSTEMD}NoSuchUnit", f"Unit {name} not loaded.")
        return unit

    def _finish_job(self, name: str, result: str) -> Answer:
        self._jobs += 1
        path = f"{tables.ROOT}/job/{self._jobs}"
        self.signals.append(Signal("JobNew", "uos", (self._jobs, path, name)))
        self.signals.append(Signal("JobRemoved", "uoss", (self._jobs, path, name, result)))
        return "o", (path,)


def _check_job(job: Job, unit: Unit) -> None:
    """What the real manager refuses to queue (``bus_unit_validate_load_state``)."""
    name = unit.name
    if split_name(name)[1] == "":
        raise RefusalError(
            f"{ERRORS}InvalidArgs", f"Unit name {name} is missing the instance name."
        )
    if job.verb == "stop":
        if unit.load == "not-found" and not unit.running:
            raise RefusalError(f"{_SYSTEMD}NoSuchUnit", f"Unit {name} not loaded.")
    elif unit.load == "not-found":
        raise RefusalError(f"{_SYSTEMD}NoSuchUnit", f"Unit {name} not found.")
    elif unit.load == "masked":
        raise RefusalError(f"{_SYSTEMD}UnitMasked", f"Unit {name} is masked.")
    file = unit.file
    if file is None:
        return
    refused = "RefuseManualStop" if job.verb == "stop" else "RefuseManualStart"
    if file.flag("Unit", refused):
        how = "stop" if job.verb == "stop" else "start"
        raise RefusalError(
            f"{_SYSTEMD}OnlyByDependency",
            f"Operation refused, unit {name} may be requested by dependency only"
            f" (it is configured to refuse manual {how}).",
        )
    reload = tables.TABLES[tables.UNIT]["CanReload"][1]
    if job.verb == "reload" and not reload(tables.Asked(unit, None, None)):  # type: ignore[arg-type]
        raise RefusalError(
            f"{_SYSTEMD}JobTypeNotApplicable",
            f"Job type reload is not applicable for unit {name}.",
        )


def _matches(name: str, patterns: list[str]) -> bool:
    return not patterns or any(
        fnmatch.fnmatchcase(name, pattern) for pattern in patterns if len(pattern) < 300
    )
