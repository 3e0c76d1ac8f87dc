"""Which call means which method: one table for each interface of each kind of object.

Source: org.freedesktop.systemd1(5); D-Bus Specification 0.43, "Standard Interfaces".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ouassister.shadow.events import Event, Outcome
from ouassister.shadow.servicemanager import properties as tables
from ouassister.shadow.servicemanager.manager import (
    ERRORS,
    JOBS,
    NOTHING,
    Answer,
    Manager,
    RefusalError,
    Who,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.shadow.servicemanager.wire import Call

PROPERTIES: Final = "org.freedesktop.DBus.Properties"
PEER: Final = "org.freedesktop.DBus.Peer"
_RUNTIME, _FORCE = 1, 2
_TRANSIENT: Final = "what it would start cannot run: the guest sleeps"
_AT_RUNTIME: Final = "settings of a running unit are not changed from outside"

Method = tuple[str, "Callable[..., Answer]"]  # signature of the arguments; takes manager and who


def _flags(runtime: bool, force: bool = False) -> int:
    return _RUNTIME * runtime + _FORCE * force


def _changes(answer: Answer) -> Answer:
    """The answer of a change to unit files, without what enabling tells besides."""
    return "a(sss)", answer[1][1:]


def _job(name: str) -> Callable[..., Answer]:
    def queue(manager: Manager, who: Who, unit: str, mode: str, *_flags: int) -> Answer:
        return manager.job(who, name, unit, mode)

    return queue


def _files(verb: str, *, info: bool = False) -> Callable[..., Answer]:
    """Methods that take names, whether below /run, and whether by force."""

    def change(manager: Manager, who: Who, names: list[str], *flags: bool) -> Answer:
        answer = manager.change_files(who, verb, names, _flags(*flags))
        return answer if info else _changes(answer)

    return change


def _flagged(verb: str, *, info: bool = False) -> Callable[..., Answer]:
    """Methods that take names and one number of flags."""

    def change(manager: Manager, who: Who, names: list[str], flags: int) -> Answer:
        answer = manager.change_files(who, verb, names, flags)
        return answer if info else _changes(answer)

    return change


def _preset(manager: Manager, who: Who, names: list[str], mode: str, *flags: bool) -> Answer:
    if mode not in ("full", "enable-only", "disable-only"):
        raise RefusalError(f"{ERRORS}InvalidArgs", f"Invalid preset mode {mode}")
    if mode != "full":
        return manager.refuse(who, "PresetUnitFilesWithMode", f"mode {mode} is not known here")
    return manager.change_files(who, "preset", names, _flags(*flags))


def _dependency(
    manager: Manager, who: Who, names: list[str], target: str, kind: str, *flags: bool
) -> Answer:
    verb = {"Wants": "add-wants", "Requires": "add-requires"}.get(kind)
    if verb is None:
        raise RefusalError(f"{ERRORS}InvalidArgs", f"Invalid dependency type {kind}")
    return _changes(manager.change_files(who, verb, [target, *names], _flags(*flags)))


def _withheld(verb: str) -> Callable[..., Answer]:
    return lambda manager, who, *_: manager.withhold(who, verb)


def _refused(what: str, why: str) -> Callable[..., Answer]:
    return lambda manager, who, *_: manager.refuse(who, what, why)


def _nothing(*_: object) -> Answer:
    return NOTHING


def _no_job(manager: Manager, who: Who, number: int) -> Answer:
    del manager, who  # jobs are done at once
    raise RefusalError("org.freedesktop.systemd1.NoSuchJob", f"Job {number} does not exist.")


def _default_target(manager: Manager, who: Who) -> Answer:
    del who
    return "s", (manager.units.get("default.target").name,)


MANAGER_METHODS: Final[dict[str, Method]] = {
    **{f"{name}Unit": ("ss", _job(name)) for name in JOBS},
    "StartUnitWithFlags": ("sst", _job("Start")),
    "Reload": ("", Manager.reload),
    "Reexecute": ("", Manager.reexecute),
    "KillUnit": ("ssi", Manager.kill),
    "ResetFailed": ("", Manager.reset_failed),
    "ResetFailedUnit": ("s", Manager.reset_failed),
    "SetEnvironment": ("as", lambda m, w, many: m.set_environment(w, [], many)),
    "UnsetEnvironment": ("as", lambda m, w, names: m.set_environment(w, names, [])),
    "UnsetAndSetEnvironment": ("asas", Manager.set_environment),
    "Reboot": ("", _withheld("reboot")),
    "SoftReboot": ("s", _withheld("soft-reboot")),
    "PowerOff": ("", _withheld("poweroff")),
    "Halt": ("", _withheld("halt")),
    "KExec": ("", _withheld("kexec")),
    "Exit": ("", _withheld("exit")),
    "EnableUnitFiles": ("asbb", _files("enable", info=True)),
    "EnableUnitFilesWithFlags": ("ast", _flagged("enable", info=True)),
    "ReenableUnitFiles": ("asbb", _files("reenable", info=True)),
    "DisableUnitFiles": ("asb", _files("disable")),
    "DisableUnitFilesWithFlags": ("ast", _flagged("disable")),
    "DisableUnitFilesWithFlagsAndInstallInfo": ("ast", _flagged("disable", info=True)),
    "AddDependencyUnitFiles": ("asssbb", _dependency),
    "LinkUnitFiles": ("asbb", _files("link")),
    "MaskUnitFiles": ("asbb", _files("mask")),
    "UnmaskUnitFiles": ("asb", _files("unmask")),
    "RevertUnitFiles": ("as", lambda m, w, names: _changes(m.change_files(w, "revert", names, 0))),
    "PresetUnitFiles": ("asbb", _files("preset", info=True)),
    "PresetUnitFilesWithMode": ("assbb", _preset),
    "SetDefaultTarget": ("sb", lambda m, w, name, force: _changes(
        m.change_files(w, "set-default", [name], _flags(False, force)))),
    "GetDefaultTarget": ("", _default_target),
    "GetUnitFileState": ("s", lambda m, _w, name: ("s", (m.file_state(name),))),
    "ListUnitFiles": ("", lambda m, _w: m.list_files([], [])),
    "ListUnitFilesByPatterns": ("asas", lambda m, _w, states, patterns: m.list_files(
        states, patterns)),
    "GetUnit": ("s", lambda m, _w, name: m.get_unit(name)),
    "LoadUnit": ("s", lambda m, _w, name: m.load_unit(name)),
    "GetUnitByPID": ("u", lambda m, _w, pid: m.unit_of_pid(pid)),
    "GetUnitProcesses": ("s", lambda m, _w, name: m.processes(name)),
    "ListUnits": ("", lambda m, _w: m.list_units(m.units.loaded(), [], [])),
    "ListUnitsFiltered": ("as", lambda m, _w, states: m.list_units(m.units.loaded(), states, [])),
    "ListUnitsByPatterns": ("asas", lambda m, _w, states, patterns: m.list_units(
        m.units.loaded(), states, patterns)),
    "ListUnitsByNames": ("as", lambda m, _w, names: m.list_units(names, [], [])),
    "ListJobs": ("", lambda _m, _w: ("a(usssoo)", ([],))),
    "GetJob": ("u", _no_job),
    "CancelJob": ("u", _no_job),
    "ClearJobs": ("", _nothing),
    "Subscribe": ("", _nothing),
    "Unsubscribe": ("", _nothing),
    "RefUnit": ("s", _nothing),
    "UnrefUnit": ("s", _nothing),
    "StartTransientUnit": ("ssa(sv)a(sa(sv))", _refused("StartTransientUnit", _TRANSIENT)),
    "SetUnitProperties": ("sba(sv)", _refused("SetUnitProperties", _AT_RUNTIME)),
    "BindMountUnit": ("sssbb", _refused("BindMountUnit", _AT_RUNTIME)),
    "AttachProcessesToUnit": ("ssau", _refused("AttachProcessesToUnit", _AT_RUNTIME)),
    "QueueSignalUnit": ("ssii", _refused("QueueSignalUnit", "no recorded form has a value")),
    "CleanUnit": ("sas", _refused("CleanUnit", _AT_RUNTIME)),
    "FreezeUnit": ("s", _refused("FreezeUnit", _AT_RUNTIME)),
    "ThawUnit": ("s", _refused("ThawUnit", _AT_RUNTIME)),
    "SwitchRoot": ("ss", _refused("SwitchRoot", "it ends what runs")),
}  # fmt: skip


def _on_unit(name: str) -> Callable[..., Answer]:
    return lambda manager, who, unit, mode: manager.job(who, name, unit, mode)


# Methods of a unit's own object take its name from the path.
UNIT_METHODS: Final[dict[str, Method]] = {
    **{name: ("s", _on_unit(name)) for name in JOBS},
    "Kill": ("si", Manager.kill),
    "ResetFailed": ("", Manager.reset_failed),
    "GetProcesses": ("", lambda m, _w, name: m.processes(name)),
    "Ref": ("", _nothing),
    "Unref": ("", _nothing),
    "SetProperties": ("ba(sv)", _refused("SetProperties", _AT_RUNTIME)),
}
# Arguments of these are never looked at, so that their variants are not parsed either.
_UNREAD: Final = frozenset(
    name
    for table in (MANAGER_METHODS, UNIT_METHODS)
    for name, (signature, _) in table.items()
    if "v" in signature
)


class Objects:
    """The objects of org.freedesktop.systemd1."""

    def __init__(self, manager: Manager, record: Callable[[Event], None]) -> None:
        self.manager = manager
        self._record = record

    def call(self, call: Call, who: Who) -> Answer:
        """Answer one call.

        Raises:
            RefusalError: The answer is an error.
        """
        unit = tables.unit_of_path(call.path)
        if call.interface == PEER and call.member == "Ping":
            return NOTHING
        if call.interface == PROPERTIES:
            return self._property(call, who, unit)
        if unit:
            interfaces = tables.interfaces_of(unit.rpartition(".")[2])
            if call.interface in ("", *interfaces) and call.member in UNIT_METHODS:
                return self._invoke(UNIT_METHODS[call.member], call, who, unit)
        elif call.path == tables.ROOT and call.interface in ("", tables.MANAGER):
            method = MANAGER_METHODS.get(call.member)
            if method is not None:
                return self._invoke(method, call, who)
        raise self.unknown(call, who)

    def unknown(self, call: Call, who: Who) -> RefusalError:
        """What is in no table: an error to the caller, and in the report."""
        name = f"{call.interface}.{call.member}"[:300]
        self._note(Outcome.UNKNOWN, who, (name, call.path[:300]), "no such method here")
        return RefusalError(
            f"{ERRORS}UnknownMethod", f"Unknown method {call.member} or interface {call.interface}."
        )

    def _invoke(self, method: Method, call: Call, who: Who, *first: str) -> Answer:
        signature, function = method
        if call.signature != signature:
            text = f"{call.member} takes '{signature}', not '{call.signature}'"
            raise RefusalError(f"{ERRORS}InvalidArgs", text[:600])
        arguments = () if call.member in _UNREAD else call.arguments(signature)
        return function(self.manager, who, *first, *arguments)

    def _property(self, call: Call, who: Who, unit: str) -> Answer:
        match call.member, call.signature:
            case "Get", "ss":
                interface, name = call.arguments("ss")
                value = self._known(call, who, unit, interface, name).get(name)
                if value is None:
                    asked = f"{interface}.{name}"[:300]
                    self._note(Outcome.UNKNOWN, who, (asked, call.path[:300]), "no such property")
                    text = f"Unknown interface {interface} or property {name}."
                    raise RefusalError(f"{ERRORS}UnknownProperty", text)
                return "v", (value,)
            case "GetAll", "s":
                (interface,) = call.arguments("s")
                return "a{sv}", (self._known(call, who, unit, interface, None),)
        raise self.unknown(call, who)

    def _known(
        self, call: Call, who: Who, unit: str, interface: str, name: str | None
    ) -> dict[str, tuple[str, Any]]:
        """Properties of one interface, or of all of them; only ``name`` is worked out if given."""
        if not unit:
            if call.path == tables.ROOT and interface in ("", tables.MANAGER):
                return self.manager.own_properties(name)
            raise self.unknown(call, who)
        interfaces = tables.interfaces_of(unit.rpartition(".")[2])
        if interface not in ("", *interfaces):
            return {}
        asked = self.manager.asked(self.manager.units.get(unit))
        return {
            key: (signature, value(asked))
            for table in interfaces
            if interface in ("", table)
            for key, (signature, value) in tables.TABLES[table].items()
            if name in (None, key)
        }

    def _note(self, outcome: Outcome, who: Who, words: tuple[str, ...], why: str) -> None:
        self._record(Event(outcome, words, who.caller.package, who.caller.script, why))
