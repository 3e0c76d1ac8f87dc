"""The spine: each step takes a frozen record and returns the next.

open_sleeping  →  Sleeping          reads only
open_guest     →  Guest             a shadow over a private copy of the disk
apt            →  Plan, output      the guest's own tools, on the host
extract        →  Changeset         frozen, hashed
reflect        →  ResumeReport      the only step that a guest can feel
"""

from __future__ import annotations

import contextlib
import glob
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister import offline, snapshots
from ouassister.changeset import archive
from ouassister.errors import (
    InterruptedRunError,
    NothingPendingError,
    OUassisterError,
    RollbackRefusedError,
    RunningVMError,
    StaleError,
    UsageError,
    WorkDiskFullError,
)
from ouassister.guest_shadow import Options as Options
from ouassister.guest_shadow import open_guest
from ouassister.model import Gate, Plan, Request, UpdateReport
from ouassister.packages import apt, update
from ouassister.partial import make as partial
from ouassister.reaching.choose import choose, refuse_too_large, remarks
from ouassister.reflect import conflicts, fallback
from ouassister.reflect.fallback import Fallback
from ouassister.reflect.fallback import OnConflict as OnConflict
from ouassister.reflect.gate import OnFailure as OnFailure
from ouassister.reflect.reflection import reflect
from ouassister.reflect.rollback import forget, roll_back
from ouassister.sleeping import refuse_running
from ouassister.state.fence import check_fence, refuse_other
from ouassister.store.database import ChangesetState, Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ouassister.model import Differing, ResumeReport, RollbackReport
    from ouassister.provider.interface import Vm
    from ouassister.reflect.applier_protocol import ApplierResult
    from ouassister.snapshots import Snapshot
    from ouassister.timeline import Timeline

_STAYS_CLOSED: Final = OnFailure()
_IN_THE_GUEST: Final = (
    ChangesetState.APPLIED,
    ChangesetState.APPLYING,
    ChangesetState.ROLLING_BACK,
)


def plan(config: Vm, request: Request, store: Store, timeline: Timeline, options: Options) -> Plan:
    """Say what an update would do; lists are fetched, nothing is changed.

    Raises:
        OUassisterError: See `open_sleeping`, `refuse_unsafe` and `Apt`.
    """
    apt.check_request(request)
    with _named(config, store), open_guest(config, store, timeline, options) as guest:
        with timeline.phase(offline.CHOOSE):
            access = choose(guest)
        tool = offline.apt_of(guest, timeline, options)
        left_out = offline.refresh(tool, timeline)
        with timeline.phase("plan"):
            simulated = tool.plan(request)
            predicted = offline.predicted(guest, simulated.changes, store)
        guest.prove(timeline)
        made = update.make_plan(
            config.name,
            guest.sleeping.fence,
            request,
            simulated,
            left_out,
            predicted,
            access.channel,
            remarks(guest, access),
        )
        store.add_plan(made)
        return made


def update_sleeping(
    config: Vm,
    wish: Request | str,
    store: Store,
    timeline: Timeline,
    options: Options,
) -> UpdateReport:
    """Update the VM while it sleeps; the result is a stored change set.

    Args:
        config: The VM.
        wish: A request, or the id of a plan that `plan` made.
        store: Where the change set goes.
        timeline: Takes the story.
        options: See `Options`.

    Raises:
        OUassisterError: Nothing of the VM was written, whichever error it is.
    """
    if isinstance(wish, Request):
        apt.check_request(wish)
    with _named(config, store):
        todo = wish if isinstance(wish, Request) else store.plan(config.name, wish)
        if isinstance(todo, Plan):
            check_fence(todo.fence)
        try:
            with open_guest(config, store, timeline, options) as guest:
                report = offline.run(guest, todo, store, timeline, options)
        except OSError as error:
            if error.errno == 28:
                raise WorkDiskFullError(f"the work folder: {error}") from error
            raise
        offline_s = timeline.elapsed_s - report.download_s
        return replace(report, phases=timeline.phases, offline_s=round(offline_s, 4))


def run_program(
    config: Vm,
    argv: Sequence[str],
    store: Store,
    timeline: Timeline,
    options: Options,
    *,
    capture: bool = False,
) -> tuple[int, bytes]:
    """Run any program in the sleeping guest's view; what it writes is thrown away.

    Returns:
        The program's exit status, and what it printed when ``capture`` is set; otherwise it has
        the caller's standard streams.
    """
    output = "program" if capture else None
    with (
        _named(config, store),
        open_guest(config, store, timeline, options, updating=False) as guest,
    ):
        guest.prove(timeline)
        guest.know()
        status = guest.shadow.run(
            argv, package_cache=False, timeout_s=options.timeout_s, output=output
        )
        return status, guest.shadow.output_path("program").read_bytes() if capture else b""


