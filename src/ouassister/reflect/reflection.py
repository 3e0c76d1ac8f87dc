"""Resume behind a closed gate, apply from inside, open the gate.

The links are down before the guest's first instruction and go up after the applier has said that
all is in place. Whatever fails in between leaves them down.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.changeset.medium import MediumInfo, write_medium
from ouassister.errors import (
    ChannelError,
    ConflictError,
    DeadlineError,
    GateClosedError,
    GateOpenedError,
    HostNotReadyError,
    InterruptedRunError,
    OUassisterError,
    QemuRefusedError,
    StaleError,
)
from ouassister.model import Action, Differing, Gate, Phase, ResumeReport, StagedState
from ouassister.reflect import (
    afresh,
    applier_protocol,
    bootstrap,
    conflicts,
    gate,
    second_look,
    staged,
    verify,
)
from ouassister.reflect.verify import Verification
from ouassister.restart import reach
from ouassister.restart.reach import Parts
from ouassister.state.fence import check_fence
from ouassister.store.database import ChangesetState

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.model import Changeset
    from ouassister.provider.interface import Running, Vm
    from ouassister.reflect.applier_protocol import ApplierResult
    from ouassister.reflect.fallback import Fallback
    from ouassister.reflect.gate import OnFailure
    from ouassister.timeline import Timeline

APPLIER: Final = Path(__file__).parent / "bin" / "applier-x86_64"
STUB: Final = Path(__file__).parent / "bin" / "stub-x86_64"
APPLY_S: Final = 900.0
_POLL_S: Final = 0.02  # between two looks at the applier
_ACTIONS_S: Final = 600.0
_DETACH_S: Final = 30.0
_SPARE: Final = "fallback.img"
# What each of the applier's phases proves; one that takes up an earlier run lacks some.
_AS_PLANNED: Final = "every replaced or deleted path was as planned"
_OF_APPLIER: Final = (
    ("stage", "every byte of the change set by its SHA-256, in the guest"),
    ("stage", _AS_PLANNED),
    ("verify", "every path in place: inode, size and mode"),
)
_OF_SAME: Final = "what only got another time by inode, size and times, not by its bytes"


@dataclass(frozen=True, slots=True)
class Medium:
    """The change set as a disk image, and what starts the applier from it."""

    path: Path
    info: MediumInfo
    serial: str
    carried: bool  # by the channel: it is no disk


@dataclass(frozen=True, slots=True)
class _Finished:
    """What came of all that follows the files, and what is left to be done."""

    failed_actions: tuple[str, ...]
    staged: tuple[StagedState, ...]
    verification: Verification
    parts: Parts | None = None  # of the actions, where some go on behind the open gate
    worker: int = 0  # the guest's process that goes on with them


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
    extent: Gate = Gate.FULL,
    on_retire: Callable[[], None] = lambda: None,
    fallback: Fallback | None = None,
    on_fallback: Callable[[ApplierResult, tuple[Differing, ...]], Fallback] | None = None,
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
        extent: How much is done behind the closed gate.
        on_retire: Called before the save file is put out of the way; the guest has not run since
            it slept, and sleeps on when this raises.
        fallback: What can be applied instead when paths of the guest conflict.
        on_fallback: Chooses what is, and records it, durably, with the paths.

    Raises:
        ApplyError: The guest is as it was suspended; the gate is closed, but for the policy.
        GateClosedError: Nobody knows how far it got; the gate is closed.
        GateOpenedError: As before; the policy has opened the gate, or it was open by then.
        StaleError: The guest is not the one the change set was made for; the gate is closed.
    """
    with timeline.phase("write medium"):
        medium = make_medium(changeset, layer, folder)
        spare = fallback and make_medium(fallback.changeset, fallback.layer, folder, _SPARE)
    on_state(ChangesetState.APPLYING)
    with timeline.phase("restore, links down"):
        try:
            vm = _wake(config, changeset) if again else config.restore()
        except BaseException:
            if not again:
                on_state(ChangesetState.READY)
            raise
    with vm:
        try:
            vm.reach(changeset.access)
            vm.channel()  # connected before the guest runs: its agent wakes at once
            attach(vm, medium)
            on_retire()
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
                result, found = _apply(vm, medium, again=again)
                if spare is None or not conflicts.may_fall_back(result, found):
                    _refuse(result, found)
                    spare, found = None, ()
            if fallback and on_fallback and spare:
                found = found or (Differing(result.path, result.reason),)
                timeline.say(f"paths conflict: {applier_protocol.named(found)}")
                with timeline.phase("choose what stands in"):
                    chosen = on_fallback(result, found)
                    if chosen is not fallback:
                        spare = make_medium(chosen.changeset, chosen.layer, folder, _SPARE)
                changeset = chosen.changeset
                with timeline.phase("apply what stands in"):
                    medium = _change_medium(vm, medium, spare)
                    result, more = _apply(vm, medium, again=False)
                    _refuse(result, more)
            done = _finish(vm, changeset, result, timeline, extent)
            with timeline.phase("open gate"):
                vm.set_links(up=True)
            online_s = time.monotonic() - start
        except OUassisterError as error:
            failure = gate.judge(error)
            if again and type(failure) in (StaleError, ConflictError):
                failure.hint = afresh.UNDONE_HINT
            if not isinstance(failure, GateClosedError):
                on_state(ChangesetState.FAILED)
            if not isinstance(error, InterruptedRunError):
                failure = gate.after_failure(vm, failure, on_failure, timeline)
            raise failure from (None if failure is error else error)
        try:
            done = _follow(vm, changeset, result, done, timeline)
        except OUassisterError as error:
            message = f"after the gate had been opened: {error.message}"
            raise GateOpenedError(message) from error
        settled_s = time.monotonic() - start
        on_state(ChangesetState.APPLIED)
        notes = detach(vm, medium, timeline)
    report = _report(changeset, result, done, timeline, online_s, notes)
    return replace(report, gate=extent, settled_s=round(settled_s, 4), conflicts=found)


