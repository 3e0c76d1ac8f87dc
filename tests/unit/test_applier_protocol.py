"""The applier's output is hostile text until it was parsed."""

from __future__ import annotations

import json

import pytest

from ouassister import errors
from ouassister.reflect.applier_protocol import (
    ApplierResult,
    Outcome,
    ProtocolError,
    error_for,
    error_for_silence,
    parse_output,
)
from ouassister.reflect.bootstrap import NO_STUB

GOOD: dict[str, object] = {
    "event": "result",
    "result": "refused",
    "code": "conflict",
    "path": "/a\\x1b\\\\b",
    "reason": "it changed",
    "files": 0,
    "bytes": 0,
    "phases": {"medium": 1.5, "check": 0},
    "ms": 12.25,
}


def line(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode() + b"\n"


def test_result_is_the_last_line() -> None:
    output = b'{"event":"phase","phase":"medium","ms":1.0}\n' + line()
    assert parse_output(output) == ApplierResult(
        outcome=Outcome.REFUSED,
        code="conflict",
        path=b"/a\x1b\\b",
        reason="it changed",
        files=0,
        size_bytes=0,
        phases_ms=(("medium", 1.5), ("check", 0.0)),
        ended_ms=12.25,
    )


@pytest.mark.parametrize(
    "output",
    [
        b"",
        b"\n",
        line()[:-1],
        line() + b"x",
        line() + b'{"event":"phase","phase":"x","ms":1}\n',
        b"not json\n",
        b"[]\n",
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        b" " * (1 << 20) + line(),
        b"\n" * 5000 + line(),
        line(event="phase"),
        line(more=1),
        line(result="fine"),
        line(code="", result="undone"),
        line(code="x" * 40),
        line(code="\x1b[31m"),
        line(code=7),
        line(path="\\q"),
        line(path="\ud800"),
        line(path="/" * 30_000),
        line(reason=None),
        line(reason="r" * 5000),
        line(files=-1),
        line(files=True),
        line(files=1 << 70),
        line(bytes=1.5),
        line(phases=[]),
        line(phases={"Bad name": 1}),
        line(phases={"x": float("nan")}),
        line(phases={"x": -1}),
        line(phases={f"p{'x' * i}": 1 for i in range(65)}),
        line(ms=float("inf")),
        line(ms=True),
    ],
)
def test_anything_else_is_refused(output: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_output(output)


@pytest.mark.parametrize(
    ("result", "code", "error"),
    [
        ("applied", "", None),
        ("applied", "leftover", None),
        ("already-applied", "", None),
        ("refused", "conflict", errors.ConflictError),
        ("refused", "identity", errors.StaleError),
        ("refused", "medium", errors.TamperedError),
        ("refused", "locked", errors.LockedError),
        ("refused", "busy", errors.LockedError),
        ("refused", "unsupported", errors.UnsupportedGuestError),
        ("refused", "unfinished", errors.GateClosedError),
        ("refused", "space", errors.ApplyError),
        ("undone", "conflict", errors.ApplyError),
        ("needs-person", "undo", errors.GateClosedError),
    ],
)
def test_result_becomes_the_error_that_a_caller_acts_on(
    result: str, code: str, error: type[errors.OUassisterError] | None
) -> None:
    made = error_for(parse_output(line(result=result, code=code)))
    assert (None if made is None else type(made)) is error
    if made is not None:
        assert "\x1b" not in made.message
        assert code in made.message


@pytest.mark.parametrize("status", [None, 0, 41, 137])
def test_silence_keeps_the_gate_closed(status: int | None) -> None:
    error = error_for_silence(status, "no line", again=False)
    assert error.exit_status == 41
    assert error.impact == "unknown"


def test_applier_that_was_never_there_has_touched_nothing_but_an_earlier_one_may_have() -> None:
    error = error_for_silence(NO_STUB, "No space left on device", again=False)
    assert (error.exit_status, error.impact) == (40, "untouched")
    assert error_for_silence(NO_STUB, "No space left on device", again=True).exit_status == 41
