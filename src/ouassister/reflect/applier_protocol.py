"""What the in-guest applier prints, read as hostile text: JSON lines, the last one its result.

The lines are docs/design/0003-applier.md's and guest/report.c's.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ouassister.errors import (
    ApplyError,
    ConflictError,
    GateClosedError,
    LockedError,
    OUassisterError,
    StaleError,
    TamperedError,
    UnsupportedGuestError,
)
from ouassister.model import Differing
from ouassister.reflect.bootstrap import NO_STUB
from ouassister.text import from_text, to_text

MAX_OUTPUT = 1 << 20
_MAX_LINES = 4096
_MAX_REASON = 4096
_MAX_PHASES = 64
_MOST_TOLD = 1000  # guest/report.c, tell_path
_MAX_DIFFERS = 256  # characters of a reason
_MOST_NAMED = 4
_NAME = re.compile(r"[a-z][a-z-]{0,30}")
_RESULT_KEYS = {"event", "result", "code", "path", "reason", "files", "bytes", "phases", "ms"}
_EXIT_STATUS = {0: "applied", 2: "usage", 20: "refused", 40: "undone", 41: "needs-person"}


class Outcome(StrEnum):
    """How the applier ended."""

    APPLIED = "applied"
    ALREADY_APPLIED = "already-applied"
    REFUSED = "refused"  # the tree never changed
    UNDONE = "undone"  # the tree is again as it was
    NEEDS_PERSON = "needs-person"
    ROLLED_BACK = "rolled-back"
    ALREADY_ROLLED_BACK = "already-rolled-back"
    FORGOTTEN = "forgotten"


DONE = frozenset(
    (
        Outcome.APPLIED,
        Outcome.ALREADY_APPLIED,
        Outcome.ROLLED_BACK,
        Outcome.ALREADY_ROLLED_BACK,
        Outcome.FORGOTTEN,
    )
)


@dataclass(frozen=True, slots=True)
class ApplierResult:
    """The applier's last line.

    ``code`` is empty, or a stable word for the cause (docs/design/0003-applier.md). ``phases_ms``
    holds the phases in their order; ``ended_ms`` is on the guest's monotonic clock.
    """

    outcome: Outcome
    code: str
    path: bytes
    reason: str
    files: int
    size_bytes: int
    phases_ms: tuple[tuple[str, float], ...]
    ended_ms: float


class ProtocolError(ValueError):
    """The output is not the applier's; the message says why."""


def parse_output(output: bytes) -> ApplierResult:
    """Read the applier's whole standard output.

    Raises:
        ProtocolError: There is no result line, or one that the applier would not print.
    """
    if len(output) > MAX_OUTPUT:
        raise ProtocolError(f"{len(output)} bytes of output, more than an applier prints")
    lines = output.split(b"\n")
    if len(lines) > _MAX_LINES or lines[-1] != b"" or len(lines) < 2:
        raise ProtocolError("the output does not end with a whole line")
    last = _object(lines[-2])
    if last.get("event") != "result" or last.keys() != _RESULT_KEYS:
        raise ProtocolError("the last line is no result")
    return _result(last)


