"""How two twins differ, apart from what a reviewed list allows."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.fidelity.facts import QUESTIONS
from tests.view.manifest import Node, short

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fidelity.facts import Facts

LIST: Final = Path(__file__).parent / "allowed.toml"
# Another moment, another order of allocation: of no file the same in two guests.
_IGNORED: Final = frozenset(("ctime", "inode"))
_TWIN: Final = "the twin"  # the one that updated itself, as a rule names it
_COLUMNS: Final = frozenset(Node._fields) - _IGNORED


@dataclass(frozen=True)
class Rule:
    """What may differ, and why. ``columns`` is empty for all of a path, its absence included."""

    paths: tuple[str, ...]
    columns: frozenset[str]
    reason: str
    directories: bool  # of these alone


@dataclass(frozen=True)
class LineRule:
    """The same of lines in a table. ``of_twin``: of the guest that updated itself alone."""

    table: str
    line: re.Pattern[str]
    reason: str
    of_twin: bool


@dataclass(frozen=True)
class Allowed:
    """The reviewed list."""

    rules: tuple[Rule, ...]
    lines: tuple[LineRule, ...]


def load(path: Path = LIST) -> Allowed:
    """Read the list."""
    return parse(path.read_text())


def parse(text: str) -> Allowed:
    """Read the text of a list.

    Raises:
        ValueError: An entry gives no reason, or speaks of what is not compared.
    """
    raw = tomllib.loads(text)
    rules = [
        Rule(
            tuple(one["paths"]),
            frozenset(one.get("columns", ())),
            one["reason"],
            one.get("kind") == "directory",
        )
        for one in raw["path"]
    ]
    lines = [
        LineRule(one["table"], re.compile(one["line"]), one["reason"], one.get("only") == _TWIN)
        for one in raw.get("line", ())
    ]
    for rule in rules:
        if not rule.reason.strip() or rule.columns - _COLUMNS:
            raise ValueError(f"the rule for {rule.paths} has no reason, or no such column")
    for one in raw.get("line", ()):
        if one.get("only", _TWIN) != _TWIN:
            raise ValueError(f"the rule for {one['line']!r} is for nobody")
    for line in lines:
        if not line.reason.strip() or line.table not in QUESTIONS:
            raise ValueError(f"the rule for {line.line.pattern!r} has no reason, or no such table")
    return Allowed(tuple(rules), tuple(lines))


def differences(
    theirs: Facts, ours: Facts, since_s: float, allowed: Allowed
) -> tuple[list[str], dict[str, int]]:
    """Compare the twin that updated itself with the one that was updated in its sleep.

    Args:
        theirs: Of the twin that updated itself.
        ours: Of the other.
        since_s: When both fell asleep. Files whose times are later in both were made by the
            update: their times say when, and that differs.
        allowed: See `load`.

    Returns:
        One line for each difference, and how often each reason of the list was used.
    """
    used: dict[str, int] = {}
    found = [
        line
        for path, column, line in _of_paths(theirs, ours, since_s)
        if not _is_allowed(path, column, _is_directory(path, theirs, ours), allowed, used)
    ]
    for name in theirs.tables:
        one, other = theirs.tables[name], ours.tables[name]
        for line in sorted(one ^ other):
            reason = next(
                (rule.reason for rule in allowed.lines
                 if rule.table == name and rule.line.search(line)
                 and (line in one or not rule.of_twin)), None,
            )  # fmt: skip
            if reason is None:
                where = "the twin" if line in one else "ours"
                found.append(f"{name}: only in {where}: {short(line)}")
            else:
                used[reason] = used.get(reason, 0) + 1
    return found, used


def _of_paths(theirs: Facts, ours: Facts, since_s: float) -> Iterator[tuple[str, str, str]]:
    """Yield path, column and words of each difference; no column for a path of one alone."""
    for path in sorted(theirs.nodes.keys() | ours.nodes.keys()):
        one, other = theirs.nodes.get(path), ours.nodes.get(path)
        if one is None or other is None:
            yield path, "", f"{path}: only in {'ours' if one is None else 'the twin'}"
            continue
        for column, their, our in _columns(one, other, since_s):
            words = f"{path}: {column} is {short(our)} in ours, {short(their)} in the twin"
            yield path, column, words


def _columns(one: Node, other: Node, since_s: float) -> Iterator[tuple[str, str, str]]:
    for column, their, our in zip(one._fields, one, other, strict=True):
        if their == our or column in _IGNORED:
            continue
        if column == "mtime" and min(float(their), float(our)) > since_s:
            continue
        if column in ("size", "links") and one.mode.startswith("4") and other.mode.startswith("4"):
            continue  # of a directory: how it grew
        yield column, their, our


def _is_directory(path: str, *both: Facts) -> bool:
    return all(path in one.nodes and one.nodes[path].mode.startswith("4") for one in both)


def _is_allowed(
    path: str, column: str, directory: bool, allowed: Allowed, used: dict[str, int]
) -> bool:
    for rule in allowed.rules:
        if (rule.columns and column not in rule.columns) or (rule.directories and not directory):
            continue
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in rule.paths):
            used[rule.reason] = used.get(rule.reason, 0) + 1
            return True
    return False
