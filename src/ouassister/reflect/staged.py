"""Staged packages: the guest's own dpkg installs them, behind the closed gate.

The guest runs one script of ours, apart from its agent: a staged package may restart the agent,
whose children end with it. The script writes what came of it to a file, under that name only when
it is whole, and the agent is asked for that file, again when it was lost meanwhile.

Whatever was done already is done again, or found done: a resume that takes up an earlier one runs
the same script.
"""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.errors import ChannelError, DeadlineError, GateClosedError
from ouassister.model import Action, StagedState, StepKind, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.model import Changeset, Restart, Staged, StagedStep
    from ouassister.provider.interface import Running

LIMIT_S: Final = 1800  # of all of dpkg's work in the guest
_GRACE_S: Final = 120.0  # for what is around it
_ASK_S: Final = 30.0  # one question to the agent; it may be gone meanwhile
_PAUSE_S: Final = 0.5
_MAX_WORDS: Final = 1500
_CALLS: Final = {
    StepKind.INSTALL: "--install",
    StepKind.UNPACK: "--unpack",
    StepKind.CONFIGURE: "--configure",
    StepKind.REMOVE: "--force-depends --remove",  # what needs it is replaced by a later step
}
_SCRIPT: Final = Path(__file__).with_suffix(".sh")
# A service of its own: the agent's restart ends what is in the agent's control group.
_START: Final = """state=$1; umask 077
if [ -d "$state" ] && systemctl is-active --quiet "$3"; then # an earlier resume began it
	rm -f "$2"
	exit 0
fi
rm -rf "$state"; mkdir "$state" && mv "$2" "$state/script" || exit 1
if [ -d /run/systemd/system ]; then
	exec systemd-run --quiet --collect --property=KillMode=process --unit="$3" \\
		/bin/sh "$state/script"
fi
setsid /bin/sh "$state/script" </dev/null >/dev/null 2>&1 &
"""
_ASK: Final = """n=0; until [ -e "$1/told" ] || [ $n -ge 40 ]; do sleep 0.25; n=$((n + 1)); done
cat "$1/told" 2>/dev/null || [ -d "$1" ]"""
_TRY_RESTART: Final = ("systemctl", "try-restart")
_STATE: Final = re.compile(r"state (\S{1,255}) (\S{1,64}) (\S{1,255}) ([a-z-]{1,32})")
_BLAME: Final = re.compile(
    r"dpkg: error processing (?:package (?P<package>\S+)|archive (?P<file>\S+)) .*"
)


@dataclass(frozen=True, slots=True)
class Installed:
    """What came of it: the packages' states, and which exposed processes ran before and after."""

    states: tuple[StagedState, ...]
    before: frozenset[int]
    alive: frozenset[int]


def install(vm: Running, changeset: Changeset, hint: str) -> Installed:
    """Have the guest install its staged packages.

    Args:
        vm: Runs, with its links down and the change set's files in place.
        changeset: Verified.
        hint: For a person, when it fails.

    Raises:
        GateClosedError: A package is not installed; names it, with dpkg's own words.
    """
    name = f"ouassister-{changeset.changeset_id[:16]}"
    state = f"/run/{name}"
    unit = f"{name}.service"
    try:
        vm.channel().write_file(f"{state}.sh", script(changeset, state).encode("ascii"))
        start = ["/bin/sh", "-c", _START, "ouassister", state, f"{state}.sh", unit]
        done = vm.channel().run(start, timeout_s=_ASK_S * 2)
    except (ChannelError, DeadlineError) as error:
        raise GateClosedError(f"staged packages: {error.message}", hint=hint) from error
    if done.exit_status != 0:
        words = done.stderr.decode("utf-8", "backslashreplace").strip()[:_MAX_WORDS]
        raise GateClosedError(f"staged packages: the guest starts nothing: {words}", hint=hint)
    told = _await(vm, state, hint)
    problem, installed = judge(changeset.staged, told)
    if problem:
        raise GateClosedError(problem, hint=hint)
    return installed


def script(changeset: Changeset, state: str) -> str:
    """What the guest's shell runs; every word in it was checked when the change set was read."""
    steps = [_step(step, changeset.staged) for step in changeset.staged_steps]
    if changeset.staged_steps[-1].kind in (StepKind.UNPACK, StepKind.REMOVE):
        steps.append("step --configure --pending")
    pids = {process.pid for restart in changeset.restarts for process in restart.processes}
    words = {
        "state": state,
        "limit": str(LIMIT_S),
        "folder": changeset.staging_folder.decode("ascii"),
        "names": " ".join(_name(one) for one in changeset.staged),
        "pids": " ".join(str(pid) for pid in sorted(pids)),
    }
    head = [f"{name}={shlex.quote(value)}" for name, value in words.items()]
    head.append(f"steps() {{ {' && '.join(steps)}; }}")
    head.append(f"marks() {{ {' && '.join(_marks(changeset.staged)) or ':'}; }}")
    return "\n".join(head) + "\n" + _SCRIPT.read_text(encoding="ascii")


