"""Resume behind a closed gate, apply from inside, open the gate.

The links are down before the guest's first instruction and go up after the applier has said that
all is in place. Whatever fails in between leaves them down.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.changeset.medium import MediumInfo, write_medium
from ouassister.errors import (
    AgentError,
    DeadlineError,
    GateClosedError,
    HostNotReadyError,
    InterruptedRunError,
    OUassisterError,
    QemuRefusedError,
)
from ouassister.model import Phase, ResumeReport, StagedState
from ouassister.reflect import applier_protocol, bootstrap, gate, staged, verify
from ouassister.reflect.verify import Verification
from ouassister.state.fence import check_fence
from ouassister.store.database import ChangesetState

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.model import Action, Changeset
    from ouassister.provider.interface import Running, Vm
    from ouassister.reflect.applier_protocol import ApplierResult
    from ouassister.reflect.gate import OnFailure
    from ouassister.timeline import Timeline

APPLIER: Final = Path(__file__).parent / "bin" / "applier-x86_64"
STUB: Final = Path(__file__).parent / "bin" / "stub-x86_64"
APPLY_S: Final = 900.0
_POLL_S: Final = 0.02  # between two looks at the applier
_ACTIONS_S: Final = 600.0
# What each of the applier's phases proves; one that takes up an earlier run lacks some.
_OF_APPLIER: Final = (
    ("stage", "every byte of the change set by its SHA-256, in the guest"),
    ("stage", "every replaced or deleted path was as planned"),
    ("verify", "every path in place: inode, size and mode"),
)
_OF_SAME: Final = "what only got another time by inode, size and times, not by its bytes"


@dataclass(frozen=True, slots=True)
class Medium:
    """The change set as a disk image, and what starts the applier from it."""

    path: Path
    info: MediumInfo
    serial: str


@dataclass(frozen=True, slots=True)
class _Finished:
    """What came of all that follows the files."""

    failed_actions: tuple[str, ...]
    staged: tuple[StagedState, ...]
    verification: Verification


def reflect(
    config: Vm,
    changeset: Changeset,
    layer: Path,
    folder: Path,
    timeline: Timeline,
    *,
    on_state: Callable[[ChangesetState], None],
    again: bool,
    on_failure: OnFailure,
) -> ResumeReport:
    """Resume the VM and make the change set true in it.

    Args:
        config: The VM, suspended; with ``again`` it may run already, behind its gate.
        changeset: Verified against its id and its layer.
        layer: Its layer.
        folder: A private folder for the medium.
        timeline: Takes the story.
        on_state: Records how far the change set got, durably.
        again: An earlier resume stopped half-way.
        on_failure: What becomes of the gate then.

    Raises:
        ApplyError: The guest is as it was suspended; the gate is closed, but for the policy.
        GateClosedError: Nobody knows how far it got; the gate is closed.
        GateOpenedError: As before; the policy has opened the gate.
        StaleError: The guest is not the one the change set was made for; the gate is closed.
    """
    with timeline.phase("write medium"):
        medium = make_medium(changeset, layer, folder)
    on_state(ChangesetState.APPLYING)
    with timeline.phase("restore, links down"):
        try:
            vm = _find(config, changeset) if again and config.is_running() else _restore(config)
        except BaseException:
            if not again:
                on_state(ChangesetState.READY)
            raise
    with vm:
        try:
            vm.qga()  # connected before the guest runs: its agent wakes at once
            vm.attach_medium(medium.path, medium.serial)
            config.retire_save()
        except BaseException:
            if not again:  # it never ran: it sleeps as before
                vm.kill()
                on_state(ChangesetState.READY)
            raise
        start = time.monotonic()
        try:
            vm.cont()
            with timeline.phase("apply"):
                result = _apply(vm, medium)
            done = _finish(vm, changeset, result, timeline)
            with timeline.phase("open gate"):
                vm.set_links(up=True)
            online_s = time.monotonic() - start
        except OUassisterError as error:
            failure = gate.judge(error)
            if not isinstance(failure, GateClosedError):
                on_state(ChangesetState.FAILED)
            if not isinstance(error, InterruptedRunError):
                failure = gate.after_failure(vm, failure, on_failure, timeline)
            raise failure from (None if failure is error else error)
        on_state(ChangesetState.APPLIED)
        notes = detach(vm, timeline)
    return _report(changeset, result, done, timeline, online_s, notes)


def make_medium(changeset: Changeset, layer: Path | None, folder: Path) -> Medium:
    """Write the medium of a change set; without its layer, that of a rollback."""
    if not APPLIER.exists():
        raise HostNotReadyError(f"the applier {APPLIER} is not built", hint="run 'make applier'")
    path = folder / "medium.img"
    attestation = verify.for_applier(changeset)
    info = write_medium(changeset, layer, APPLIER, path, attestation=attestation)
    return Medium(path, info, f"oua-{changeset.changeset_id[:16]}")


def _restore(config: Vm) -> Running:
    if not config.save.exists():
        raise GateClosedError(
            f"{config.name} ended while the change set was being applied",
            hint="boot it with its links down; 'ouassister resume' then finishes what was begun",
        )
    return config.restore()


def _find(config: Vm, changeset: Changeset) -> Running:
    """Take over the VM as an earlier resume left it, which may have been killed at any moment."""
    vm = config.attach()
    if config.save.exists() and not vm.runs():  # see `Vm.retire_save`: it never ran
        vm.kill()
        check_fence(changeset.fence)
        return _restore(config)
    vm.set_links(up=False)
    vm.cont()
    try:
        # The medium must not go while somebody reads it, nor may things be done twice at once.
        vm.qga().run(bootstrap.await_command(), timeout_s=APPLY_S)
        with contextlib.suppress(QemuRefusedError):  # it has none
            vm.detach_medium()
    except (AgentError, DeadlineError) as error:
        message = f"what an earlier resume began in the guest does not end: {error.message}"
        raise GateClosedError(message, hint=gate.HINT) from error
    return vm


def _apply(vm: Running, medium: Medium) -> ApplierResult:
    stub = STUB.read_bytes()
    command = bootstrap.apply_command(stub, medium.serial, medium.info, time.time_ns())
    try:
        seed = bootstrap.seed()
        done = vm.qga().run(command, stdin=seed, timeout_s=APPLY_S, most_s=_POLL_S)
    except DeadlineError as error:
        raise GateClosedError(f"the guest: {error.message}", hint=gate.HINT) from error
    try:
        result = applier_protocol.parse_output(done.stdout)
    except applier_protocol.ProtocolError as error:
        detail = done.stderr.decode("utf-8", "replace").strip()[:500] or str(error)
        raise applier_protocol.error_for_silence(done.exit_status, detail) from error
    failure = applier_protocol.error_for(result)
    if failure is not None:
        raise failure
    return result


def _finish(
    vm: Running, changeset: Changeset, result: ApplierResult, timeline: Timeline
) -> _Finished:
    """What follows the files: actions, staged packages, restarts, verification.

    Raises:
        GateClosedError: A staged package is not installed, or the verification met a problem.
    """
    states: tuple[StagedState, ...] = ()
    failed: tuple[str, ...] = ()
    actions, last = staged.split(changeset)
    if changeset.staged:
        with timeline.phase("actions"):
            failed = act(vm, actions)
        with timeline.phase("install staged packages"):
            installed = staged.install(vm, changeset, gate.HINT)
        states = installed.states
        actions = staged.due(changeset.restarts, last, installed)
    if verify.is_attested(result):
        return _Finished(failed, states, verify.BY_APPLIER)
    with timeline.phase("restarts and verification" if states else "actions and verification"):
        command = verify.command(changeset, actions)
        done = vm.qga().run(command, timeout_s=_ACTIONS_S, most_s=_POLL_S)
    failed += bootstrap.failed_actions(actions, done.stdout)
    since_ms = result.ended_ms - sum(milliseconds for _name, milliseconds in result.phases_ms)
    verification = verify.judge(changeset, since_ms, done.stdout)
    if verification.problems:
        words = "; ".join((*verification.problems, *failed))
        raise GateClosedError(f"verification in the guest: {words}", hint=gate.HINT)
    return _Finished(failed, states, verification)


def act(vm: Running, actions: tuple[Action, ...]) -> tuple[str, ...]:
    """Do actions in the guest; those that failed are named."""
    if not actions:
        return ()
    command = bootstrap.actions_command(actions)
    done = vm.qga().run(command, timeout_s=_ACTIONS_S)
    return bootstrap.failed_actions(actions, done.stdout)


def detach(vm: Running, timeline: Timeline) -> tuple[str, ...]:
    """Take the medium away; a guest that will not let go of it is told of, no more."""
    try:
        with timeline.phase("detach medium"):
            vm.detach_medium()
    except OUassisterError as error:
        return (f"the change set's disk is still attached: {error.message}",)
    return ()


def _report(
    changeset: Changeset,
    result: ApplierResult,
    done: _Finished,
    timeline: Timeline,
    online_s: float,
    notes: tuple[str, ...],
) -> ResumeReport:
    done_phases = {name for name, _milliseconds in result.phases_ms}
    same = "stage" in done_phases and any(entry.same for entry in changeset.entries)
    return ResumeReport(
        vm=changeset.vm,
        changeset_id=changeset.changeset_id,
        result=str(result.outcome),
        files=result.files,
        bytes=result.size_bytes,
        failed_actions=done.failed_actions,
        verified=(
            *(words for phase, words in _OF_APPLIER if phase in done_phases),
            *((_OF_SAME,) if same else ()),
            *(("version and state of every staged package",) if changeset.staged else ()),
            *done.verification.verified,
        ),
        reboot_needed=changeset.reboot_needed,
        notes=(*changeset.notes, *done.verification.notes, *notes),
        phases=timeline.phases,
        guest_phases=tuple(
            Phase(name, round(milliseconds / 1000, 4)) for name, milliseconds in result.phases_ms
        ),
        restore_s=round(timeline.seconds("restore, links down"), 4),
        online_s=round(online_s, 4),
        staged=done.staged,
    )