def differing(output: bytes, event: str) -> tuple[Differing, ...]:
    """Paths that are not as they should be: the applier's events of that name.

    Raises:
        ProtocolError: One is malformed, or there are more than it would tell.
    """
    found = []
    for line in output.split(b"\n"):
        if not line.startswith(b'{"event":"%s"' % event.encode("ascii")):
            continue
        try:
            value = json.loads(line)
            path, reason = from_text(value["path"]), to_text(from_text(value["reason"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"a line is no path that differs: {error}") from error
        found.append(Differing(path, reason[:_MAX_DIFFERS]))
    if len(found) > _MOST_TOLD:
        raise ProtocolError("more paths that differ than an applier tells")
    return tuple(found)


def error_for(result: ApplierResult, found: tuple[Differing, ...] = ()) -> OUassisterError | None:
    """The error that a result means to the caller; None when the change set is in place.

    Args:
        result: How it ended.
        found: With a conflict, the paths that were told.
    """
    if result.outcome in DONE:
        return None
    where = f" ({to_text(result.path)})" if result.path else ""
    message = f"the guest's applier says: {result.reason}{where} [{result.code}]"
    if len(found) > 1:
        message += f": {named(found)}"
    if result.outcome is Outcome.NEEDS_PERSON:
        return GateClosedError(message)
    if result.outcome is Outcome.UNDONE:
        return ApplyError(message)
    match result.code:
        case "conflict":
            paths = tuple((to_text(one.path), one.reason) for one in found)
            return ConflictError(message, paths)
        case "identity":
            return StaleError(message)
        case "medium":
            return TamperedError(message)
        case "locked" | "busy":
            return LockedError(message)
        case "unsupported":
            return UnsupportedGuestError(message)
        case "unfinished":
            return GateClosedError(message)
        case _:
            return ApplyError(message)


def named(found: tuple[Differing, ...]) -> str:
    """The first of some paths, with what is different, and how many more were told."""
    words = "; ".join(f"{to_text(one.path)}: {one.reason}" for one in found[:_MOST_NAMED])
    more = len(found) - _MOST_NAMED
    return f"{words}; and {more} more" if more > 0 else words


def error_for_silence(
    exit_status: int | None, detail: str, *, again: bool
) -> ApplyError | GateClosedError:
    """The error when the applier left no result: nobody knows how far it came, unless to no start.

    Args:
        exit_status: Of the command that starts it.
        detail: What it wrote to standard error.
        again: An earlier run may have left something half done.
    """
    if exit_status == NO_STUB and not again:
        return ApplyError(f"the guest could not write what starts the applier: {detail}")
    status = "is unknown" if exit_status is None else f"is {exit_status}"
    meaning = _EXIT_STATUS.get(exit_status, "") if exit_status is not None else ""
    note = f" ({meaning})" if meaning else ""
    return GateClosedError(
        f"the guest's applier left no result, its exit status {status}{note}: {detail}"
    )


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the last line is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError("the last line is no object")
    return value


def _result(last: dict[str, Any]) -> ApplierResult:
    try:
        outcome = Outcome(last["result"])
        path = from_text(_text(last, "path", 5 * 4096))
        reason = to_text(from_text(_text(last, "reason", _MAX_REASON)))
    except ValueError as error:
        raise ProtocolError(f"the result is malformed: {error}") from error
    code = _text(last, "code", 32)
    if code and not _NAME.fullmatch(code):
        raise ProtocolError("the result's code is no word")
    if not code and outcome not in DONE:
        raise ProtocolError("the result names no cause")
    phases = last["phases"]
    if not isinstance(phases, dict) or len(phases) > _MAX_PHASES:
        raise ProtocolError("the result's phases are malformed")
    for name in phases:
        if not _NAME.fullmatch(name):
            raise ProtocolError("a phase's name is no word")
    return ApplierResult(
        outcome=outcome,
        code=code,
        path=path,
        reason=reason,
        files=_count(last, "files"),
        size_bytes=_count(last, "bytes"),
        phases_ms=tuple((name, _milliseconds(phases, name)) for name in phases),
        ended_ms=_milliseconds(last, "ms"),
    )


def _text(record: dict[str, Any], key: str, limit: int) -> str:
    value = record[key]
    if not isinstance(value, str) or len(value) > limit:
        raise ProtocolError(f"{key} is no text of at most {limit} characters")
    return value


def _count(record: dict[str, Any], key: str) -> int:
    value = record[key]
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ProtocolError(f"{key} is no count")
    return value


def _milliseconds(record: dict[str, Any], key: str) -> float:
    value = record[key]
    # JSON's NaN and Infinity pass json.loads and fail this comparison.
    if type(value) not in (int, float) or not 0 <= value < 1e15:
        raise ProtocolError(f"{key} is no time")
    return float(value)