def judge(staged: tuple[Staged, ...], told: bytes) -> tuple[str, Installed]:
    """Read what the script told.

    Returns:
        What is wrong, "" for nothing; and what came of it.
    """
    lines = told.decode("utf-8", "backslashreplace").splitlines()
    found: dict[str, list[tuple[str, str, str]]] = {}
    for match in filter(None, map(_STATE.fullmatch, lines)):
        found.setdefault(match[1], []).append((match[2], match[3], match[4]))
    before, alive = _pids("before ", lines), _pids("alive ", lines)
    log = [line[4:] for line in lines if line.startswith("log ")]
    states: list[StagedState] = []
    odd: list[str] = []
    for one in staged:
        rows = [row for row in found.get(one.name, []) if row[0] == one.architecture]
        rows = rows or found.get(one.name, [])  # a removed one is told with what it was
        architecture, version, status = rows[0] if rows else (one.architecture, "", "not-installed")
        states.append(StagedState(one.name, architecture, version, status))
        fits = (version, status) == (one.new, "installed") if one.new else status != "installed"
        if not fits:
            odd.append(f"{one.name} is {status} {version}".rstrip())
    installed = Installed(tuple(states), before, alive)
    if "code 0" in lines and "end" in lines and not odd:
        return "", installed
    words = "; ".join(_words(log))[:_MAX_WORDS] or "; ".join(odd) or "no message"
    named = ", ".join(dict.fromkeys(_blamed(log))) or ", ".join(one.name for one in staged)
    return f"staged packages are not installed ({named[:200]}): {words}", installed


def split(changeset: Changeset) -> tuple[tuple[Action, ...], tuple[Action, ...]]:
    """What scripts of emulated packages asked for, and the restarts that memory calls for.

    A staged package may depend on what the former start; the latter come last, and once. Where
    nothing is staged, all is one call.
    """
    if not changeset.staged:
        return changeset.actions, ()
    asked = list(changeset.actions)
    last: list[Action] = []
    units = {one.unit for one in changeset.restarts if one.verdict is Verdict.RESTART}
    if asked and asked[-1].argv[0] == "systemd-run":
        last.insert(0, asked.pop())
    if asked and asked[-1].argv[:2] == _TRY_RESTART and units.issuperset(asked[-1].argv[2:]):
        last.insert(0, asked.pop())
    return tuple(asked), tuple(last)


def due(
    restarts: Iterable[Restart], actions: Iterable[Action], installed: Installed
) -> tuple[Action, ...]:
    """Restarts that are left: not of units whose exposed processes ended with the staged packages.

    Args:
        restarts: The change set's.
        actions: The second part of `split`.
        installed: Which of the processes ran before and after.
    """
    gone = {
        one.unit
        for one in restarts
        if one.unit and _runs(one, installed.before) and not _runs(one, installed.alive)
    }
    left: list[Action] = []
    for action in actions:
        units = [unit for unit in action.argv[2:] if unit not in gone]
        if action.argv[0] == "systemd-run" and action.argv[-1] in gone:
            continue
        if action.argv[:2] == _TRY_RESTART:
            if not units:
                continue
            action = Action((*_TRY_RESTART, *units))
        left.append(action)
    return tuple(left)


def _pids(word: str, lines: list[str]) -> frozenset[int]:
    told = [line.removeprefix(word) for line in lines if line.startswith(word)]
    return frozenset(int(one) for one in told if one.isascii() and one.isdecimal())


def _runs(restart: Restart, alive: frozenset[int]) -> bool:
    return any(process.pid in alive for process in restart.processes)


def _step(step: StagedStep, staged: tuple[Staged, ...]) -> str:
    chosen = [staged[number] for number in step.packages]
    by_file = step.kind in (StepKind.INSTALL, StepKind.UNPACK)
    words = [f"./{one.file}" if by_file else _name(one) for one in chosen]
    return f"step {_CALLS[step.kind]} {shlex.join(words)}"


def _marks(staged: tuple[Staged, ...]) -> list[str]:
    """What apt would have noted: new packages that nobody asked for are there for others."""
    auto = [_name(one) for one in staged if one.new and not one.old and not one.requested]
    manual = [_name(one) for one in staged if one.new and one.old and one.requested]
    calls = (("auto", auto), ("manual", manual))
    return [f"apt-mark {word} {shlex.join(names)}" for word, names in calls if names]


def _name(one: Staged) -> str:
    """A package as dpkg is told of it; "NAME:all" is no name."""
    return one.name if one.architecture in ("all", "") else f"{one.name}:{one.architecture}"


def _await(vm: Running, state: str, hint: str) -> bytes:
    """Ask for the result until it is there; the agent may be restarted meanwhile."""
    end = time.monotonic() + LIMIT_S + _GRACE_S
    last = "no answer"
    while time.monotonic() < end:
        try:
            done = vm.channel().run(["/bin/sh", "-c", _ASK, "ouassister", state], timeout_s=_ASK_S)
        except (ChannelError, DeadlineError) as error:
            last = error.message
            time.sleep(_PAUSE_S)  # it is being restarted, which nothing tells
            continue
        if done.stdout:
            return done.stdout
        if done.exit_status != 0:
            raise GateClosedError(f"staged packages: the guest removed {state}", hint=hint)
    raise GateClosedError(f"staged packages: no result in time: {last}", hint=hint)


def _blamed(log: list[str]) -> list[str]:
    matches = [match for match in map(_BLAME.fullmatch, log) if match]
    return [match["package"] or match["file"].removeprefix("./") for match in matches]


def _words(log: list[str]) -> list[str]:
    """Dpkg's own words: each error, with the line that says why and the one before it."""
    found: list[str] = []
    for at, line in enumerate(log):
        if line.startswith("dpkg: error"):
            found += [one.strip() for one in log[max(0, at - 1) : at + 2]]
    return list(dict.fromkeys(found or [line.strip() for line in log[-3:]]))
