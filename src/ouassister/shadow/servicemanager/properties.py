"""Properties of units and of the manager, as ``systemctl status`` and ``show`` ask for them.

One table for each interface: name, D-Bus signature, and where the value comes from. A property
that stands in no table is not known to the stand-in, and a client that asks for it by name is told
so; one that asks for all gets those that are here.

Source: org.freedesktop.systemd1(5); systemd v252 src/core/dbus-*.c.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ouassister.shadow.servicemanager.guestctl import FileState, GuestSystemctl
from ouassister.shadow.servicemanager.unitfiles import INIT_SCRIPTS, is_unit_name, unescape
from ouassister.shadow.servicemanager.units import TRIGGERING, Unit, Units, triggers

if TYPE_CHECKING:
    from collections.abc import Callable


MANAGER: Final = "org.freedesktop.systemd1.Manager"
PREFIX: Final = "org.freedesktop.systemd1."
UNIT: Final = "org.freedesktop.systemd1.Unit"
ROOT: Final = "/org/freedesktop/systemd1"
UNIT_ROOT: Final = f"{ROOT}/unit/"
NEVER: Final = (1 << 64) - 1  # UINT64_MAX: infinity, or not known
_DESCRIBED: Final = {  # units that systemd makes itself (src/core/slice.c, src/core/scope.c)
    "-.slice": "Root Slice",
    "system.slice": "System Slice",
    "init.scope": "System and Service Manager",
    "-.mount": "Root Mount",
}
_LABEL: Final = re.compile(rb"[A-Za-z0-9]")


@dataclass(frozen=True, slots=True)
class Asked:
    """A unit, and what can be found out of it."""

    unit: Unit
    units: Units
    systemctl: GuestSystemctl

    def setting(self, section: str, key: str, default: str = "") -> str:
        """A setting of its file."""
        file = self.unit.file
        return file.last(section, key, default) if file is not None else default

    def flag(self, section: str, key: str, *, default: bool = False) -> bool:
        """A boolean of its file."""
        file = self.unit.file
        return file.flag(section, key, default=default) if file is not None else default

    def names(self, kind: str) -> list[str]:
        """Units that its file names."""
        file = self.unit.file
        return self.units.files.depends(file, kind) if file is not None else []

    def file_state(self) -> FileState | None:
        """Whether it is enabled; None without a file."""
        if self.unit.file is None:
            return None
        return self.systemctl.state(self.unit.name)

    def triggers(self) -> list[str]:
        """What a socket, timer, path or automount starts."""
        return triggers(self.unit.name, self.unit.file)

    def triggered_by(self) -> list[str]:
        """Units that are loaded and start this one."""
        found = []
        for name in (name for name in self.units.loaded() if name.endswith(TRIGGERING)):
            other = self.units.get(name)
            exists = other.file is not None and not other.file.masked
            if exists and self.unit.name in triggers(other.name, other.file):
                found.append(name)
        return found


Property = tuple[str, "Callable[[Asked], Any]"]


def unit_path(name: str) -> str:
    """The object of a unit (systemd src/basic/bus-label.c)."""
    escaped = ""
    for position, byte in enumerate(name.encode()):
        plain = _LABEL.match(bytes([byte])) and not (position == 0 and 0x30 <= byte <= 0x39)
        escaped += chr(byte) if plain else f"_{byte:02x}"
    return UNIT_ROOT + (escaped or "_")


def unit_of_path(path: str) -> str:
    """The unit that an object is; empty for none."""
    if not path.startswith(UNIT_ROOT):
        return ""
    name = re.sub(
        r"_([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), path.removeprefix(UNIT_ROOT)
    )
    return name if is_unit_name(name) else ""


def interfaces_of(kind: str) -> tuple[str, ...]:
    """The interfaces of units of a type that have a table here."""
    own = f"{PREFIX}{kind.capitalize()}"
    return (own, UNIT) if own in TABLES else (UNIT,)


def _description(asked: Asked) -> str:
    described = asked.setting("Unit", "Description")
    if described:
        return described
    name = asked.unit.name
    if name in _DESCRIBED:
        return _DESCRIBED[name]
    if asked.unit.kind == "slice":
        return f"Slice /{unescape(name.removesuffix('.slice'))}"
    what, where, _ = asked.units.mounted(name)
    return where if what else name


def _exec(key: str) -> Callable[[Asked], Any]:
    def commands(asked: Asked) -> list[tuple[object, ...]]:
        file = asked.unit.file
        found: list[tuple[object, ...]] = []
        for line in file.settings.get(("Service", key), []) if file is not None else []:
            marks = re.match(r"[-@:+!|]*", line)
            head = marks[0] if marks is not None else ""
            try:
                words = shlex.split(file.expand(line[len(head) :])) if file is not None else []
            except ValueError:  # quotes that do not end
                continue
            if words:
                found.append((words[0], words, "-" in head, 0, 0, 0, 0, 0, 0, 0))
        return found

    return commands


def _listen(asked: Asked) -> list[tuple[str, str]]:
    kinds = {"ListenStream": "Stream", "ListenDatagram": "Datagram", "ListenFIFO": "FIFO",
             "ListenSequentialPacket": "SequentialPacket", "ListenNetlink": "Netlink",
             "ListenSpecial": "Special"}  # fmt: skip
    file = asked.unit.file
    if file is None:
        return []
    values = ((kind, file.settings.get(("Socket", key), [])) for key, kind in kinds.items())
    return [
        (kind, f"[::]:{value}" if value.isdigit() else file.expand(value))
        for kind, many in values
        for value in many
    ]


def _paths(asked: Asked) -> list[tuple[str, str]]:
    file = asked.unit.file
    kinds = ("PathExists", "PathExistsGlob", "PathChanged", "PathModified", "DirectoryNotEmpty")
    if file is None:
        return []
    return [(kind, file.expand(v)) for kind in kinds for v in file.settings.get(("Path", kind), [])]


def _type(asked: Asked) -> str:
    if asked.unit.load != "loaded":
        return ""
    implied = "dbus" if asked.setting("Service", "BusName") else "simple"
    return asked.setting("Service", "Type", implied)


def _strings(key: str) -> Property:
    return ("as", lambda asked: asked.names(key))


def _reloads(asked: Asked) -> bool:
    file = asked.unit.file
    if file is None or asked.unit.kind != "service":
        return False
    if file.source.startswith(INIT_SCRIPTS) or file.last("Service", "Type") == "notify-reload":
        return True
    return ("Service", "ExecReload") in file.settings


def _can_start(asked: Asked) -> bool:
    refused = asked.flag("Unit", "RefuseManualStart")
    return asked.unit.load == "loaded" and not refused and asked.unit.kind != "device"


def _active_time(asked: Asked) -> int:
    return asked.unit.status.since_us if asked.unit.running else 0


def _inactive_time(asked: Asked) -> int:
    return 0 if asked.unit.running else asked.unit.status.since_us


def _none_id(asked: Asked) -> bytes:
    return bytes.fromhex(asked.unit.status.invocation)


_GROUP: Final[dict[str, Property]] = {
    "Slice": ("s", lambda a: a.unit.status.cgroup.split("/")[-2] or "-.slice"
              if a.unit.status.cgroup.count("/") > 1 else ""),
    "ControlGroup": ("s", lambda a: a.unit.status.cgroup),
    "TasksCurrent": ("t", lambda a: sum(p.threads for p in a.unit.status.processes) or NEVER),
    "TasksMax": ("t", lambda _: NEVER),
    "MemoryCurrent": ("t", lambda _: NEVER),
    "CPUUsageNSec": ("t", lambda _: NEVER),
}  # fmt: skip

TABLES: Final[dict[str, dict[str, Property]]] = {
    UNIT: {
        "Id": ("s", lambda a: a.unit.name),
        "Names": ("as", lambda a: [a.unit.name]),
        "Following": ("s", lambda _: ""),
        "Requires": _strings("Requires"),
        "Requisite": _strings("Requisite"),
        "Wants": _strings("Wants"),
        "BindsTo": _strings("BindsTo"),
        "PartOf": _strings("PartOf"),
        "Upholds": _strings("Upholds"),
        "Conflicts": _strings("Conflicts"),
        "Before": _strings("Before"),
        "After": _strings("After"),
        "OnFailure": _strings("OnFailure"),
        "Triggers": ("as", Asked.triggers),
        "TriggeredBy": ("as", Asked.triggered_by),
        "Documentation": ("as", lambda a: a.unit.file.words("Unit", "Documentation")
                          if a.unit.file is not None else []),
        "Description": ("s", _description),
        "LoadState": ("s", lambda a: a.unit.load),
        "ActiveState": ("s", lambda a: a.unit.status.active),
        "FreezerState": ("s", lambda _: "running"),
        "SubState": ("s", lambda a: a.unit.status.sub),
        "FragmentPath": ("s", lambda a: a.unit.file.fragment if a.unit.file is not None else ""),
        "SourcePath": ("s", lambda a: a.unit.file.source if a.unit.file is not None else ""),
        "DropInPaths": ("as", lambda a: list(a.unit.file.dropins)
                        if a.unit.file is not None else []),
        "UnitFileState": ("s", lambda a: s.state if (s := a.file_state()) is not None else ""),
        "UnitFilePreset": ("s", lambda a: s.preset if (s := a.file_state()) is not None else ""),
        "StateChangeTimestamp": ("t", lambda a: a.unit.status.since_us),
        "InactiveExitTimestamp": ("t", _active_time),
        "ActiveEnterTimestamp": ("t", _active_time),
        "ActiveExitTimestamp": ("t", _inactive_time),
        "InactiveEnterTimestamp": ("t", _inactive_time),
        "CanStart": ("b", _can_start),
        "CanStop": ("b", lambda a: not a.flag("Unit", "RefuseManualStop")),
        "CanReload": ("b", _reloads),
        "CanIsolate": ("b", lambda a: a.flag("Unit", "AllowIsolate")),
        "CanFreeze": ("b", lambda _: False),
        "Job": ("(uo)", lambda _: (0, "/")),
        "StopWhenUnneeded": ("b", lambda a: a.flag("Unit", "StopWhenUnneeded")),
        "RefuseManualStart": ("b", lambda a: a.flag("Unit", "RefuseManualStart")),
        "RefuseManualStop": ("b", lambda a: a.flag("Unit", "RefuseManualStop")),
        "AllowIsolate": ("b", lambda a: a.flag("Unit", "AllowIsolate")),
        "DefaultDependencies": ("b", lambda a: a.flag("Unit", "DefaultDependencies", default=True)),
        "NeedDaemonReload": ("b", lambda a: a.units.outdated(a.unit)),
        "ConditionResult": ("b", lambda a: a.unit.running),
        "AssertResult": ("b", lambda a: a.unit.running),
        "ConditionTimestamp": ("t", _active_time),
        "AssertTimestamp": ("t", _active_time),
        "LoadError": ("(ss)", lambda a: (f"{PREFIX}NoSuchUnit", f"Unit {a.unit.name} not found.")
                      if a.unit.load == "not-found" else ("", "")),
        "Transient": ("b", lambda a: a.unit.file is not None
                      and a.unit.file.fragment.startswith("/run/systemd/transient/")),
        "InvocationID": ("ay", _none_id),
    },
    f"{PREFIX}Service": {
        "Type": ("s", _type),
        "Restart": ("s", lambda a: a.setting("Service", "Restart", "no")),
        "PIDFile": ("s", lambda a: a.setting("Service", "PIDFile")),
        "BusName": ("s", lambda a: a.setting("Service", "BusName")),
        "User": ("s", lambda a: a.setting("Service", "User")),
        "Group": ("s", lambda a: a.setting("Service", "Group")),
        "RemainAfterExit": ("b", lambda a: a.flag("Service", "RemainAfterExit")),
        "GuessMainPID": ("b", lambda a: a.flag("Service", "GuessMainPID", default=True)),
        "MainPID": ("u", lambda a: a.unit.status.main_pid),
        "ControlPID": ("u", lambda _: 0),
        "ExecMainPID": ("u", lambda a: a.unit.status.main_pid),
        "ExecMainCode": ("i", lambda _: 0),
        "ExecMainStatus": ("i", lambda _: 0),
        "ExecMainStartTimestamp": ("t", _active_time),
        "ExecMainExitTimestamp": ("t", lambda _: 0),
        "RuntimeMaxUSec": ("t", lambda _: NEVER),
        "StatusText": ("s", lambda _: ""),
        "StatusErrno": ("i", lambda _: 0),
        "Result": ("s", lambda _: "success"),
        "NRestarts": ("u", lambda _: 0),
        "ExecStart": ("a(sasbttttuii)", _exec("ExecStart")),
        "ExecReload": ("a(sasbttttuii)", _exec("ExecReload")),
        "ExecStop": ("a(sasbttttuii)", _exec("ExecStop")),
        **_GROUP,
    },
    f"{PREFIX}Socket": {
        "Listen": ("a(ss)", _listen),
        "Accept": ("b", lambda a: a.flag("Socket", "Accept")),
        "Result": ("s", lambda _: "success"),
        **_GROUP,
    },
    f"{PREFIX}Timer": {
        "Unit": ("s", lambda a: "".join(a.triggers())),
        "NextElapseUSecRealtime": ("t", lambda _: 0),
        "NextElapseUSecMonotonic": ("t", lambda _: NEVER),
        "LastTriggerUSec": ("t", lambda _: 0),
        "LastTriggerUSecMonotonic": ("t", lambda _: 0),
        "Result": ("s", lambda _: "success"),
    },
    f"{PREFIX}Path": {
        "Unit": ("s", lambda a: "".join(a.triggers())),
        "Paths": ("a(ss)", _paths),
        "Result": ("s", lambda _: "success"),
    },
    f"{PREFIX}Mount": {
        "What": ("s", lambda a: a.units.mounted(a.unit.name)[0] or a.setting("Mount", "What")),
        "Where": ("s", lambda a: a.units.mounted(a.unit.name)[1] or a.setting("Mount", "Where")),
        "Type": ("s", lambda a: a.units.mounted(a.unit.name)[2] or a.setting("Mount", "Type")),
        "Options": ("s", lambda a: a.setting("Mount", "Options")),
        "Result": ("s", lambda _: "success"),
        **_GROUP,
    },
    f"{PREFIX}Automount": {
        "Where": ("s", lambda a: a.setting("Automount", "Where")),
        "Result": ("s", lambda _: "success"),
    },
    f"{PREFIX}Swap": {"What": ("s", lambda a: a.setting("Swap", "What")), **_GROUP},
    f"{PREFIX}Target": {},
    f"{PREFIX}Slice": _GROUP,
    f"{PREFIX}Scope": {"Result": ("s", lambda _: "success"), **_GROUP},
}  # fmt: skip