def resume(
    config: Vm,
    store: Store,
    timeline: Timeline,
    on_failure: OnFailure = _STAYS_CLOSED,
    extent: Gate = Gate.FULL,
    *,
    keep_snapshots: int = 0,
    on_conflict: OnConflict = OnConflict.REFUSE,
) -> ResumeReport:
    """Resume the VM with its links down, apply the pending change set, open the gate.

    Args:
        config: The VM.
        store: Has the change set.
        timeline: Takes the story.
        on_failure: What becomes of the gate when it failed.
        extent: How much is done before it opens.
        keep_snapshots: Take a snapshot before, and keep so many; 0 takes none.
        on_conflict: What becomes of the update when paths of the guest are not as planned.

    Raises:
        UsageError: The policy is a quarantine, and the VM has none; or conflicts are to be staged,
            and the update kept nothing for that.
        WorkDiskFullError: There is no room for a snapshot; the VM sleeps on.
        NothingPendingError: There is no change set.
        StaleError: It was made for another suspension, or is not what was made.
        ApplyError: The guest is as it was suspended, and runs; the gate is closed.
        GateClosedError: It may be partly applied; the gate is closed.
        GateOpenedError: It may be partly applied; ``on_failure`` has opened the gate, or it was
            open by then.
    """
    if on_failure.quarantine and not config.quarantine:
        raise UsageError(
            f"{config.name} has no network device for a quarantine",
            hint="declare one: 'quarantine = true' below [[net]], or in the domain's metadata",
        )
    with _named(config, store):
        row = store.pending(config.name)
        if row is None:
            raise NothingPendingError(f"{config.name} has no change set to apply")
        changeset, layer = archive.load(store.changesets(config.name), row.changeset_id)
        archive.verify_layer(changeset, layer)
        spare = fallback.find(store, changeset) if on_conflict is OnConflict.STAGE else None
        refuse_other(changeset.fence, config.save, (disk.path for disk in config.disks))
        again = row.state is ChangesetState.APPLYING
        if not again:
            refuse_running(config)
        # A save file that is still in its place was never resumed (`Vm.retire_save`).
        asleep = not again or (config.save.exists() and not config.is_running())
        if asleep:
            check_fence(changeset.fence)
        own = store.vm_folder(config.name)
        sleep_id = changeset.instead_of or changeset.changeset_id  # by which a snapshot is known
        snapshots.sweep(own, "" if asleep else sleep_id)
        doing = changeset

        try:
            if asleep and keep_snapshots:
                with timeline.phase("snapshot"):
                    snapshots.take(config, sleep_id, changeset.fence, own)
                check_fence(changeset.fence)  # who started the VM meanwhile was copied half-way
            with _medium_folder(config, store) as folder:

                def fall_back(result: ApplierResult, found: tuple[Differing, ...]) -> Fallback:
                    nonlocal doing
                    assert spare is not None  # noqa: S101 - else nobody falls back
                    whole = Fallback(changeset, layer)
                    if conflicts.are_all(result, found):
                        chosen = _fewest(whole, spare, found, folder, store, timeline)
                    else:
                        chosen = spare
                    fallback.begin(store, changeset, chosen.changeset, found)
                    doing = chosen.changeset
                    return chosen

                report = reflect(
                    config,
                    changeset,
                    layer,
                    folder,
                    timeline,
                    on_state=lambda state: store.set_state(doing.changeset_id, state),
                    again=again,
                    on_failure=on_failure,
                    extent=extent,
                    on_retire=lambda: snapshots.keep_save(config, sleep_id, own),
                    fallback=spare,
                    on_fallback=fall_back,
                )
            report = fallback.told(store, report, doing)
        except OUassisterError as error:
            store.log(config.name, "resume", "failed", f"{error.code}: {error.message}")
            raise
        finally:
            snapshots.sweep(own, sleep_id if again else "")
            fallback.sweep(store, config.name)
        if not keep_snapshots:
            return report
        with timeline.phase("prune snapshots"):
            snapshots.prune(own, keep_snapshots)
        return replace(report, notes=(*report.notes, _told(sleep_id, own)))


def _fewest(
    whole: Fallback,
    spare: Fallback,
    found: tuple[Differing, ...],
    place: Path,
    store: Store,
    timeline: Timeline,
) -> Fallback:
    """Leave out as few packages as can be; all of them where less is not known to be right."""
    vm = whole.changeset.vm
    layer = place / archive.LAYER
    try:
        made = partial.make(
            partial.Stored(whole.changeset, whole.layer),
            partial.Stored(spare.changeset, spare.layer),
            found,
            layer,
        )
        refuse_too_large(vm, made.access, made.layer_size)
        return Fallback(made, archive.save(made, layer, store.changesets(vm)) / archive.LAYER)
    except InterruptedRunError:
        raise
    except (partial.WholeError, OUassisterError, OSError) as error:
        timeline.say(f"the guest installs all packages itself: {error}")
        return spare


