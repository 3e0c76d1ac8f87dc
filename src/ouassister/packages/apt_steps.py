"""The order in which apt has dpkg unpack, configure and remove, for a part of a plan.

Source: apt-get(8), ``-s``: ``Inst``, ``Conf`` and ``Remv`` lines, in the order of dpkg's calls. A
package that must be configured before another is unpacked (Pre-Depends) is, in that order.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ouassister.errors import UpdaterError
from ouassister.model import StagedStep, StepKind

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME: Final = r"[a-z0-9][a-z0-9+.-]{0,254}"
_LINE: Final = re.compile(
    rf"(?P<verb>Inst|Conf|Remv|Purg) (?P<name>{_NAME})(?::(?P<qualified>[a-z0-9-]+))? "
    r"(?:(?:\[[^\]]*\] )?\(\S+ .*?\[(?P<arch>[a-z0-9-]+)\]\))?.*"
)
_KINDS: Final = {
    "Inst": StepKind.UNPACK,
    "Conf": StepKind.CONFIGURE,
    "Remv": StepKind.REMOVE,
    "Purg": StepKind.REMOVE,
}


def steps_for(output: str, chosen: Mapping[tuple[str, str], int]) -> tuple[StagedStep, ...]:
    """Read a simulation, and keep the steps of some packages.

    Args:
        output: What ``apt-get -s`` printed.
        chosen: Name and architecture of each package, and the number that a step calls it by.

    Raises:
        UpdaterError: The simulation does not have all of them.
    """
    steps: list[tuple[StepKind, list[int]]] = []
    seen: set[tuple[StepKind, int]] = set()
    for line in output.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        number = _number(chosen, match)
        kind = _KINDS[match["verb"]]
        if number is None or (kind, number) in seen:
            continue
        seen.add((kind, number))
        if steps and steps[-1][0] is kind:
            steps[-1][1].append(number)
        else:
            steps.append((kind, [number]))
    for (name, _architecture), number in chosen.items():
        whole = {(StepKind.UNPACK, number), (StepKind.CONFIGURE, number)} <= seen
        if not whole and (StepKind.REMOVE, number) not in seen:
            raise UpdaterError(f"apt-get does not say when {name} is installed")
    return tuple(_joined(steps))


def _number(chosen: Mapping[tuple[str, str], int], match: re.Match[str]) -> int | None:
    name = match["name"]
    for architecture in (match["arch"], match["qualified"], ""):
        if architecture is not None and (name, architecture) in chosen:
            return chosen[name, architecture]
    return None


def _joined(steps: list[tuple[StepKind, list[int]]]) -> list[StagedStep]:
    """One call where dpkg unpacks some packages and then configures the same."""
    joined: list[StagedStep] = []
    for kind, numbers in steps:
        last = joined[-1] if joined else None
        if (
            kind is StepKind.CONFIGURE
            and last is not None
            and last.kind is StepKind.UNPACK
            and set(last.packages) == set(numbers)
        ):
            joined[-1] = StagedStep(StepKind.INSTALL, last.packages)
        else:
            joined.append(StagedStep(kind, tuple(numbers)))
    return joined
