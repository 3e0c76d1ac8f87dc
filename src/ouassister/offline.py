"""The offline update itself: lists, plan, archives, the run of the updater, the change set.

It works in a shadow that is open (`ouassister.guest_shadow`).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ouassister.changeset import archive
from ouassister.changeset.landing import Landing
from ouassister.model import (
    Changeset,
    Kind,
    LeftOut,
    Mode,
    PackageMode,
    Plan,
    Request,
    UpdateReport,
)
from ouassister.packages import apt, update
from ouassister.packages.owners import files_of, lists_of, owners, status_of
from ouassister.partial.attribute import portions_of
from ouassister.reaching.choose import choose, refuse_too_large, remarks
from ouassister.restart import plan as restart_plan
from ouassister.restart import reach
from ouassister.restart.actions import coalesce
from ouassister.shadow.events import actions_of, deferred
from ouassister.staging import held, predict
from ouassister.staging.ground import RealGround
from ouassister.staging.settle import settle
from ouassister.state.fence import check_fence

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.access import Access
    from ouassister.changeset.extract import Extraction
    from ouassister.guest_shadow import Guest, Options
    from ouassister.model import PackageChange, Portions
    from ouassister.packages.update import Prepared
    from ouassister.staging.held import Running
    from ouassister.store.database import Store
    from ouassister.timeline import Timeline

_REFRESH: Final = "refresh lists"
_FETCH: Final = "plan and download"
CHOOSE: Final = "choose channel"
_STORE: Final = "store change set"
_CONFLICT: Final = "the update was to be put in place, and paths of the guest had changed"


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
    sleeping = guest.sleeping
    with timeline.phase(CHOOSE):
        access = choose(guest)

    def look() -> Running:
        return held.running(sleeping.memory.look(sleeping.view, held.SUBJECTS))

    with (
        ThreadPoolExecutor(1) as beside,  # memory is read while archives are fetched
        Landing(store.changesets(sleeping.config.name)) as landing,
    ):
        running = beside.submit(look)
        return _update_with(guest, wish, access, store, timeline, options, running.result, landing)


def _update_with(
    guest: Guest,
    wish: Plan | Request,
    access: Access,
    store: Store,
    timeline: Timeline,
    options: Options,
    running: Callable[[], Running],
    landing: Landing,
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
        made = stored or update.make_plan(
            vm,
            guest.sleeping.fence,
            request,
            simulated,
            left_out,
            channel=access.channel,
            notes=remarks(guest, access),
        )
        prepared = update.complete(tool, made, simulated.output)
    guest.prove(timeline)
    store.add_plan(prepared.plan)
    if not prepared.plan.changes:
        return _report(prepared.plan, None, timeline, _notes(guest))
    guest.know()
    ground = RealGround(guest, tool, prepared, timeline, running, landing)
    settled = settle(
        ground,
        prepared.plan.changes,
        prepared.request,
        staging=options.staging,
        tell=timeline.say,
    )
    changeset, spare = _keep(
        guest,
        prepared,
        access,
        ground,
        settled.staged,
        store,
        timeline,
        fallback=options.fallback,
    )
    for change, reason in settled.staged.items():
        store.log(vm, "update", predict.STAGED, predict.remember(change, reason))
    modes = tuple(
        PackageMode(change.name, change.architecture, Mode.STAGED, settled.staged[change])
        if change in settled.staged
        else PackageMode(change.name, change.architecture, Mode.EMULATED)
        for change in prepared.plan.changes
    )
    return replace(
        _report(prepared.plan, changeset, timeline, changeset.notes),
        modes=modes,
        fallback_id=spare.changeset_id if spare else "",
        fallback_bytes=spare.layer_size if spare else 0,
    )


def _keep(
    guest: Guest,
    prepared: Prepared,
    access: Access,
    ground: RealGround,
    staged: dict[PackageChange, str],
    store: Store,
    timeline: Timeline,
    *,
    fallback: bool,
) -> tuple[Changeset, Changeset | None]:
    """Make a change set of what was settled, and store it.

    Returns:
        It, and with ``fallback`` the one that may stand in for it, where that is another.
    """
    vm = prepared.plan.vm
    changeset = _make(guest, prepared, access, ground, ground.extraction, staged, timeline)
    with timeline.phase(_STORE):
        kept = archive.keep(changeset, ground.landing)
    spare = None
    if fallback and not staged.keys() >= set(prepared.plan.changes):
        try:
            spare = _make_fallback(guest, prepared, access, ground, staged, changeset, timeline)
            with timeline.phase(_STORE):
                archive.keep(spare, ground.landing)
        except BaseException:
            archive.discard(kept)
            raise
    guest.settle()
    store.add_changeset(vm, changeset.changeset_id, spare.changeset_id if spare else "")
    return changeset, spare


def _make_fallback(
    guest: Guest,
    prepared: Prepared,
    access: Access,
    ground: RealGround,
    staged: dict[PackageChange, str],
    changeset: Changeset,
    timeline: Timeline,
) -> Changeset:
    """Make what stands in for a change set: the same packages, all of them staged."""
    all_of_them = {change: staged.get(change, _CONFLICT) for change in prepared.plan.changes}
    names = [change.name for change in prepared.plan.changes]
    new = lists_of(guest.shadow, names)
    calls = deferred(guest.shadow.events())
    ground.start_over()
    old = lists_of(guest.shadow, names)
    portions = portions_of(
        changeset.entries,
        {name: old[name] | new[name] for name in names},
        ground.works,
        status_of(guest.shadow),
        calls,
    )
    extraction = ground.extract(all_of_them)
    return _make(
        guest,
        prepared,
        access,
        ground,
        extraction,
        all_of_them,
        timeline,
        instead_of=changeset.changeset_id,
        portions=portions,
    )


def _make(
    guest: Guest,
    prepared: Prepared,
    access: Access,
    ground: RealGround,
    extraction: Extraction,
    staged: dict[PackageChange, str],
    timeline: Timeline,
    *,
    instead_of: str = "",
    portions: Portions | None = None,
) -> Changeset:
    """Make a change set of what was extracted; the shadow has it."""
    vm = prepared.plan.vm
    check_fence(guest.sleeping.fence)
    refuse_too_large(vm, access, extraction.layer_size)
    with timeline.phase("plan restarts"):
        due = restart_plan.make_plan(
            ground.uses,
            extraction.entries,
            guest.sleeping.view.uts.release,
            guest.sleeping.layout,
            guest.shadow,
            restart_plan.Staged(
                files_of(guest.shadow, (change.name for change in staged if change.old)),
                tuple(change.name for change in staged if change.new),
            ),
        )
    recorded, recorded_notes = actions_of(guest.shadow.events())
    actions = coalesce((*ground.made, *recorded), due.restarts, due.again)
    tried = () if instead_of else ground.earlier
    told = (*_notes(guest), *remarks(guest, access))
    notes = (*told, *tried, *recorded_notes, *due.notes, *ground.left)
    return archive.build(
        extraction,
        vm=vm,
        created_at_s=int(time.time()),
        fence=guest.sleeping.fence,
        identity=guest.identity(),
        changes=prepared.plan.changes,
        left_out=prepared.plan.left_out,
        actions=actions,
        lock_paths=apt.LOCKS,
        reboot_needed=bool(due.kernel),
        notes=tuple(dict.fromkeys(notes)),
        restarts=due.restarts,
        staged=ground.staged,
        staged_steps=ground.steps,
        staging_folder=ground.folder if ground.staged else b"",
        access=access,
        out_of_reach=reach.of_actions(actions, ground.out_of_reach()),
        instead_of=instead_of,
        portions=portions,
    )


def _notes(guest: Guest) -> tuple[str, ...]:
    """What is to be told of any run."""
    refused = (f"a program wanted to fetch from {line}" for line in guest.shadow.refused_hosts())
    return (*guest.notes(), *refused)


def apt_of(guest: Guest, timeline: Timeline, options: Options) -> apt.Apt:
    """The guest's apt, with the story as its progress."""
    mirrors = guest.sleeping.config.local_mirrors
    return apt.Apt(guest.shadow, timeline.say, options.timeout_s, mirrors, options.script_timeout_s)


def refresh(tool: apt.Apt, timeline: Timeline) -> tuple[LeftOut, ...]:
    """Fetch the package lists; what could not be fetched is named."""
    with timeline.phase(_REFRESH):
        unreachable = tool.refresh()
    reason = "this repository could not be read; its packages are as of the last time it could"
    return tuple(LeftOut(where, reason) for where in unreachable)


def predicted(
    guest: Guest, changes: tuple[PackageChange, ...], store: Store
) -> tuple[PackageMode, ...]:
    """Guess what of a plan will be staged; a guest that does not tell is told of no guess."""
    before = predict.recall(store.details(predict.STAGED))
    files: tuple[held.HeldFile, ...] = ()
    if changes:
        view = guest.sleeping.memory.look(guest.sleeping.view, held.SUBJECTS)
        files = predict.suspects(held.of_view(view))
    programs = owners(guest.shadow, (path for file in files for path in file.known_by))
    return predict.predict(changes, files, programs, before)


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
        channel=changeset.access.channel if changeset is not None else made.channel,
    )
