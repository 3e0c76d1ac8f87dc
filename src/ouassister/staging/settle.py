"""Emulate; stage what cannot be; begin again without it, until the rest ends well.

Each round leaves fewer packages to emulate, and the rounds are bounded: in the last one all that
is left is staged. What a round wrote and recorded is forgotten before the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from ouassister.changeset.extract import Extraction
from ouassister.errors import (
    DeadlineError,
    InternalError,
    StagingNeededError,
    UpdaterError,
    WorkDiskFullError,
)
from ouassister.model import PackageChange
from ouassister.staging import judge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ouassister.model import Request
    from ouassister.packages.apt import Ran
    from ouassister.shadow.events import Event
    from ouassister.staging.judge import Reasons

_MOST_ROUNDS: Final = 8
_MAX_NAMED: Final = 4

Changes = tuple[PackageChange, ...]


class Ground(Protocol):
    """What the loop works on."""

    def emulate(self, request: Request) -> Ran:
        """Run the guest's updater."""
        ...

    def events(self) -> Iterable[Event]:
        """What it recorded."""
        ...

    def extract(self, staged: Mapping[PackageChange, str]) -> Extraction:
        """What changed, the archives of staged packages included."""
        ...

    def held(self, extraction: Extraction, ran: Ran, names: frozenset[str]) -> Reasons:
        """Packages that wrote what sleeping processes, or the kernel, hold."""
        ...

    def plan_without(self, staged: Changes, request: Request) -> tuple[Request, Changes]:
        """What is left of a request when some more packages stay as they are, and its plan."""
        ...

    def start_over(self) -> None:
        """Forget what programs wrote and recorded."""
        ...


@dataclass(frozen=True, slots=True)
class Settled:
    """How it ended: what changed, and which changes are staged, each with its reason."""

    extraction: Extraction
    staged: dict[PackageChange, str] = field(default_factory=dict)


def settle(
    ground: Ground,
    changes: Changes,
    request: Request,
    *,
    staging: bool,
    tell: Callable[[str], None],
) -> Settled:
    """Emulate as many changes as can be.

    Args:
        ground: See `Ground`.
        changes: The plan's.
        request: What the plan answers.
        staging: What cannot be emulated may be staged.
        tell: Takes a line for each package that is.

    Raises:
        StagingNeededError: Something cannot be emulated, and may not be staged.
        DeadlineError: The same, for a package that did not end in time.
        UpdaterError: The updater failed, and no package is to blame.
    """
    staged: dict[PackageChange, str] = {}
    left = changes
    for number in range(_MOST_ROUNDS):
        extraction, ran, reasons = _try(ground, left, request, staged)
        if extraction is not None:
            return Settled(extraction, staged)
        if not staging:
            raise _refusal(ran, reasons)
        if number == _MOST_ROUNDS - 2:
            reasons = {
                change.name: reasons.get(change.name, "too many others had to be staged")
                for change in left
            }
        culprits = {change: reasons[change.name] for change in left if change.name in reasons}
        ground.start_over()  # apt plans for the guest as it fell asleep
        request, after = _plan_without(ground, tuple(culprits), request)
        more = culprits | _dependents(left, after, culprits)
        for change, reason in more.items():
            tell(f"staged: {change.name}: {reason}")
        staged |= more
        left = tuple(change for change in left if change not in staged)
    raise InternalError("a package is left after the round that stages all that is left")


def _try(
    ground: Ground, left: Changes, request: Request, staged: Mapping[PackageChange, str]
) -> tuple[Extraction | None, Ran | None, Reasons]:
    """One round: what it left, or else who is to blame."""
    if not left:
        return ground.extract(staged), None, {}
    names = frozenset(change.name for change in left)
    ran = ground.emulate(request)
    reasons = judge.failed(ran, names) | judge.refused(ground.events(), names)
    if ran.problem and not reasons:
        raise DeadlineError(ran.problem) if ran.timed_out else UpdaterError(ran.problem)
    if reasons:
        return None, ran, reasons
    extraction = ground.extract(staged)
    reasons = ground.held(extraction, ran, names)
    return (None, ran, reasons) if reasons else (extraction, ran, {})


def _plan_without(ground: Ground, culprits: Changes, request: Request) -> tuple[Request, Changes]:
    try:
        return ground.plan_without(culprits, request)
    except WorkDiskFullError:
        raise
    except UpdaterError:  # no solution without them: all that is left goes with them
        return request, ()


def _dependents(
    left: Changes, after: Changes, culprits: Mapping[PackageChange, str]
) -> dict[PackageChange, str]:
    """Changes that go with the culprits: apt does not plan them any more without those."""
    named = ", ".join(sorted({change.name for change in culprits})[:_MAX_NAMED])
    if not set(after) <= set(left) - set(culprits):
        words = f"apt plans something else without {named}, which is staged"
        return {change: words for change in left if change not in culprits}
    words = f"apt does not plan it without {named}, which is staged"
    kept = set(after) | set(culprits)
    return {change: words for change in left if change not in kept}


def _refusal(ran: Ran | None, reasons: Reasons) -> UpdaterError | DeadlineError:
    words = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:_MAX_NAMED])
    if ran is not None and ran.timed_out:
        return DeadlineError(words)
    return StagingNeededError(words)
