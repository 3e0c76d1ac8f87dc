"""Verification behind the closed gate, and the attestation that it leaves in the guest.

One shell command does the last actions and goes on with this, since each further one costs a just
restored guest a program or two. What is asked for beside the actions (dpkg's view of its database,
a durable draft of the attestation) costs next to nothing; the rest is the list of failed units,
and a rename.

What the guest answers is hostile: it is told of, and compared with what the host knows.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.model import Verdict
from ouassister.reflect import bootstrap
from ouassister.reflect.applier_protocol import Outcome
from ouassister.restart.actions import units_of
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ouassister.model import Action, Changeset
    from ouassister.reflect.applier_protocol import ApplierResult
    from ouassister.restart.reach import Parts

_SCRIPT: Final = Path(__file__).with_suffix(".sh")
_WORD_BYTES: Final = 1 << 16  # of one argument; Linux takes 128 KiB (MAX_ARG_STRLEN)
_WORKER: Final = re.compile(rb"^v worker ([1-9][0-9]{0,9})$", re.M)
_MOST_TOLD: Final = 8
_NAMED: Final = re.compile(r" ([a-z0-9][a-z0-9+.-]{0,254})(?::[a-z0-9-]{1,64})?(?: .*)?")


@dataclass(frozen=True, slots=True)
class Verification:
    """What the guest's answers come to. With a problem, the gate stays closed."""

    problems: tuple[str, ...]
    verified: tuple[str, ...]
    notes: tuple[str, ...]


# dpkg --audit found these very bytes clean in the shadow (packages/apt.py); the locks were held.
BY_APPLIER: Final = Verification(
    (),
    (
        "completion marker of this change set",
        "what is new in the package database, byte for byte what dpkg --audit found clean",
    ),
    (),
)


def for_applier(changeset: Changeset) -> str:
    """The beginning of an attestation that the applier leaves, with its marker, or "".

    It is left to the applier where nothing is done in the guest after the files are in place.
    """
    if changeset.staged or changeset.actions:
        return ""
    return _attestation(changeset, ())


def is_attested(result: ApplierResult) -> bool:
    """Whether the applier has verified and attested all: then there is nothing to ask."""
    phases = {name for name, _milliseconds in result.phases_ms}
    return result.outcome is Outcome.APPLIED and "attest" in phases


def command(changeset: Changeset, actions: Sequence[Action]) -> list[str]:
    """A command for the guest: do each action, verify, attest.

    The actions' answers are those of `bootstrap.actions_command`.
    """
    lines = ["begin", *bootstrap.action_lines(actions), "finish"]
    return _script(changeset, lines, (), serviced=bool(actions))


def begin_command(changeset: Changeset, parts: Parts) -> list[str]:
    """A command for the guest: begin the actions, verify and attest once the gate may open.

    It tells who goes on with them (`worker`).
    """
    lines = [
        "begin",
        'rm -f "$begun"',
        "{",
        *bootstrap.action_lines(parts.begun),
        "echo end",
        '} >"$begun" 2>/dev/null </dev/null &',
        "echo v worker $!",
        f"pids={shlex.quote(' '.join(map(str, parts.pids)))}",
        f"await {' '.join(map(str, range(parts.awaited)))}".rstrip(),
        "finish",
    ]
    return _script(changeset, lines, parts.follow, serviced=True)


def follow_command(changeset: Changeset, parts: Parts, worker: int) -> list[str]:
    """A command for the guest: wait for the end of the actions, do the rest, verify and attest."""
    lines = [
        "begin",
        f"await_worker {worker}",
        *bootstrap.action_lines(parts.left, len(parts.begun)),
        "finish",
    ]
    return _script(changeset, lines, (), serviced=True)


def worker(output: bytes) -> int:
    """The process that goes on with what `begin_command` began; 0 when it was not told."""
    match = _WORKER.search(output)
    return int(match[1]) if match else 0


def _script(
    changeset: Changeset, lines: Sequence[str], left: Sequence[Action], *, serviced: bool
) -> list[str]:
    head = [
        f"id={changeset.changeset_id}",
        f"serviced={'yes' if serviced else ''}",
        f"units={shlex.quote(' '.join(sorted(_restarted(changeset, left))))}",
    ]
    script = "\n".join([*head, _SCRIPT.read_text(encoding="ascii"), *lines])
    return ["/bin/sh", "-c", script, bootstrap.OURS, *_pieces(_attestation(changeset, left))]


