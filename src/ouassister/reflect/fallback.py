"""What stands in for a change set that meets a conflict: its packages, installed by the guest.

`update` keeps it beside the change set when it is asked to; a resume under the policy `stage`
applies it in the same run, while the gate is closed. From then on it is the change set that is
being applied, and a resume that takes up an earlier one goes on with it.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.changeset import archive
from ouassister.errors import TamperedError, UsageError
from ouassister.model import Changeset, Differing, Mode, PackageMode
from ouassister.reflect import applier_protocol
from ouassister.store.database import ChangesetState
from ouassister.text import from_text, to_text

if TYPE_CHECKING:
    from ouassister.model import ResumeReport
    from ouassister.store.database import Store

_STEP: Final = "conflict"  # of a VM's history
_MOST_KEPT: Final = 20


class OnConflict(StrEnum):
    """What becomes of an update when paths of the guest are not as planned."""

    REFUSE = "refuse"  # nothing of it is done
    STAGE = "stage"  # the guest's own dpkg installs its packages


@dataclass(frozen=True, slots=True)
class Fallback:
    """A change set that may stand in for another one, and the path of its layer."""

    changeset: Changeset
    layer: Path


def find(store: Store, changeset: Changeset) -> Fallback | None:
    """What stands in for a change set; None where nothing of it could conflict.

    Raises:
        UsageError: The update kept nothing for that.
        TamperedError: It is not what was made.
    """
    emulated = {(one.name, one.architecture) for one in changeset.changes}
    emulated -= {(one.name, one.architecture) for one in changeset.staged}
    if changeset.instead_of or not emulated:
        return None
    folder = store.changesets(changeset.vm)
    for row in store.changeset_rows(changeset.vm):
        if row.state is not ChangesetState.FALLBACK:
            continue
        found, layer = archive.load(folder, row.changeset_id)
        if found.instead_of == changeset.changeset_id:
            archive.verify_layer(found, layer)
            return Fallback(found, layer)
    raise UsageError(
        f"the update of {changeset.vm} kept no archives that the guest could install instead",
        hint="'ouassister update --on-conflict stage' keeps them; or resume without that policy",
    )


def begin(
    store: Store, changeset: Changeset, chosen: Changeset, found: tuple[Differing, ...]
) -> None:
    """Record, durably, that the other one is being applied now, and why."""
    kept = [(to_text(one.path), one.reason) for one in found[:_MOST_KEPT]]
    store.log(changeset.vm, "resume", _STEP, json.dumps(kept))
    store.fall_back(changeset.vm, changeset.changeset_id, chosen.changeset_id)


def sweep(store: Store, vm: str) -> None:
    """Remove what can stand in for nothing any more: its change set was applied, or failed.

    So does what a run had made when it was killed, and had not recorded.
    """
    if store.pending(vm) is not None:
        return
    folder = store.changesets(vm)
    rows = store.changeset_rows(vm)
    for row in rows:
        if row.state is ChangesetState.FALLBACK:
            store.set_state(row.changeset_id, ChangesetState.DISCARDED)
            archive.discard(folder / row.changeset_id)
    for path in set(folder.iterdir()) - {folder / row.changeset_id for row in rows}:
        with contextlib.suppress(TamperedError):
            if archive.load(folder, path.name)[0].instead_of:
                archive.discard(path)


def told(store: Store, report: ResumeReport, changeset: Changeset) -> ResumeReport:
    """Complete the report of a change set that stood in for another one.

    Args:
        store: Has the other one, and what a resume that was taken up had met.
        report: Of the resume.
        changeset: The one that was applied.
    """
    if not changeset.instead_of:
        return report
    found = report.conflicts or _kept(store.last_detail(changeset.vm, _STEP))
    folder = store.changesets(changeset.vm)
    before, _layer = archive.load(folder, changeset.instead_of)
    planned = {(one.name, one.architecture) for one in before.staged}
    is_part = len(changeset.staged) < len(changeset.changes)
    all_of_them = f"paths conflicted: {applier_protocol.named(found)}"
    fell_back = tuple(
        PackageMode(
            one.name,
            one.architecture,
            Mode.STAGED,
            one.reason if is_part else all_of_them,
        )
        for one in changeset.staged
        if (one.name, one.architecture) not in planned
    )
    return replace(report, conflicts=found, fell_back=fell_back)


def _kept(detail: str) -> tuple[Differing, ...]:
    """Read what `begin` wrote; another version may have done so."""
    try:
        return tuple(Differing(from_text(path), str(why)) for path, why in json.loads(detail))
    except (ValueError, TypeError):
        return ()
