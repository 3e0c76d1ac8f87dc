"""Make, on the host, the change set of what is left when some packages are left out.

Its database is put together from the stanzas of the new and the old one, and must be as consistent
as those are; the archives of what was left out come from the change set that stands in for all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.changeset import archive
from ouassister.changeset.extract import Extraction
from ouassister.changeset.layer import LayerWriter
from ouassister.errors import TamperedError
from ouassister.model import Changeset, Kind, Staged, StagedStep
from ouassister.partial import relations, status
from ouassister.partial.cut import Cut, cut
from ouassister.partial.cut import WholeError as WholeError
from ouassister.restart import run_files
from ouassister.restart.actions import coalesce
from ouassister.shadow.events import Event, Outcome, actions_of
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Collection

    from ouassister.model import Action, Differing, Entry, Restart
    from ouassister.partial.status import Package
    from ouassister.partial_model import Portions

_MAX_STATUS: Final = 64 << 20
_MOST_ROUNDS: Final = 20
_NAMED: Final = 4


@dataclass(frozen=True, slots=True)
class Stored:
    """A change set, verified, and the path of its layer."""

    changeset: Changeset
    layer: Path


def make(whole: Stored, spare: Stored, found: Collection[Differing], layer: Path) -> Changeset:
    """Leave out the packages whose paths conflict.

    Args:
        whole: What met the conflicts.
        spare: What stands in for all of it, with the record of what belongs to whom.
        found: The paths that conflict; all of them.
        layer: Where the layer will be.

    Raises:
        WholeError: No less than all can be left out.
    """
    portions = spare.changeset.portions
    if portions is None:
        raise WholeError("nothing is known of what belongs to which package")
    if len({one.name for one in whole.changeset.changes}) != len(whole.changeset.changes):
        raise WholeError("a package changes for more than one architecture")
    try:
        database = _Database(whole, portions)
        paths = [one.path for one in found]
        chosen = cut(whole.changeset, portions, paths, database.needed)
        merged = database.without(chosen.left_out)
    except status.StatusError as error:
        raise WholeError(str(error)) from error
    staged = _staged(whole.changeset, spare.changeset, chosen, _reason(chosen, found))
    entries, digest, size = _write(whole, spare, chosen, staged, merged, database.entry, layer)
    actions = _actions(whole.changeset, spare.changeset, portions, chosen)
    base = whole.changeset
    reach = {*base.out_of_reach, *spare.changeset.out_of_reach}
    return archive.build(
        Extraction(entries, base.filtered, (), 0, digest, size),
        vm=base.vm,
        created_at_s=base.created_at_s,
        fence=base.fence,
        identity=base.identity,
        changes=base.changes,
        left_out=base.left_out,
        actions=actions,
        lock_paths=base.lock_paths,
        reboot_needed=base.reboot_needed or spare.changeset.reboot_needed,
        notes=base.notes,
        restarts=_restarts(whole.changeset, spare.changeset),
        staged=staged,
        staged_steps=_steps(spare.changeset, staged),
        staging_folder=spare.changeset.staging_folder,
        access=base.access,
        out_of_reach=tuple(sorted(reach)),
        instead_of=base.changeset_id,
    )


class _Database:
    """The package database of the whole, and of what would be left of it."""

    def __init__(self, whole: Stored, portions: Portions) -> None:
        entries = [one for one in whole.changeset.entries if one.path == status.PATH]
        if not entries or entries[0].kind is not Kind.FILE or entries[0].same:
            raise WholeError("the change set has no package database")
        self.entry: Entry = entries[0]
        self._new = status.parse(_content(whole.layer, self.entry))
        self._old = {one.package: one.text for one in portions.stanzas}
        everything = status.without(self._new, self._old)
        # What does not hold before or after the whole update is not of our making.
        self._known = relations.broken(self._new) | relations.broken(everything)
        self._asked = 0

    def needed(self, left_out: frozenset[str]) -> frozenset[str]:
        """Packages that must be left out, too: their relations, or those to them, do not hold."""
        self._asked += 1
        if self._asked > _MOST_ROUNDS:
            raise WholeError("what depends on what does not end")
        more: set[str] = set()
        for one in relations.broken(self._packages(left_out)) - self._known:
            if one.package not in left_out:
                more.add(one.package)
            else:  # it is what it was, and does not bear what another one is now
                more.update(relations.names(one.words) & self._old.keys() - left_out)
        return frozenset(more)

    def without(self, left_out: frozenset[str]) -> bytes:
        """The database as text.

        Raises:
            WholeError: It is not consistent.
        """
        packages = self._packages(left_out)
        if broken := relations.broken(packages) - self._known:
            words = "; ".join(sorted(f"{one.package} {one.field} {one.words}" for one in broken))
            raise WholeError(f"the package database would not be consistent: {words[:300]}")
        unsettled = {one.name for one in packages if not one.is_settled}
        if unsettled - {one.name for one in self._new if not one.is_settled}:
            raise WholeError(f"{', '.join(sorted(unsettled)[:4])} was not settled before")
        return status.dump(packages)

    def _packages(self, left_out: frozenset[str]) -> tuple[Package, ...]:
        try:
            return status.without(self._new, {name: self._old[name] for name in left_out})
        except KeyError as error:
            raise WholeError(f"nothing is known of what {error.args[0]} was") from error


def _reason(chosen: Cut, found: Collection[Differing]) -> str:
    words = "; ".join(f"{to_text(one.path)}: {one.reason}" for one in list(found)[:_NAMED])
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"paths of {', '.join(sorted(chosen.owners))} conflicted: {words}{more}"


def _staged(whole: Changeset, spare: Changeset, chosen: Cut, reason: str) -> tuple[Staged, ...]:
    """What was staged before and what is left out now, in the order of the one for all."""
    before = {one.name: one for one in whole.staged}
    staged = []
    for one in spare.staged:
        if one.name in before:
            staged.append(before[one.name])
        elif one.name in chosen.owners:
            staged.append(replace(one, reason=reason))
        elif one.name in chosen.left_out:
            staged.append(replace(one, reason=f"it goes with what conflicted: {reason}"))
    return tuple(staged)


def _steps(spare: Changeset, staged: tuple[Staged, ...]) -> tuple[StagedStep, ...]:
    """The steps of some of the packages, by their new numbers."""
    numbers = {one.name: at for at, one in enumerate(staged)}
    steps = []
    for step in spare.staged_steps:
        names = [spare.staged[at].name for at in step.packages]
        if kept := tuple(numbers[name] for name in names if name in numbers):
            steps.append(StagedStep(step.kind, kept))
    return tuple(steps)


def _actions(
    whole: Changeset, spare: Changeset, portions: Portions, chosen: Cut
) -> tuple[Action, ...]:
    """What scripts asked for, but for those of packages that are left out; and the restarts.

    What they made in memory has no owner, and stays as it was emulated.
    """
    made = filter(run_files.is_made, whole.actions)
    calls = (
        Event(Outcome.DEFERRED, one.words, one.package)
        for one in portions.calls
        if one.package not in chosen.left_out
    )
    again = frozenset(one.unit for one in spare.restarts)
    return coalesce((*made, *actions_of(calls)[0]), _restarts(whole, spare), again)


def _restarts(whole: Changeset, spare: Changeset) -> tuple[Restart, ...]:
    known = {one.unit for one in whole.restarts}
    return (*whole.restarts, *(one for one in spare.restarts if one.unit not in known))


def _write(
    whole: Stored,
    spare: Stored,
    chosen: Cut,
    staged: tuple[Staged, ...],
    merged: bytes,
    database: Entry,
    layer: Path,
) -> tuple[tuple[Entry, ...], str, int]:
    """Write the layer: entries that stay, archives, and the database."""
    files = {one.file for one in staged if one.file}
    folder = spare.changeset.staging_folder
    archives = [
        entry
        for entry in spare.changeset.entries
        if entry.kind is not Kind.FILE or entry.path.rpartition(b"/")[2].decode() in files
    ]
    if any(not entry.path.startswith(folder.rpartition(b"/")[0]) for entry in archives):
        raise WholeError("what stands in for all has more than archives")
    new = replace(database, size=len(merged), sha256=hashlib.sha256(merged).hexdigest(), holes=0)
    todo: list[tuple[Entry, Path | None]] = [(entry, whole.layer) for entry in chosen.entries]
    todo += [(entry, spare.layer) for entry in archives]
    todo += [(new, None)]
    todo.sort(key=lambda one: one[0].path.split(b"/"))
    written = []
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(LayerWriter(layer))
        files_of = {
            one.layer: stack.enter_context(one.layer.open("rb")).fileno() for one in (whole, spare)
        }
        made = stack.enter_context(tempfile.TemporaryFile())
        made.write(merged)
        made.flush()
        for entry, source in todo:
            if entry.same:
                written.append(entry)
                continue
            if entry.kind is not Kind.FILE:
                written.append(writer.add(entry))
                continue
            place = (made.fileno(), 0) if source is None else (files_of[source], entry.offset)
            added = writer.add(entry, *place)
            if added.sha256 != entry.sha256:
                raise TamperedError(f"{to_text(entry.path)} is not what the change set says")
            written.append(added)
        digest, size = writer.finish()
    return tuple(written), digest, size


def _content(layer: Path, entry: Entry) -> bytes:
    if entry.size > _MAX_STATUS:
        raise WholeError("the package database is larger than any")
    with layer.open("rb") as file:
        return os.pread(file.fileno(), entry.size, entry.offset)
