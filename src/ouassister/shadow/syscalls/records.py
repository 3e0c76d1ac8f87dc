"""What is written down of system calls: one JSON object a line, in the order of the calls.

    {"kind": "syscall", "name": "kill", "outcome": "recorded", "args": [571, "SIGHUP"],
     "package": "nginx-common", "program": "nginx.postinst", "target": "nginx"}

``outcome`` is *recorded* (to be done in the guest, if at all), *passed* (the host's kernel judges
it, in the shadow), *denied*, *unknown*, or *foreign*, meant for a daemon of the sleeping guest
(these three are told once for each program). Text is what a
guest's program chose: its reader has to judge it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ouassister.errors import InternalError
from ouassister.shadow.events import open_regular
from ouassister.text import to_text

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.shadow.syscalls.notify import Call

Record = dict[str, Any]
Recorder = Callable[[Record], None]

SYSCALLS: Final = "syscalls.jsonl"
"""The file of records, among the outputs of a shadow: no program of the guest reaches it."""

RECORDED, PASSED, DENIED, UNKNOWN = "recorded", "passed", "denied", "unknown"
FOREIGN = "foreign"
_VARIABLE: Final = b"DPKG_MAINTSCRIPT_PACKAGE="  # dpkg(1), "Internal environment"
_MAX_ENVIRONMENT: Final = 1 << 20
_MAX_NAME: Final = 255
_MAX_RECORDS: Final = 10_000
_MAX_BYTES: Final = 8 << 20
_MAX_TEXT: Final = 4096


class Journal:
    """Makes records of calls and passes them on, up to a limit.

    Args:
        recorder: Takes each.
        limit: How many.
    """

    def __init__(self, recorder: Recorder, limit: int = _MAX_RECORDS) -> None:
        self._recorder = recorder
        self._told: set[tuple[str, str, str]] = set()
        self._left = limit
        self._bytes = _MAX_BYTES

    def note(
        self, call: Call, name: str, outcome: str, args: Sequence[int | bytes | str], **more: object
    ) -> None:
        """Write a call down.

        Args:
            call: The call.
            name: What it is called.
            outcome: See the module.
            args: The arguments that matter, in words where there are any.
            more: What else is worth knowing.
        """
        program, package = _comm(call.pid), _package(call.pid)
        key = (name, outcome, program)
        if outcome in (DENIED, UNKNOWN, FOREIGN) and not more:
            if key in self._told:
                return
            self._told.add(key)
        if self._left <= 0:
            return
        self._left -= 1
        record: Record = {
            "kind": "syscall",
            "name": name,
            "outcome": outcome,
            "args": [_value(one) for one in args],
            "package": package,
            "program": program,
        }
        record |= {key: _value(value) for key, value in more.items()}
        self._bytes -= len(json.dumps(record))
        if not self._left or self._bytes <= 0:  # what follows is lost, and that must be known
            record["truncated"] = True
            self._left = 0
        self._recorder(record)


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A recorder that appends to a file; the file is made by the first record."""

    path: str

    def __call__(self, record: Record) -> None:
        """Append a record, in one write."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o644)
        try:
            os.write(descriptor, json.dumps(record).encode() + b"\n")
        finally:
            os.close(descriptor)


def read_devices(path: Path) -> dict[int, str]:
    """Read which files stand for device nodes: by inode in the union layer, as ``c 10 229``.

    Raises:
        InternalError: The file is not what a `Journal` writes.
    """
    try:
        with open_regular(path) as file:
            content = file.read(2 * _MAX_BYTES)
    except FileNotFoundError:
        return {}
    try:
        records = [json.loads(line) for line in content.splitlines()]
        return {one["inode"]: one["args"][2] for one in records if one.get("marked")}
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise InternalError(f"a record of system calls: {error}") from error


def _value(value: object) -> object:
    return to_text(value[:_MAX_TEXT]) if isinstance(value, bytes) else value


def _comm(pid: int) -> str:
    return to_text(_read(pid, "comm", 64).rstrip(b"\n"))


def _package(pid: int) -> str:
    """The package whose script the caller is, or is called by; it may say anything."""
    for variable in _read(pid, "environ", _MAX_ENVIRONMENT).split(b"\0"):
        if variable.startswith(_VARIABLE):
            return to_text(variable.removeprefix(_VARIABLE)[:_MAX_NAME])
    return ""


def _read(pid: int, name: str, size: int) -> bytes:
    try:
        descriptor = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # it is gone; the record is worth having without
        return b""
    try:
        return os.read(descriptor, size)
    except OSError:  # ESRCH, or a process without memory
        return b""
    finally:
        os.close(descriptor)
