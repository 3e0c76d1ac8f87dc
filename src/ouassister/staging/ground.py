"""The loop's ground: one open shadow, the guest's apt in it, and what memory tells."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ouassister.errors import NoSolutionError, OUassisterError, RepositoryError, UpdaterError
from ouassister.guest_shadow import KEEP, MADE
from ouassister.model import Request
from ouassister.packages import update
from ouassister.packages.apt_steps import steps_for
from ouassister.packages.owners import owners
from ouassister.restart import run_files
from ouassister.shadow import labels, sandbox
from ouassister.shadow.events import actions_of
from ouassister.shadow.syscalls.records import SYSCALLS, read_devices
from ouassister.shadow.tmpfs_handover import read_places
from ouassister.staging import carry, held, judge
from ouassister.staging.land import land
from ouassister.text import from_text, to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ouassister.changeset.extract import Extraction
    from ouassister.changeset.landing import Landing
    from ouassister.disk.layout import Layout
    from ouassister.guest_shadow import Guest
    from ouassister.model import Action, PackageChange, Staged, StagedStep
    from ouassister.packages.apt import Apt, Ran
    from ouassister.packages.apt_status import Work
    from ouassister.packages.update import Prepared
    from ouassister.restart.uses import ProcessUse
    from ouassister.shadow.events import Event
    from ouassister.staging.held import Running
    from ouassister.staging.judge import Reasons
    from ouassister.timeline import Timeline

_NS: Final = 1_000_000_000

Changes = tuple["PackageChange", ...]


class RealGround:
    """See `ouassister.staging.settle.Ground`.

    Args:
        guest: With nothing emulated yet.
        tool: Its apt, which planned and fetched.
        prepared: What it planned.
        timeline: Takes the story.
        running: Waits for what memory tells of processes.
        landing: Where layers go.
    """

    def __init__(
        self,
        guest: Guest,
        tool: Apt,
        prepared: Prepared,
        timeline: Timeline,
        running: Callable[[], Running],
        landing: Landing,
    ) -> None:
        self.landing = landing
        self._guest = guest
        self._tool = tool
        self._prepared = prepared
        self._timeline = timeline
        self._running = running
        self._archives("keep")
        self.folder = carry.folder_of(prepared.plan.plan_id)
        self.staged: tuple[Staged, ...] = ()
        self.steps: tuple[StagedStep, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.earlier: tuple[str, ...] = ()  # notes on what is done over: what it tried stays told
        self.works: tuple[Work, ...] = ()  # of the last run
        self.extraction: Extraction
        self.made: tuple[Action, ...] = ()  # what scripts made in memory, made again
        self.made_notes: tuple[str, ...] = ()
        self._staged_changes: set[PackageChange] = set()
        self._automatic: frozenset[str] = frozenset()  # asked for by us alone
        self._since_ns = 0  # when the updater was started
        self._names: frozenset[str] = frozenset()  # in /run, before

    def uses(self) -> tuple[ProcessUse, ...]:
        """What processes run."""
        return self._running().uses

    @property
    def left(self) -> tuple[str, ...]:
        """Notes on what was not told, or does not travel."""
        return (*self.notes, *self.made_notes)

    def out_of_reach(self) -> frozenset[str]:
        """Units that nobody on a network reaches; none where that cannot be told."""
        try:
            return self._running().out_of_reach
        except OUassisterError:  # `uses` meets it, too, and is told of
            return frozenset()

    def emulate(self, request: Request) -> Ran:
        """Run the guest's updater."""
        with self._timeline.phase("emulate"):
            self._names = self._names_in_run()
            self._since_ns = time.time_ns()
            ran = self._tool.emulate(request, sorted(self._automatic))
        self.works = ran.works
        return ran

    def events(self) -> Iterable[Event]:
        """What it recorded."""
        return self._guest.shadow.events()

    def extract(self, staged: Mapping[PackageChange, str]) -> Extraction:
        """What changed, the archives of staged packages included; its layer has landed."""
        shadow = self._guest.shadow
        with self._timeline.phase("extract"):
            # Who is at fault is not known by now: later rounds call for the archives again.
            self._describe(staged)
            carry.put(shadow, self.staged, self.folder)
            argument = {
                "trees": _trees(self._guest.sleeping.layout),
                "devices": list(read_devices(shadow.output_path(SYSCALLS)).items()),
            }
            making = self._begin_made()
            self.extraction = land(shadow, argument, self.landing)
            self._finish_made(making)
            if self._guest.sleeping.labelled:
                entries = labels.label(shadow, self.extraction.entries)
                self.extraction = replace(self.extraction, entries=entries)
            carry.check(self.staged, self.folder, self.extraction.entries)
        return self.extraction

    def _begin_made(self) -> int | None:
        """Ask what programs made in /run; None where none ran, or it is not the guest's."""
        self.made, self.made_notes = (), ()
        if not self._since_ns:
            return None
        run = self._run_in_memory()
        if run is None:
            return None
        more = {
            "since_ns": self._since_ns,
            "where": "/run",
            "rules": _rules(self._guest.sleeping.layout),
        }
        return self._guest.shadow.begin(MADE, "list_made", {**run, **more})

    def _run_in_memory(self) -> dict[str, object] | None:
        """Where the guest's /run is in the sandbox, and what there is another's."""
        for place in read_places(self._guest.folder / "shadow" / "tmpfs") or ():
            if (place.target, place.root) == (run_files.RUN, b"/"):
                return {
                    "folder": f"{sandbox.TMPFS}/{place.number}",
                    "apart": run_files.APART,
                }
        return None

    def _names_in_run(self) -> frozenset[str]:
        run = self._run_in_memory()
        return frozenset(self._guest.shadow.call(MADE, "names", run) if run else ())

    def _finish_made(self, call: int | None) -> None:
        if call is None:
            return
        nodes = self._guest.shadow.finish(call)
        contents = self._guest.sleeping.view.tmpfs_content or ()
        before = next((one.tmpfs.nodes for one in contents if one.tmpfs.target == b"/run"), ())
        names = self._names_in_run()
        # More than is looked at, now or before: what is gone cannot be told.
        gone = map(from_text, self._names - names if names else ())
        self.made, self.made_notes = run_files.actions_for(nodes, before, self.events(), gone)

    def held(self, extraction: Extraction, ran: Ran, names: frozenset[str]) -> Reasons:
        """Packages that wrote what sleeping processes, or the kernel, hold."""
        policies: Reasons = {}
        if self._guest.sleeping.labelled:
            policies = judge.policies(extraction.entries, ran.works, names)
        return policies | self._held_open(extraction, ran, names)

    def _held_open(self, extraction: Extraction, ran: Ran, names: frozenset[str]) -> Reasons:
        try:
            running = self._running()
        except OUassisterError as error:
            self.notes = (f"who holds files open cannot be told: {error.message}",)
            return {}
        self.notes = running.unknown
        files = held.written(running.held, extraction.entries)
        if not files:
            return {}
        asked = [path for file in files for path in (file.path, *file.known_by)]
        wrote_s = {entry.path: entry.mtime_ns // _NS for entry in extraction.entries}
        return judge.holders(files, owners(self._guest.shadow, asked), wrote_s, ran.works, names)

    def plan_without(
        self, staged: tuple[PackageChange, ...], request: Request
    ) -> tuple[Request, tuple[PackageChange, ...]]:
        """What is left of a request when some more packages stay as they are, and its plan."""
        with self._timeline.phase("plan without staged packages"):
            self._tool.stage(staged)
            self._staged_changes.update(staged)
            names = {change.name for change in self._staged_changes}
            kept = tuple(word for word in request.install if carry.name_of(word) not in names)
            left, after = self._plan_rest(Request(kept), empty=bool(request.install and not kept))
            return self._with_the_others(left, after) if request.install else (left, after)

    def _plan_rest(self, left: Request, *, empty: bool) -> tuple[Request, Changes]:
        """What apt plans of what is left of a request; what it cannot install is dropped."""
        if empty:
            return left, ()
        try:
            return left, self._tool.plan(left, again=True).changes
        except (UpdaterError, RepositoryError):  # one of them needs what is staged
            if not left.install:
                raise
            left, _dropped = update.still_possible(self._tool, left)
            if not left.install:
                return left, ()
            return left, self._tool.plan(left, again=True).changes

    def _with_the_others(self, left: Request, after: Changes) -> tuple[Request, Changes]:
        """Ask by name for what apt had planned for a staged package alone, and marked so.

        Most of a staged package's new dependencies can be emulated as any other; only what needs
        it cannot.
        """
        plan = [one for one in self._prepared.plan.changes if one not in self._staged_changes]
        others = [one for one in plan if one.new and one not in after]
        while others:
            wanted = Request((*left.install, *(_word(one) for one in others)))
            try:
                changes = self._tool.plan(wanted, again=True).changes
            except NoSolutionError as error:
                fewer = [one for one in others if one.name not in error.broken]
                if len(fewer) == len(others):
                    break  # nobody knows which of them it is
                others = fewer
                continue
            except (UpdaterError, RepositoryError):
                break
            if not set(after) <= set(changes) <= set(plan):
                break
            asked = {carry.name_of(word) for word in self._prepared.request.install}
            mine = {one.name for one in others} - asked
            old = {one.name for one in others if one.old and one.name in mine}
            new = mine - old
            self._automatic = frozenset(new | (self._tool.automatic(old) if old else set()))
            return wanted, changes
        self._automatic = frozenset()
        return left, after

    def start_over(self) -> None:
        """Forget what programs wrote and recorded."""
        with self._timeline.phase("start over"):
            self.earlier += actions_of(self.events())[1]
            self._since_ns = 0
            self._guest.start_over()
            self._archives("restore")
            for archive in self._tool.lacking(self._prepared.plan.archives):
                raise UpdaterError(f"a script changed the archive {archive.file_name}")

    def _describe(self, staged: Mapping[PackageChange, str]) -> None:
        if not staged:
            return
        plan = self._prepared.plan
        folder = self._guest.shadow.spec.cache / "apt" / "archives"
        self._archives("restore")
        self.staged = carry.staged(staged, plan.archives, plan.request, folder)
        numbers = {(one.name, one.architecture): at for at, one in enumerate(self.staged)}
        self.steps = steps_for(self._prepared.order, numbers)

    def _archives(self, function: str) -> None:
        """Keep archives, or restore them; see `ouassister.shadow.keep`."""
        names = [archive.file_name for archive in self._prepared.plan.archives]
        for name in self._guest.shadow.call(KEEP, function, names):
            raise UpdaterError(f"the archive {to_text(str(name).encode())} is gone")


def _word(change: PackageChange) -> str:
    """What asks apt for this version."""
    where = "" if change.architecture in ("all", "") else f":{change.architecture}"
    return f"{change.name}{where}={change.new}"


def _rules(layout: Layout) -> list[dict[str, str]]:
    """Where rules of tmpfiles.d(5) lie in the updated trees."""
    found = []
    for path in run_files.RULES:
        volume, inside = layout.locate(path)
        found.append({"root": sandbox.merged(volume), "path": to_text(inside)})
    return found


def _trees(layout: Layout) -> list[dict[str, object]]:
    """What the extraction compares: the volumes that can be written to."""
    return [
        {
            "upper": sandbox.upper(number),
            "lower": sandbox.lower(number),
            "places": [
                (to_text(place.root), to_text(place.target))
                for place in layout.places
                if place.volume == number
            ],
        }
        for number, volume in enumerate(layout.volumes)
        if volume.fstype != "vfat"
    ]
