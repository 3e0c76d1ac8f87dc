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
    ApplyError,
    DeadlineError,
    GateClosedError,
    HostNotReadyError,
    OUassisterError,
)
from ouassister.model import Phase, ResumeReport
from ouassister.reflect import applier_protocol, bootstrap, staged
from ouassister.store.database import ChangesetState

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.model import Action, Changeset, StagedState
    from ouassister.provider.interface import Running, Vm
    from ouassister.reflect.applier_protocol import ApplierResult
    from ouassister.timeline import Timeline

APPLIER: Final = Path(__file__).parent / "bin" / "applier-x86_64"
STUB: Final = Path(__file__).parent / "bin" / "stub-x86_64"
APPLY_S: Final = 900.0
_POLL_S: Final = 0.02  # between two looks at the applier
_ACTIONS_S: Final = 600.0
_GATE_HINT: Final = (
    "the VM runs with its links down; look at its console, then 'ouassister resume' tries again"
)


@dataclass(frozen=True, slots=True)
class Medium:
    """The change set as a disk image, and what starts the applier from it."""

    path: Path
    info: MediumInfo
    serial: str


def reflect(
    config: Vm,
    changeset: Changeset,
    layer: Path,
    folder: Path,
    timeline: Timeline,
    *,
    on_state: Callable[[ChangesetState], None],
    again: bool,
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

    Raises:
        ApplyError: The guest is as it was suspended; the gate is closed.
        GateClosedError: Nobody knows how far it got; the gate is closed.
        StaleError: The guest is not the one the change set was made for; the gate is closed.
    """
    with timeline.phase("write medium"):
        medium = _write_medium(changeset, layer, folder)
    on_state(ChangesetState.APPLYING)
    with timeline.phase("restore, links down"):
        try:
            vm = _find(config) if again and config.is_running() else _restore(config)
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
            states: tuple[StagedState, ...] = ()
            asked, last = staged.split(changeset)
            with timeline.phase("actions"):
                failed = _act(vm, asked)
            if changeset.staged:
                with timeline.phase("install staged packages"):
                    installed = staged.install(vm, changeset, _GATE_HINT)
                states = installed.states
                with timeline.phase("restarts"):
                    failed += _act(vm, staged.due(changeset.restarts, last, installed))
            with timeline.phase("open gate"):
                vm.set_links(up=True)
            online_s = time.monotonic() - start
        except (ApplyError, GateClosedError) as error:
            if isinstance(error, ApplyError):
                on_state(ChangesetState.FAILED)
            raise
        except OUassisterError as error:
            if error.exit_status in (21, 22, 23):  # the applier refused: nothing was touched
                on_state(ChangesetState.FAILED)
                error.hint = _GATE_HINT
                raise
            raise GateClosedError(error.message, hint=_GATE_HINT) from error
        on_state(ChangesetState.APPLIED)
        notes = _detach(vm, timeline)
    report = _report(changeset, result, failed, timeline, online_s, notes)
    return replace(report, staged=states)


def _write_medium(changeset: Changeset, layer: Path, folder: Path) -> Medium:
    if not APPLIER.exists():
        raise HostNotReadyError(f"the applier {APPLIER} is not built", hint="run 'make applier'")
    path = folder / "medium.img"
    info = write_medium(changeset, layer, APPLIER, path)
    return Medium(path, info, f"oua-{changeset.changeset_id[:16]}")


def _restore(config: Vm) -> Running:
    if not config.save.exists():
        raise GateClosedError(
            f"{config.name} ended while the change set was being applied",
            hint="boot it with its links down; 'ouassister resume' then finishes what was begun",
        )
    return config.restore()


def _find(config: Vm) -> Running:
    """Take over the VM as an earlier resume left it."""
    vm = config.attach()
    vm.set_links(up=False)
    with contextlib.suppress(OUassisterError):  # it may have none, or not be able to let go
        vm.detach_medium(timeout_s=5)
    return vm


def _apply(vm: Running, medium: Medium) -> ApplierResult:
    stub = STUB.read_bytes()
    command = bootstrap.apply_command(stub, medium.serial, medium.info, time.time_ns())
    try:
        done = vm.qga().run(command, timeout_s=APPLY_S, most_s=_POLL_S)
    except DeadlineError as error:
        raise GateClosedError(f"the guest: {error.message}", hint=_GATE_HINT) from error
    try:
        result = applier_protocol.parse_output(done.stdout)
    except applier_protocol.ProtocolError as error:
        detail = done.stderr.decode("utf-8", "replace").strip()[:500] or str(error)
        raise applier_protocol.error_for_silence(done.exit_status, detail) from error
    failure = applier_protocol.error_for(result)
    if failure is not None:
        raise failure
    return result


def _act(vm: Running, actions: tuple[Action, ...]) -> tuple[str, ...]:
    if not actions:
        return ()
    command = bootstrap.actions_command(actions)
    done = vm.qga().run(command, timeout_s=_ACTIONS_S)
    return bootstrap.failed_actions(actions, done.stdout)


def _detach(vm: Running, timeline: Timeline) -> tuple[str, ...]:
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
    failed: tuple[str, ...],
    timeline: Timeline,
    online_s: float,
    notes: tuple[str, ...],
) -> ResumeReport:
    return ResumeReport(
        vm=changeset.vm,
        changeset_id=changeset.changeset_id,
        result=str(result.outcome),
        files=result.files,
        bytes=result.size_bytes,
        failed_actions=failed,
        verified=(
            "every byte of the change set by its SHA-256, in the guest",
            "every replaced or deleted path was as planned",
            "every path in place: inode, size and mode",
            *(("version and state of every staged package",) if changeset.staged else ()),
        ),
        reboot_needed=changeset.reboot_needed,
        notes=(*changeset.notes, *notes),
        phases=timeline.phases,
        guest_phases=tuple(
            Phase(name, round(milliseconds / 1000, 4)) for name, milliseconds in result.phases_ms
        ),
        restore_s=round(timeline.seconds("restore, links down"), 4),
        online_s=round(online_s, 4),
    )
