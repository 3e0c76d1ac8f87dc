"""What becomes of the gate when a reflection failed: closed, opened after a time, or quarantine.

A refusal, where the applier touched nothing because the guest is not the one that was planned for,
never opens it: somebody has to look. The history of the VM has each step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import (
    ApplyError,
    ConflictError,
    GateClosedError,
    GateOpenedError,
    InterruptedRunError,
    OUassisterError,
)

if TYPE_CHECKING:
    from ouassister.provider.interface import Running
    from ouassister.timeline import Timeline

HINT: Final = (
    "the VM runs with its links down; look at its console, then 'ouassister resume' tries again"
)
_QUARANTINED: Final = (
    "its other links are down; look at it there; 'ouassister resume' closes that and tries again"
)
_OPENED: Final = "'ouassister resume' closes the links again before it tries again"


@dataclass(frozen=True, slots=True)
class OnFailure:
    """What becomes of the gate. ``open_after_s`` None leaves it closed.

    With ``quarantine`` the links of the quarantine go up, and no other.
    """

    open_after_s: float | None = None
    quarantine: bool = False


def judge(error: OUassisterError) -> OUassisterError:
    """The error that a failed reflection ends with: the cause itself, or that nobody knows."""
    if isinstance(error, ApplyError | GateClosedError):
        return error
    if error.exit_status in (21, 22, 23):  # the applier refused: nothing was touched
        if not isinstance(error, ConflictError):
            error.hint = HINT
        return error
    return GateClosedError(error.message, hint=HINT)


def after_failure(
    vm: Running, failure: OUassisterError, policy: OnFailure, timeline: Timeline
) -> OUassisterError:
    """Do what the policy says; returns the error that tells of it.

    A signal while it waits leaves the gate closed.
    """
    if failure.exit_status not in (40, 41):
        return failure
    if policy.quarantine:
        return _quarantined(vm, failure, timeline)
    if policy.open_after_s is None:
        return failure
    timeline.say(f"failed: {failure.message}")
    try:
        with timeline.phase(f"gate closed for {policy.open_after_s:.0f} s more"):
            time.sleep(policy.open_after_s)
        with timeline.phase("open gate after a failure"):
            vm.set_links(up=True)
    except InterruptedRunError as stop:
        return type(failure)(f"{failure.message}; {stop.message}: the gate stays closed", hint=HINT)
    except OUassisterError as error:
        message = f"{failure.message}; and then the links could not be opened: {error.message}"
        return GateClosedError(message, hint=HINT)
    message = f"{failure.message}; the links were opened all the same, as asked for"
    if isinstance(failure, ApplyError):
        return ApplyError(message, hint=f"the guest is as it was suspended; {_OPENED}")
    return GateOpenedError(message, hint=_OPENED)


def _quarantined(vm: Running, failure: OUassisterError, timeline: Timeline) -> OUassisterError:
    try:
        with timeline.phase("open quarantine after a failure"):
            vm.open_quarantine()
    except InterruptedRunError as stop:
        return type(failure)(f"{failure.message}; {stop.message}: the gate stays closed", hint=HINT)
    except OUassisterError as error:
        message = f"{failure.message}; and then the quarantine could not be opened: {error.message}"
        return GateClosedError(message, hint=HINT)
    return type(failure)(f"{failure.message}; the VM is in quarantine", hint=_QUARANTINED)
