"""Take the last update back in the running guest, behind a closed gate.

The same applier does it from the same kind of medium, on which the layer is a hole: what was
replaced is still in the guest (docs/design/0020-rollback.md).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ouassister.errors import (
    ApplyError,
    DeadlineError,
    GateClosedError,
    LockedError,
    OUassisterError,
    RollbackRefusedError,
    StateError,
)
from ouassister.model import Action, Differing, Phase, RollbackReport
from ouassister.reflect import applier_protocol, bootstrap, reflection, second_look
from ouassister.reflect.applier_protocol import Outcome
from ouassister.restart.back import actions_back, stopped_for_good
from ouassister.store.database import ChangesetState
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ouassister.changeset.medium import MediumInfo
    from ouassister.model import Changeset
    from ouassister.provider.interface import Running, Vm
    from ouassister.reflect.applier_protocol import ApplierResult
    from ouassister.timeline import Timeline

_CHANNEL_S: Final = 30.0
_POLL_S: Final = 0.05
_BEFORE: Final = ("diverged", "no-undo")
_HINT: Final = (
    "the VM runs with its links down; look at its console, then 'ouassister rollback' tries again"
)
# It says that the update is in the guest (reflect/verify.sh).
_UNATTEST: Final = Action(("rm", "-f", "/var/lib/ouassister/attestation.json"))
_AS_IT_WAS: Final = "the guest is as the update left it, and its links are up"
_LEAVE_HINT: Final = (
    "'ouassister rollback --leave-diverged' takes back all but these, and what they were is lost"
)


def roll_back(
    config: Vm,
    changeset: Changeset,
    folder: Path,
    timeline: Timeline,
    *,
    leave_diverged: bool,
    again: bool,
    on_state: Callable[[ChangesetState], None],
) -> RollbackReport:
    """Take back what the change set did.

    Args:
        config: The VM; it runs.
        changeset: The last that was applied; its manifest was verified.
        folder: A private folder for the medium.
        timeline: Takes the story.
        leave_diverged: Paths that changed since stay as they are, instead of refusing all.
        again: An earlier rollback stopped half-way; the gate may be closed.
        on_state: Records how far it got, durably.

    Raises:
        RollbackRefusedError: Nothing was done.
        ApplyError: It failed and was undone: the guest is as the update left it.
        GateClosedError: Nobody knows how far it got; the gate is closed.
    """
    _refuse_staged(changeset)
    with timeline.phase("write medium"):
        medium = reflection.make_medium(changeset, None, folder)
    with config.attach() as vm:
        vm.reach(changeset.access)
        with timeline.phase("ask the guest"):
            vm.channel().ping(timeout_s=_CHANNEL_S)
            if changeset.reboot_needed and not again:
                _refuse_new_kernel(vm, changeset)
        with contextlib.suppress(OUassisterError):  # of an earlier run; there may be none
            vm.detach_medium(timeout_s=5)
        reflection.attach(vm, medium)
        on_state(ChangesetState.ROLLING_BACK)
        start = time.monotonic()
        vm.set_links(up=False)
        try:
            with timeline.phase("roll back"):
                result, left = _run(vm, medium, leave_diverged=leave_diverged, again=again)
            with timeline.phase("actions"):
                failed = reflection.act(vm, (*actions_back(changeset), _UNATTEST))
        except (RollbackRefusedError, LockedError, ApplyError):  # the guest is as it was before
            on_state(ChangesetState.APPLIED)
            vm.set_links(up=True)
            _detach(vm, medium, timeline)
            raise
        except (DeadlineError, StateError) as error:
            raise GateClosedError(f"the guest: {error.message}", hint=_HINT) from error
        on_state(ChangesetState.ROLLED_BACK)
        with timeline.phase("open gate"):
            vm.set_links(up=True)
        closed_s = time.monotonic() - start
        _detach(vm, medium, timeline)
    report = _report(changeset, result, timeline)
    return replace(
        report,
        files=result.files,
        left=left,
        changes=changeset.changes,
        failed_actions=failed,
        notes=_notes(changeset),
        closed_s=round(closed_s, 4),
    )


def forget(config: Vm, changeset: Changeset, folder: Path, timeline: Timeline) -> RollbackReport:
    """Remove what the guest keeps for a rollback; the links stay as they are.

    Raises:
        RollbackRefusedError: Not all of it could be removed.
        StateError: The VM does not run, or its agent does not answer.
    """
    with timeline.phase("write medium"):
        medium = reflection.make_medium(changeset, None, folder)
    with config.attach() as vm:
        vm.reach(changeset.access)
        with contextlib.suppress(OUassisterError):
            vm.detach_medium(timeout_s=5)
        reflection.attach(vm, medium)
        try:
            with timeline.phase("forget"):
                result, _ = _run(vm, medium, mode="forget", leave_diverged=False, again=False)
        finally:
            _detach(vm, medium, timeline)
    return _report(changeset, result, timeline)


def rollback_command(
    stub: bytes,
    serial: str,
    medium: MediumInfo,
    *,
    leave_diverged: bool,
    mode: str = "rollback",
    carried: bool = False,
) -> list[str]:
    """A command for the guest: that of `bootstrap.apply_command` for the way back."""
    command = bootstrap.apply_command(stub, serial, medium, now_ns=0, carried=carried)
    command[command.index("apply", 3)] = mode
    del command[command.index("--set-time") :]
    return [*command, "--leave-diverged", "yes"] if leave_diverged else command


def diverged(output: bytes) -> tuple[Differing, ...]:
    """Paths that the applier says are not as the update left them.

    Raises:
        ProtocolError: A line of it is none that an applier prints.
    """
    return applier_protocol.differing(output, "diverged")


def _run(
    vm: Running,
    medium: reflection.Medium,
    *,
    leave_diverged: bool,
    again: bool,
    mode: str = "rollback",
) -> tuple[ApplierResult, tuple[Differing, ...]]:
    stub = reflection.STUB.read_bytes()
    command = rollback_command(
        stub,
        medium.serial,
        medium.info,
        leave_diverged=leave_diverged,
        mode=mode,
        carried=medium.carried,
    )
    reflection.bring(vm, medium)
    done = second_look.run(vm, command, timeout_s=reflection.APPLY_S, most_s=_POLL_S)
    try:
        result = applier_protocol.parse_output(done.stdout)
        left = diverged(done.stdout)
    except applier_protocol.ProtocolError as error:
        detail = done.stderr.decode("utf-8", "replace").strip()[:500] or str(error)
        silence = applier_protocol.error_for_silence(done.exit_status, detail, again=again)
        if isinstance(silence, ApplyError):
            raise ApplyError(silence.message, hint=_AS_IT_WAS) from error
        raise GateClosedError(silence.message, hint=_HINT) from error
    failure = error_for(result, left, again=again)
    if failure is not None:
        raise failure
    return result, left


def error_for(
    result: ApplierResult, left: tuple[Differing, ...], *, again: bool
) -> OUassisterError | None:
    """The error that a result means; None when the update was taken back."""
    if result.outcome in applier_protocol.DONE:
        return None
    where = f" ({to_text(result.path)})" if result.path else ""
    message = f"the guest's applier says: {result.reason}{where} [{result.code}]"
    if result.outcome is Outcome.UNDONE:
        return ApplyError(message, hint=_AS_IT_WAS)
    # These two are said before anything is done; others may meet an earlier run's half.
    if result.outcome is Outcome.NEEDS_PERSON or (again and result.code not in _BEFORE):
        return GateClosedError(message, hint=_HINT)
    if result.code in ("locked", "busy"):
        return LockedError(message)
    if result.code == "diverged":
        told = tuple((to_text(one.path), one.reason) for one in left)
        return RollbackRefusedError(message, told, hint=_LEAVE_HINT)
    return RollbackRefusedError(message)


def _detach(vm: Running, medium: reflection.Medium, timeline: Timeline) -> None:
    for note in reflection.detach(vm, medium, timeline):
        timeline.say(note)


def _refuse_staged(changeset: Changeset) -> None:
    if changeset.staged:
        names = ", ".join(one.name for one in changeset.staged)
        raise RollbackRefusedError(
            f"the guest's own dpkg installed {names}: what its scripts did cannot be taken back",
            hint="install the older versions in the guest, with its package manager",
        )


def _refuse_new_kernel(vm: Running, changeset: Changeset) -> None:
    """Its modules would be taken from under the kernel that runs."""
    done = vm.channel().run(["cat", "/proc/sys/kernel/random/boot_id"], timeout_s=_CHANNEL_S)
    if done.stdout.decode("ascii", "replace").strip() != changeset.identity.boot_id:
        raise RollbackRefusedError(
            f"{changeset.vm} was booted since the update, which brought a kernel: it may be the "
            "one that runs",
            hint="boot the older kernel and remove the new one with the package manager",
        )


def _report(changeset: Changeset, result: ApplierResult, timeline: Timeline) -> RollbackReport:
    """Of a run that took nothing back."""
    return RollbackReport(
        vm=changeset.vm,
        changeset_id=changeset.changeset_id,
        result=str(result.outcome),
        files=0,
        left=(),
        changes=(),
        failed_actions=(),
        notes=(),
        phases=timeline.phases,
        guest_phases=tuple(
            Phase(name, round(milliseconds / 1000, 4)) for name, milliseconds in result.phases_ms
        ),
        closed_s=0.0,
    )


def _notes(changeset: Changeset) -> tuple[str, ...]:
    return tuple(
        f"the update stopped {unit}, whose file is back; it was not started"
        for unit in stopped_for_good(changeset)
    )
