"""The units as the stand-in tells them: as they were when the guest fell asleep, and as recorded.

What a script starts or stops is recorded and not done; from then on the unit is told as if it had
been done. Processes of a unit that is told as stopped or restarted go on sleeping in the guest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ouassister.shadow.servicemanager.state import Process
from ouassister.shadow.servicemanager.unitfiles import UnitFile, is_unit_name, split_name

if TYPE_CHECKING:
    from ouassister.shadow.servicemanager.state import ManagerState
    from ouassister.shadow.servicemanager.unitfiles import UnitFiles

_MAX_WALK: Final = 4096
# What a unit is when it is active (systemd src/basic/unit-def.c, the states of each type).
_ACTIVE_SUB: Final = {
    "service": "running",
    "mount": "mounted",
    "swap": "active",
    "socket": "listening",
    "target": "active",
    "device": "plugged",
    "automount": "waiting",
    "timer": "waiting",
    "path": "waiting",
    "slice": "active",
    "scope": "running",
}
_TRIGGERS: Final = {
    "socket": ("Socket", "Service"),
    "timer": ("Timer", "Unit"),
    "path": ("Path", "Unit"),
}
TRIGGERING: Final = tuple(f".{kind}" for kind in _TRIGGERS)
_PULLS: Final = ("Wants", "Requires", "BindsTo", "Upholds")
_TRACELESS: Final = ("target", "timer", "path", "automount", "slice")


@dataclass(frozen=True, slots=True)
class Status:
    """What a unit does. Times are microseconds since the epoch, 0 when not known."""

    active: str
    sub: str
    since_us: int = 0
    processes: tuple[Process, ...] = ()
    main_pid: int = 0
    invocation: str = ""
    cgroup: str = ""


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit at one moment."""

    name: str  # the id
    file: UnitFile | None
    load: str
    status: Status

    @property
    def kind(self) -> str:
        """Its type: "service", ..."""
        return split_name(self.name)[2]

    @property
    def running(self) -> bool:
        """Whether it is active, or on the way."""
        return self.status.active not in ("inactive", "failed")


_DEAD: Final = Status("inactive", "dead")


@dataclass(slots=True)
class _Known:
    recorded: dict[str, Status] = field(default_factory=dict)
    # Of units that were not there: their files' last change when they came. The time of now is no
    # measure, since files have that of the kernel's last tick.
    read_ns: dict[str, int] = field(default_factory=dict)
    assumed: frozenset[str] | None = None