def make_medium(
    changeset: Changeset, layer: Path | None, folder: Path, name: str = "medium.img"
) -> Medium:
    """Write the medium of a change set; without its layer, that of a rollback."""
    if not APPLIER.exists():
        raise HostNotReadyError(f"the applier {APPLIER} is not built", hint="run 'make applier'")
    path = folder / name
    attestation = verify.for_applier(changeset)
    info = write_medium(changeset, layer, APPLIER, path, attestation=attestation)
    serial = f"oua-{changeset.changeset_id[:16]}"
    return Medium(path, info, serial, changeset.access.carried)


def attach(vm: Running, medium: Medium) -> None:
    """Plug the medium in; one that the channel carries waits for the guest to run."""
    if not medium.carried:
        vm.attach_medium(medium.path, medium.serial)


def bring(vm: Running, medium: Medium) -> None:
    """Have the channel bring the medium, if that is how it comes; the guest runs.

    Raises:
        ChannelError: It is not there as a whole.
    """
    if medium.carried:
        path = bootstrap.carried_path(medium.serial)
        vm.channel().write_file(path, medium.path.read_bytes(), timeout_s=APPLY_S)


def _wake(config: Vm, changeset: Changeset) -> Running:
    """The VM, as an earlier resume left it."""
    if config.is_running():
        return _find(config, changeset)
    return config.restore() if config.save.exists() else afresh.boot(config, changeset.access)


def _find(config: Vm, changeset: Changeset) -> Running:
    """Take over the VM as an earlier resume left it, which may have been killed at any moment."""
    vm = config.attach()
    vm.reach(changeset.access)
    if config.save.exists() and not vm.runs():  # see `Vm.retire_save`: it never ran
        vm.kill()
        check_fence(changeset.fence)
        return config.restore()
    vm.set_links(up=False)
    vm.cont()
    try:
        second_look.await_end(vm, time.monotonic() + APPLY_S)
        with contextlib.suppress(QemuRefusedError):  # it has none
            vm.detach_medium()
    except (ChannelError, DeadlineError) as error:
        message = f"what an earlier resume began in the guest does not end: {error.message}"
        raise GateClosedError(message, hint=gate.HINT) from error
    return vm


def _change_medium(vm: Running, old: Medium, new: Medium) -> Medium:
    """Put another medium in the place of one that the applier is done with."""
    if old.carried:
        vm.channel().run(bootstrap.uncarry_command(old.serial), timeout_s=_DETACH_S)
    else:
        vm.detach_medium()
    attach(vm, new)
    return new


