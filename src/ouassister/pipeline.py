"""The spine: each step takes a frozen record and returns the next.

open_sleeping  →  Sleeping          reads only
open_guest     →  Guest             a shadow over a private copy of the disk
apt            →  Plan, output      the guest's own tools, on the host
extract        →  Changeset         frozen, hashed
reflect        →  ResumeReport      the only step that a guest can feel
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.changeset import archive
from ouassister.changeset.extract import collect
from ouassister.errors import (
    NothingPendingError,
    OUassisterError,
    StaleError,
    WorkDiskFullError,
)
from ouassister.guest_shadow import EXTRACT, Guest, open_guest
from ouassister.guest_shadow import Options as Options
from ouassister.model import Changeset, Kind, LeftOut, Plan, Request, UpdateReport
from ouassister.packages import apt, update
from ouassister.provider import qemu
from ouassister.reflect.reflection import reflect
from ouassister.restart import plan as restart_plan
from ouassister.restart import uses as restart_uses
from ouassister.restart.actions import coalesce
from ouassister.shadow import sandbox
from ouassister.shadow.events import actions_of
from ouassister.shadow.syscalls.records import SYSCALLS, read_devices
from ouassister.sleeping import refuse_running
from ouassister.state.fence import check_fence
from ouassister.store.database import ChangesetState, Store
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ouassister.disk.layout import Layout
    from ouassister.model import ResumeReport
    from ouassister.provider.vmtoml import VmConfig
    from ouassister.restart.uses import ProcessUse
    from ouassister.timeline import Timeline

_REFRESH: Final = "refresh lists"
_FETCH: Final = "plan and download"


def plan(
    config: VmConfig, request: Request, store: Store, timeline: Timeline, options: Options
) -> Plan:
    """Say what an update would do; lists are fetched, nothing is changed.

    Raises:
        OUassisterError: See `open_sleeping`, `refuse_unsafe` and `Apt`.
    """
    apt.check_request(request)
    with _named(config, store), open_guest(config, store, timeline, options) as guest:
        tool = _apt(guest, timeline, options)
        left_out = _refresh(tool, timeline)
        with timeline.phase("plan"):
            simulated = tool.plan(request)
        guest.prove(timeline)
        made = update.make_plan(config.name, guest.sleeping.fence, request, simulated, left_out)
        store.add_plan(made)
        return made


def update_sleeping(
    config: VmConfig,
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
        stored = None if isinstance(wish, Request) else store.plan(config.name, wish)
        if stored is not None:
            check_fence(stored.fence)
        try:
            with open_guest(config, store, timeline, options) as guest:
                report = _update(guest, stored or wish, store, timeline, options)
        except OSError as error:
            if error.errno == 28:
                raise WorkDiskFullError(f"the work folder: {error}") from error
            raise
        offline_s = timeline.elapsed_s - report.download_s
        return replace(report, phases=timeline.phases, offline_s=round(offline_s, 4))


def _update(
    guest: Guest,
    wish: Plan | Request | str,
    store: Store,
    timeline: Timeline,
    options: Options,
) -> UpdateReport:
    with ThreadPoolExecutor(1) as beside:  # the save file is read while archives are fetched
        uses = beside.submit(restart_uses.read, guest.sleeping.config.save)
        return _update_with(guest, wish, store, timeline, options, uses.result)


def _update_with(
    guest: Guest,
    wish: Plan | Request | str,
    store: Store,
    timeline: Timeline,
    options: Options,
    read_uses: Callable[[], tuple[ProcessUse, ...]],
) -> UpdateReport:
    vm = guest.sleeping.config.name
    stored = wish if isinstance(wish, Plan) else None
    request = stored.request if stored is not None else wish
    assert isinstance(request, Request)  # noqa: S101 - the only other type of a wish
    tool = _apt(guest, timeline, options)
    left_out = _refresh(tool, timeline) if stored is None else ()
    with timeline.phase(_FETCH):
        simulated = tool.plan(request, fetch=True)
        if stored is not None:
            update.check_same(stored, simulated.changes)
        made = stored or update.make_plan(vm, guest.sleeping.fence, request, simulated, left_out)
        prepared = update.complete(tool, made)
    guest.prove(timeline)
    store.add_plan(prepared.plan)
    if not prepared.plan.changes:
        return _report(prepared.plan, None, timeline, _notes(guest))
    with timeline.phase("emulate"):
        tool.emulate(prepared.request)
    with timeline.phase("extract"):
        argument = {
            "trees": _trees(guest.sleeping.layout),
            "layer": f"{sandbox.WORK}/output/layer.tar",
            "record": f"{sandbox.WORK}/output/record.json",
            "devices": list(read_devices(guest.shadow.output_path(SYSCALLS)).items()),
        }
        summary = guest.shadow.call(EXTRACT, "run", argument)
        extraction = collect(summary, guest.shadow.output_path("record.json"))
    check_fence(guest.sleeping.fence)
    with timeline.phase("plan restarts"):
        due = restart_plan.make_plan(
            read_uses,
            extraction.entries,
            guest.sleeping.view.uts.release,
            guest.sleeping.layout,
            guest.shadow,
        )
    actions, recorded_notes = actions_of(guest.shadow.events())
    with timeline.phase("store change set"):
        changeset = archive.build(
            extraction,
            vm=vm,
            created_at_s=int(time.time()),
            fence=guest.sleeping.fence,
            identity=guest.identity(),
            changes=prepared.plan.changes,
            left_out=prepared.plan.left_out,
            actions=coalesce(actions, due.restarts),
            lock_paths=apt.LOCKS,
            reboot_needed=bool(due.kernel),
            notes=(*_notes(guest), *recorded_notes, *due.notes),
            restarts=due.restarts,
        )
        layer = guest.shadow.output_path("layer.tar")
        archive.save(changeset, layer, store.changesets(vm))
        store.add_changeset(vm, changeset.changeset_id)
    return _report(prepared.plan, changeset, timeline, changeset.notes)


def _notes(guest: Guest) -> tuple[str, ...]:
    """What is to be told of any run."""
    refused = (f"a program wanted to fetch from {line}" for line in guest.shadow.refused_hosts())
    return (*guest.sleeping.layout.notes, *refused)


def _apt(guest: Guest, timeline: Timeline, options: Options) -> apt.Apt:
    mirrors = guest.sleeping.config.local_mirrors
    return apt.Apt(guest.shadow, timeline.say, options.timeout_s, mirrors)


def _refresh(tool: apt.Apt, timeline: Timeline) -> tuple[LeftOut, ...]:
    with timeline.phase(_REFRESH):
        unreachable = tool.refresh()
    reason = "this repository could not be read; its packages are as of the last time it could"
    return tuple(LeftOut(where, reason) for where in unreachable)


def _trees(layout: Layout) -> list[dict[str, object]]:
    """What the extraction compares: the volumes that can be written to."""
    return [
        {
            "upper": sandbox.upper(number),
            "lower": sandbox.lower(number),
            "image": sandbox.export(number) if volume.is_ext else None,
            "places": [
                (to_text(place.root), to_text(place.target))
                for place in layout.places
                if place.volume == number
            ],
        }
        for number, volume in enumerate(layout.volumes)
        if volume.fstype != "vfat"
    ]


def run_program(
    config: VmConfig,
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
        status = guest.shadow.run(
            argv, package_cache=False, timeout_s=options.timeout_s, output=output
        )
        return status, guest.shadow.output_path("program").read_bytes() if capture else b""


def resume(config: VmConfig, store: Store, timeline: Timeline) -> ResumeReport:
    """Resume the VM with its links down, apply the pending change set, open the gate.

    Raises:
        NothingPendingError: There is no change set.
        StaleError: It was made for another suspension, or is not what was made.
        ApplyError: The guest is as it was suspended, and runs; the gate is closed.
        GateClosedError: It may be partly applied; the gate is closed.
    """
    with _named(config, store):
        row = store.pending(config.name)
        if row is None:
            raise NothingPendingError(f"{config.name} has no change set to apply")
        changeset, layer = archive.load(store.changesets(config.name), row.changeset_id)
        archive.verify_layer(changeset, layer)
        again = row.state is ChangesetState.APPLYING
        if not again:
            refuse_running(config)
        # A save file that is still in its place was never resumed (`reflection.retire_save`).
        if not again or (config.save.exists() and not qemu.is_running(config)):
            check_fence(changeset.fence)
        with tempfile.TemporaryDirectory(prefix="medium-", dir=store.vm_folder(config.name)) as tmp:
            try:
                return reflect(
                    config,
                    changeset,
                    layer,
                    Path(tmp),
                    timeline,
                    on_state=lambda state: store.set_state(changeset.changeset_id, state),
                    again=again,
                )
            except OUassisterError as error:
                store.log(config.name, "resume", "failed", f"{error.code}: {error.message}")
                raise


def discard(config: VmConfig, store: Store) -> tuple[str, ...]:
    """Drop the VM's change sets; returns the ids of what was dropped.

    Raises:
        StaleError: A change set is half applied; it must be resumed first.
    """
    with _named(config, store):
        rows = store.changeset_rows(config.name)
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
            if row.state is ChangesetState.READY:
                store.set_state(row.changeset_id, ChangesetState.DISCARDED)
        return tuple(dropped)


@contextlib.contextmanager
def _named(config: VmConfig, store: Store) -> Iterator[None]:
    """Lock the VM and know it by its name."""
    store.remember(config.name, str(config.source))
    with store.lock(config.name):
        yield


def _report(
    made: Plan, changeset: Changeset | None, timeline: Timeline, notes: tuple[str, ...]
) -> UpdateReport:
    download_s = timeline.seconds(_REFRESH, _FETCH)
    entries = changeset.entries if changeset is not None else ()
    deletions = sum(entry.kind is Kind.DELETE for entry in entries)
    return UpdateReport(
        vm=made.vm,
        plan_id=made.plan_id,
        changeset_id=changeset.changeset_id if changeset is not None else "",
        changes=made.changes,
        left_out=made.left_out,
        files=len(entries) - deletions,
        deletions=deletions,
        layer_bytes=changeset.layer_size if changeset is not None else 0,
        actions=changeset.actions if changeset is not None else (),
        filtered=changeset.filtered if changeset is not None else (),
        reboot_needed=changeset.reboot_needed if changeset is not None else False,
        restarts=changeset.restarts if changeset is not None else (),
        notes=notes,
        phases=timeline.phases,
        offline_s=0.0,
        download_s=round(download_s, 4),
    )
