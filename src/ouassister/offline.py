"""The offline update itself: lists, plan, archives, the run of the updater, the change set.

It works in a shadow that is open (`ouassister.guest_shadow`).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from ouassister.changeset import archive
from ouassister.changeset.extract import collect
from ouassister.guest_shadow import EXTRACT
from ouassister.model import Changeset, Kind, LeftOut, Plan, Request, UpdateReport
from ouassister.packages import apt, update
from ouassister.restart import plan as restart_plan
from ouassister.restart import uses as restart_uses
from ouassister.restart.actions import coalesce
from ouassister.shadow import sandbox
from ouassister.shadow.events import actions_of
from ouassister.shadow.syscalls.records import SYSCALLS, read_devices
from ouassister.state.fence import check_fence
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.disk.layout import Layout
    from ouassister.guest_shadow import Guest, Options
    from ouassister.restart.uses import ProcessUse
    from ouassister.store.database import Store
    from ouassister.timeline import Timeline

_REFRESH: Final = "refresh lists"
_FETCH: Final = "plan and download"


def run(
    guest: Guest, wish: Plan | Request, store: Store, timeline: Timeline, options: Options
) -> UpdateReport:
    """Update a guest whose shadow is open.

    Args:
        guest: The guest.
        wish: A request, or a plan that was stored.
        store: Where plan and change set go.
        timeline: Takes the story.
        options: How to go about it.

    Raises:
        OUassisterError: Nothing of the VM was written, whichever error it is.
    """
    with ThreadPoolExecutor(1) as beside:  # the save file is read while archives are fetched
        uses = beside.submit(restart_uses.read, guest.sleeping.config.save)
        return _update_with(guest, wish, store, timeline, options, uses.result)


def _update_with(
    guest: Guest,
    wish: Plan | Request,
    store: Store,
    timeline: Timeline,
    options: Options,
    read_uses: Callable[[], tuple[ProcessUse, ...]],
) -> UpdateReport:
    vm = guest.sleeping.config.name
    stored = wish if isinstance(wish, Plan) else None
    request = wish.request if isinstance(wish, Plan) else wish
    tool = apt_of(guest, timeline, options)
    left_out = refresh(tool, timeline) if stored is None else ()
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


def apt_of(guest: Guest, timeline: Timeline, options: Options) -> apt.Apt:
    """The guest's apt, with the story as its progress."""
    mirrors = guest.sleeping.config.local_mirrors
    return apt.Apt(guest.shadow, timeline.say, options.timeout_s, mirrors)


def refresh(tool: apt.Apt, timeline: Timeline) -> tuple[LeftOut, ...]:
    """Fetch the package lists; what could not be fetched is named."""
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