def judge(
    changeset: Changeset, since_ms: float, output: bytes, left: Sequence[Action] = ()
) -> Verification:
    """Read what the command printed.

    Args:
        changeset: Which was applied.
        since_ms: When the applier began, on the guest's monotonic clock.
        output: All of it.
        left: Actions that follow later: their units are not looked at.
    """
    told = [line[2:] for line in output.decode("utf-8", "replace").splitlines() if line[:2] == "v "]
    problems: list[str] = []
    verified: list[str] = []
    notes: list[str] = []
    if "marker clean" in told:
        verified.append("completion marker of this change set")
    else:
        problems.append("the completion marker is not this change set's")
    _judge_database(changeset, told, problems, verified, notes)
    _judge_units(_restarted(changeset, left), since_ms, told, problems, verified, notes)
    if "attested 0" not in told:
        notes.append("the guest could not write its attestation")
    return Verification(tuple(problems), tuple(verified), tuple(notes))


def _judge_database(
    changeset: Changeset,
    told: list[str],
    problems: list[str],
    verified: list[str],
    notes: list[str],
) -> None:
    lines = [line.removeprefix("audit: ") for line in told if line.startswith("audit: ")]
    ours = {one.name for one in changeset.changes} | {one.name for one in changeset.staged}
    named = {match[1] for match in map(_NAMED.fullmatch, lines) if match}
    code = next((line[6:] for line in told if line.startswith("audit ")), "unknown")
    if code not in ("0", "1") or (lines and not named):
        words = " ".join(lines)[:300]
        problems.append(f"dpkg --audit ended with status {_safe(code)}: {_safe(words)}")
        return
    if named & ours:
        problems.append(f"dpkg --audit names {_some(named & ours)}")
    else:
        verified.append("dpkg --audit names no package of this change set")
    if named - ours:
        notes.append(
            f"dpkg --audit names {_some(named - ours)}, not of this change set:"
            " what came of it was not caused by the update"
        )


def _judge_units(
    restarted: set[str],
    since_ms: float,
    told: list[str],
    problems: list[str],
    verified: list[str],
    notes: list[str],
) -> None:
    status = next((line[6:] for line in told if line.startswith("units ")), "")
    if status != "0":
        if status:
            notes.append("the guest's service manager does not tell which units have failed")
        return
    failed = [line[5:] for line in told if line.startswith("unit ")]
    stamps = [line[6:] for line in told if line.startswith("since ")]
    if bad := restarted.intersection(failed):
        problems.append(f"{_some(bad)} ran at suspend and failed when restarted")
    elif restarted:
        verified.append("no restarted unit has failed")
    others = [unit for unit in failed if unit not in restarted]
    if not others:
        return
    if len(stamps) != len(failed) or not all(map(_is_count, stamps)):
        notes.append(f"failed now, and perhaps at suspend: {_some(others)}")
        return
    since = dict(zip(failed, stamps, strict=True))
    new = [unit for unit in others if int(since[unit]) >= since_ms * 1000]
    if new:
        notes.append(f"failed since the resume: {_some(new)}")


def _restarted(changeset: Changeset, left: Sequence[Action]) -> set[str]:
    """Units that ran when the guest fell asleep, as its memory says, and that are restarted."""
    units = {one.unit for one in changeset.restarts if one.verdict is Verdict.RESTART}
    return units.difference(*(units_of(action)[1] for action in left))


def _attestation(changeset: Changeset, left: Sequence[Action]) -> str:
    """The beginning of the attestation, an object that the guest's shell ends."""
    known = {
        "schema": 1,
        "changeset": changeset.changeset_id,
        "packages": [
            {"name": one.name, "architecture": one.architecture, "old": one.old, "new": one.new}
            for one in changeset.changes
        ],
        "staged": [one.name for one in changeset.staged],
        "entries": len(changeset.entries),
    }
    if left:
        known["to_follow"] = [action.shown for action in left]
    return json.dumps(known, separators=(",", ":"))[:-1] + ","


def _pieces(text: str) -> Iterator[str]:
    """Pieces that are arguments; the shell puts them together again with nothing between."""
    for at in range(0, len(text), _WORD_BYTES):
        yield text[at : at + _WORD_BYTES]


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def _safe(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _some(names: set[str] | list[str]) -> str:
    told = sorted(names)[:_MOST_TOLD]
    more = f" and {len(names) - len(told)} more" if len(names) > len(told) else ""
    return ", ".join(to_text(name.encode("utf-8", "replace"))[:255] for name in told) + more