class Units:
    """All units.

    Args:
        files: The unit files.
        state: What the guest had running.
        started_ns: When the shadow's program started: what changed later is not of the guest.
    """

    def __init__(self, files: UnitFiles, state: ManagerState, started_ns: int) -> None:
        self.files = files
        self._started_ns = started_ns
        self._reloaded_ns = started_ns
        self.booted_us = state.booted_us
        self._running = {one.unit: one for one in state.units}
        self._invocations = {one.unit: one for one in state.invocations or ()}
        self._invocations_known = state.invocations is not None
        self._mounts = {one.unit: one for one in state.mounts}
        self._swaps = frozenset(state.swaps)
        self._sockets = None if state.sockets is None else frozenset(state.sockets)
        self._by_pid = {
            process.pid: one.unit for one in state.units for process in one.processes
        }  # fmt: skip
        self._slices = {
            part
            for one in state.units
            for part in one.cgroup.split("/")
            if part.endswith(".slice") and is_unit_name(part)
        } | {"-.slice"}
        self._known = _Known()

    def get(self, name: str) -> Unit:
        """A unit by any of its names; one that does not exist has load state "not-found"."""
        file = self.files.find(name)
        identity = file.id if file is not None else name
        status = self._status(identity, file)
        if file is None:
            # Mounts, slices, scopes and devices need no file; others that run have lost theirs.
            needs_none = split_name(name)[2] in ("mount", "swap", "slice", "scope", "device")
            load = "loaded" if needs_none and status != _DEAD else "not-found"
        else:
            load = "masked" if file.masked else "loaded"
        return Unit(identity, file, load, status)

    def record(self, unit: Unit, *, active: bool) -> None:
        """From now on the unit is told as started (or, not active, as stopped)."""
        now = time.time_ns() // 1000
        if not unit.running:
            self._known.read_ns[unit.name] = unit.file.changed_ns if unit.file is not None else 0
        if not active or (_is_oneshot(unit.file) and not _remains(unit.file)):
            self._known.recorded[unit.name] = Status("inactive", "dead", now)
        else:
            sub = _ACTIVE_SUB[unit.kind]
            if _is_oneshot(unit.file):
                sub = "exited"
            self._known.recorded[unit.name] = Status(
                "active", sub, now, unit.status.processes, unit.status.main_pid,
                unit.status.invocation, unit.status.cgroup,
            )  # fmt: skip

    def reload(self) -> None:
        """Unit files are read anew: nothing differs from what is loaded."""
        self._reloaded_ns = time.time_ns()

    def outdated(self, unit: Unit) -> bool:
        """Whether a unit that is loaded has files that changed since the manager read them."""
        read_ns = max(self._reloaded_ns, self._known.read_ns.get(unit.name, 0))
        return unit.running and unit.file is not None and unit.file.changed_ns > read_ns

    def loaded(self) -> list[str]:
        """Units that are not inactive, and those that something was recorded for."""
        names = {*self._running, *self._invocations, *self._mounts, *self._swaps, *self._slices}
        names |= self._assume() | self._known.recorded.keys()
        return sorted(names)

    def of_pid(self, pid: int) -> str:
        """The unit of a process of the guest; empty when there is none."""
        return self._by_pid.get(pid, "")

    def mounted(self, name: str) -> tuple[str, str, str]:
        """What is mounted where, and its type, of a mount unit."""
        one = self._mounts.get(name)
        return (one.what, one.where, one.fstype) if one is not None else ("", "", "")

    def pulled(self, file: UnitFile) -> list[str]:
        """What starts together with a unit."""
        return [name for kind in _PULLS for name in self.files.depends(file, kind)]

    # --- the guest as it fell asleep ---

    def _status(self, name: str, file: UnitFile | None) -> Status:
        recorded = self._known.recorded.get(name)
        if recorded is not None:
            return recorded
        kind = split_name(name)[2]
        running = self._running.get(name)
        invocation = self._invocations.get(name)
        since = invocation.since_us if invocation is not None else 0
        identity = invocation.id if invocation is not None else ""
        if running is not None:
            main = _main_process(running.processes, self._pid_file(file))
            if main is not None and kind == "service":
                since = self.booted_us + main.start_us
            oneshot = kind == "service" and _is_oneshot(file)
            starting = oneshot and not _remains(file)  # one that remains may leave daemons behind
            return Status(
                "activating" if starting else "active",
                "start" if starting else "exited" if oneshot else _ACTIVE_SUB[kind],
                since or self.booted_us + running.processes[0].start_us,
                running.processes,
                main.pid if main is not None and kind == "service" and not oneshot else 0,
                identity,
                running.cgroup,
            )
        if kind == "service" and invocation is not None:
            if _remains(file):
                return Status("active", "exited", since, invocation=identity)
            return Status("activating", "auto-restart", since, invocation=identity)
        found = name in self._mounts or name in self._swaps or name in self._slices
        if invocation is not None or found or name in self._assume():
            busy = kind == "socket" and any(one in self._running for one in triggers(name, file))
            sub = "running" if busy else _ACTIVE_SUB[kind]
            return Status("active", sub, since, invocation=identity)
        return _DEAD

    def _pid_file(self, file: UnitFile | None) -> int:
        path = file.last("Service", "PIDFile") if file is not None else ""
        if path and not path.startswith("/"):
            path = f"/run/{path}"
        text = (self.files.read(path) or "").strip() if path else ""
        return int(text) if text.isascii() and text.isdigit() and len(text) < 8 else 0

    def _assume(self) -> frozenset[str]:
        """Units that leave no trace in memory, and that the units known to be active lead to.

        The walk passes units that are active, and never those that came while the shadow ran.
        """
        if self._known.assumed is None:
            self._known.assumed = frozenset()  # what is asked for meanwhile is not yet known
            self._known.assumed = self._walk()
        return self._known.assumed

    def _walk(self) -> frozenset[str]:
        traced = {*self._running, *self._invocations}
        pending = ["default.target", *sorted(traced)]
        seen: set[str] = set(pending)
        active: set[str] = set()
        while pending and len(seen) < _MAX_WALK:
            name = pending.pop()
            file = self.files.find(name)
            if file is None or file.masked or file.changed_ns > self._started_ns:
                continue
            if file.flag("Unit", "ConditionFirstBoot"):
                continue  # a guest has most often booted before
            kind = split_name(file.id)[2]
            if kind in _TRACELESS or (kind == "socket" and self._listens(file)):
                active.add(file.id)
            elif name not in traced:
                continue
            for pulled in self.pulled(file):
                if pulled not in seen:
                    seen.add(pulled)
                    pending.append(pulled)
        return frozenset(active | self._held_sockets())

    def _held_sockets(self) -> set[str]:
        """Socket units that nothing pulls in, whose sockets the manager holds."""
        found = set()
        for folder in self.files.paths if self._sockets else ():
            for name in self.files.entries(folder):
                file = self.files.find(name) if name.endswith(".socket") else None
                old = file is not None and file.changed_ns <= self._started_ns
                if file is not None and old and self._addresses(file) & (self._sockets or set()):
                    found.add(file.id)
        return found

    def _listens(self, file: UnitFile) -> bool:
        """Whether the manager holds a socket that the unit describes; taken for so if not known."""
        if self._sockets is None:
            return True
        addresses = self._addresses(file)
        return not addresses or bool(addresses & self._sockets)

    def _addresses(self, file: UnitFile) -> set[str]:
        """Paths and ports; other addresses are not compared."""
        kinds = ("ListenStream", "ListenDatagram", "ListenSequentialPacket")
        words = [word for kind in kinds for word in file.words("Socket", kind)]
        return {
            word.replace("/var/run/", "/run/", 1)
            for word in words
            if word.startswith("/") or word.isdigit()
        }


def triggers(name: str, file: UnitFile | None) -> list[str]:
    """What a socket, timer, path or automount starts."""
    prefix, instance, kind = split_name(name)
    if kind == "automount":
        return [name.removesuffix("automount") + "mount"]
    if kind not in _TRIGGERS or file is None:
        return []
    named = file.last(*_TRIGGERS[kind])
    if named and is_unit_name(named):
        return [named]
    if kind == "socket" and file.flag("Socket", "Accept"):
        return []
    stem = prefix if instance is None else f"{prefix}@{instance}"
    return [f"{stem}.service"]


def _is_oneshot(file: UnitFile | None) -> bool:
    return file is not None and file.last("Service", "Type") == "oneshot"


def _remains(file: UnitFile | None) -> bool:
    return file is not None and file.flag("Service", "RemainAfterExit")


def _main_process(processes: tuple[Process, ...], pid_file: int) -> Process | None:
    """The one that the PID file names; else the first child of the manager."""
    for process in processes:
        if process.pid == pid_file:
            return process
    children = [process for process in processes if process.parent == 1]
    return children[0] if children else None