def rollback(
    config: Vm,
    store: Store,
    timeline: Timeline,
    *,
    leave_diverged: bool = False,
    only_forget: bool = False,
) -> RollbackReport:
    """Take back, in the running VM, what the last resume reflected; or give that up for good.

    Raises:
        RollbackRefusedError: There is nothing to take back, or something is in the way.
        StateError: The VM does not run, or its agent does not answer.
        ApplyError: It failed and was undone; the gate is as it was.
        GateClosedError: It may be half done; the gate is closed.
    """
    with _named(config, store):
        row = store.last_applied(config.name)
        if row is None or row.state not in (ChangesetState.APPLIED, ChangesetState.ROLLING_BACK):
            state = "nothing was reflected" if row is None else f"the last update is {row.state}"
            raise RollbackRefusedError(f"{config.name} has nothing to take back: {state}")
        folder = store.changesets(config.name)
        if not (folder / row.changeset_id).exists():
            raise RollbackRefusedError(f"the change set {row.changeset_id} was discarded")
        changeset, _layer = archive.load(folder, row.changeset_id)
        with _medium_folder(config, store) as place:
            try:
                if only_forget:
                    return forget(config, changeset, place, timeline)
                return roll_back(
                    config,
                    changeset,
                    place,
                    timeline,
                    leave_diverged=leave_diverged,
                    again=row.state is ChangesetState.ROLLING_BACK,
                    on_state=lambda state: store.set_state(changeset.changeset_id, state),
                )
            except OUassisterError as error:
                store.log(config.name, "rollback", "failed", f"{error.code}: {error.message}")
                raise


def go_back(config: Vm, store: Store, timeline: Timeline, word: str) -> Snapshot:
    """Put a VM that does not run back to a snapshot: it sleeps as it did before that resume.

    Args:
        config: The VM.
        store: Has the record of its snapshots.
        timeline: Takes the story.
        word: The snapshot's id, or `snapshots.LAST`.

    Raises:
        RunningVMError: The VM runs.
        RollbackRefusedError: There is no such snapshot, or it is of other files.
        StaleError: The snapshot is not what it was.
    """
    with _named(config, store):
        own = store.vm_folder(config.name)
        snapshot = snapshots.find(own, word)
        if config.is_running():
            raise RunningVMError(
                f"{config.name} runs: what its disks hold now is lost when it goes back",
                hint="shut the guest down, or end the VM, and call this again",
            )
        with timeline.phase("go back to the snapshot"):
            snapshots.go_back(config, snapshot, own)
        for row in store.changeset_rows(config.name):  # newest first
            if row.state in _IN_THE_GUEST:
                store.set_state(row.changeset_id, ChangesetState.ROLLED_BACK)
            if row.changeset_id == snapshot.changeset_id:
                break
        return snapshot


def discard_snapshots(config: Vm, store: Store) -> tuple[str, ...]:
    """Drop the VM's snapshots; returns their ids.

    Raises:
        StaleError: The VM is half way back to one.
    """
    with _named(config, store):
        return snapshots.discard(store.vm_folder(config.name))


def _told(changeset_id: str, folder: Path) -> str:
    """What a resume that was to take a snapshot says of it."""
    if not snapshots.has(changeset_id, folder):
        return "no snapshot: an earlier resume had begun without one, and the guest has run since"
    (name,) = (
        one.snapshot_id for one in snapshots.known(folder) if one.changeset_id == changeset_id
    )
    return f"'ouassister rollback --snapshot {name}' goes back to the VM as it slept"


def discard(config: Vm, store: Store) -> tuple[str, ...]:
    """Drop the VM's change sets; returns the ids of what was dropped.

    Raises:
        StaleError: A change set is half applied; it must be resumed first.
    """
    with _named(config, store):
        rows = store.changeset_rows(config.name)
        if any(row.state is ChangesetState.ROLLING_BACK for row in rows):
            raise StaleError(
                f"{config.name} is half rolled back",
                hint="'ouassister rollback' takes up where it stopped",
            )
        if any(row.state is ChangesetState.APPLYING for row in rows):
            raise StaleError(
                f"{config.name} was resumed for a change set that is not finished",
                hint="'ouassister resume' takes up where it stopped",
            )
        dropped = []
        for row in rows:
            folder = store.changesets(config.name) / row.changeset_id
            if folder.exists():
                archive.discard(folder)
                dropped.append(row.changeset_id)
            if row.state in (ChangesetState.READY, ChangesetState.FALLBACK):
                store.set_state(row.changeset_id, ChangesetState.DISCARDED)
        return tuple(dropped)


@contextlib.contextmanager
def _medium_folder(config: Vm, store: Store) -> Iterator[Path]:
    """A private folder for the medium; those of runs that were killed go first."""
    place = config.medium_place() or store.vm_folder(config.name)
    prefix = f".ouassister-medium-{config.name}-"  # other VMs may have theirs here
    for stale in place.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _named(config: Vm, store: Store) -> Iterator[None]:
    """Lock the VM and know it by its name."""
    store.remember(config.name, str(config.source))
    with store.lock(config.name):
        yield
