"""Which packages of a batch are not well, by trying halves of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Outcome(StrEnum):
    """How an update of both twins ended."""

    EQUAL = "equal"
    DIFFERS = "differs"
    FAILED = "failed"


@dataclass(frozen=True)
class Trial:
    """What came of one batch. ``staged``: by package, why the guest's own dpkg installed it."""

    outcome: Outcome
    reasons: tuple[str, ...]
    staged: Mapping[str, str]


@dataclass(frozen=True)
class Verdict:
    """What came of one package."""

    verdict: Outcome
    mode: str  # emulated or staged
    reasons: tuple[str, ...]


def judge(packages: Sequence[str], attempt: Callable[[Sequence[str]], Trial]) -> dict[str, Verdict]:
    """Try all together; where that does not end in twins, try halves, and halves of these.

    Args:
        packages: Their names.
        attempt: Updates a fresh pair of twins with some of them.

    Returns:
        A verdict on each: that of the smallest batch that it was in. Where a batch is not well
        and both of its halves are, it is their being together, and each is told so.
    """
    trial = attempt(packages)
    if trial.outcome is Outcome.EQUAL or len(packages) == 1:
        return {name: _verdict(name, trial) for name in packages}
    middle = len(packages) // 2
    verdicts = {
        name: verdict
        for half in (packages[:middle], packages[middle:])
        for name, verdict in judge(half, attempt).items()
    }
    if all(one.verdict is Outcome.EQUAL for one in verdicts.values()):
        together = f"only together with {' '.join(packages)}"
        return {
            name: Verdict(trial.outcome, one.mode, (together, *trial.reasons))
            for name, one in verdicts.items()
        }
    return verdicts


def _verdict(name: str, trial: Trial) -> Verdict:
    reasons = trial.reasons
    if name in trial.staged:
        return Verdict(trial.outcome, "staged", (*reasons, f"staged: {trial.staged[name]}"))
    return Verdict(trial.outcome, "emulated", reasons)