def _apply(
    vm: Running, medium: Medium, *, again: bool
) -> tuple[ApplierResult, tuple[Differing, ...]]:
    """Run the applier to its end; with how it ended, the conflicts that it told."""
    stub = STUB.read_bytes()
    try:
        bring(vm, medium)
        command = bootstrap.apply_command(
            stub, medium.serial, medium.info, time.time_ns(), carried=medium.carried
        )
        seed = bootstrap.seed()
        done = second_look.run(vm, command, stdin=seed, timeout_s=APPLY_S, most_s=_POLL_S)
    except DeadlineError as error:
        raise GateClosedError(f"the guest: {error.message}", hint=gate.HINT) from error
    try:
        return applier_protocol.parse_output(done.stdout), conflicts.told(done.stdout)
    except applier_protocol.ProtocolError as error:
        detail = done.stderr.decode("utf-8", "replace").strip()[:500] or str(error)
        raise applier_protocol.error_for_silence(done.exit_status, detail, again=again) from error


def _refuse(result: ApplierResult, found: tuple[Differing, ...]) -> None:
    failure = applier_protocol.error_for(result, found)
    if failure is not None:
        raise failure


def _finish(
    vm: Running, changeset: Changeset, result: ApplierResult, timeline: Timeline, extent: Gate
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
    parts = None
    if extent is Gate.EXPOSED:
        parts = reach.part(actions, changeset.restarts, changeset.out_of_reach)
    with timeline.phase("restarts and verification" if states else "actions and verification"):
        if parts and parts.follow:
            output = _run(vm, verify.begin_command(changeset, parts))
            verification = _verified(changeset, result, output, (), parts.follow)
            return _Finished(failed, states, verification, parts, verify.worker(output))
        output = _run(vm, verify.command(changeset, actions))
        more = bootstrap.failed_actions(actions, output)
        return _Finished(failed + more, states, _verified(changeset, result, output, more))


def _follow(
    vm: Running, changeset: Changeset, result: ApplierResult, done: _Finished, timeline: Timeline
) -> _Finished:
    """What was left for after the gate; verified again.

    Raises:
        GateClosedError: The verification met a problem; its text fits an open gate, too.
    """
    parts = done.parts
    if parts is None:
        return done
    with timeline.phase("gate open: actions and verification"):
        output = _run(vm, verify.follow_command(changeset, parts, done.worker))
        failed = bootstrap.failed_actions((*parts.begun, *parts.left), output)
        verification = _verified(changeset, result, output, failed)
    return replace(done, failed_actions=done.failed_actions + failed, verification=verification)


def _run(vm: Running, command: list[str]) -> bytes:
    return second_look.run(vm, command, timeout_s=_ACTIONS_S, most_s=_POLL_S).stdout


def _verified(
    changeset: Changeset,
    result: ApplierResult,
    output: bytes,
    failed: tuple[str, ...],
    left: tuple[Action, ...] = (),
) -> Verification:
    """What the guest's answers come to.

    Raises:
        GateClosedError: They tell of a problem.
    """
    since_ms = result.ended_ms - sum(milliseconds for _name, milliseconds in result.phases_ms)
    verification = verify.judge(changeset, since_ms, output, left)
    if verification.problems:
        words = "; ".join((*verification.problems, *failed))
        raise GateClosedError(f"verification in the guest: {words}", hint=gate.HINT)
    return verification


def act(vm: Running, actions: tuple[Action, ...]) -> tuple[str, ...]:
    """Do actions in the guest; those that failed are named."""
    if not actions:
        return ()
    command = bootstrap.actions_command(actions)
    done = second_look.run(vm, command, timeout_s=_ACTIONS_S)
    return bootstrap.failed_actions(actions, done.stdout)


def detach(vm: Running, medium: Medium, timeline: Timeline) -> tuple[str, ...]:
    """Take the medium away; a guest that will not let go of it is told of, no more."""
    try:
        with timeline.phase("detach medium"):
            if medium.carried:
                vm.channel().run(bootstrap.uncarry_command(medium.serial), timeout_s=_DETACH_S)
            else:
                vm.detach_medium()
    except OUassisterError as error:
        return (f"the change set's medium is still in the guest: {error.message}",)
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
    replaces = any(entry.expected is not None for entry in changeset.entries)
    same = "stage" in done_phases and any(entry.same for entry in changeset.entries)
    return ResumeReport(
        vm=changeset.vm,
        changeset_id=changeset.changeset_id,
        result=str(result.outcome),
        files=result.files,
        bytes=result.size_bytes,
        failed_actions=done.failed_actions,
        verified=(
            *(
                words
                for phase, words in _OF_APPLIER
                if phase in done_phases and (replaces or words != _AS_PLANNED)
            ),
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
