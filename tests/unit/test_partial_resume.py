"""A resume that leaves out the package which conflicts; the guest is played."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from tests.unit.played_guest import KilledError, PlayedGuest, PlayedVm
from tests.unit.test_partial_cut import World

from ouassister import pipeline
from ouassister.changeset import archive
from ouassister.errors import (
    ConflictError,
    GateClosedError,
    InternalError,
    InterruptedRunError,
)
from ouassister.model import Differing
from ouassister.partial import make
from ouassister.pipeline import OnConflict
from ouassister.reflect import conflicts, fallback, reflection
from ouassister.reflect.applier_protocol import ApplierResult, Outcome
from ouassister.state.fence import fence
from ouassister.store.database import Store
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ouassister.model import ResumeReport
    from ouassister.provider.interface import Vm

WHY = "it changed since the guest was suspended"
PATH = Differing(b"/usr/bin/app", WHY)
NOBODYS = Differing(b"/etc/ld.so.cache", WHY)


class Resume:
    """A sleeping VM with a stored update, and its resume."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.store = store
        self.vm = PlayedVm(folder, PlayedGuest())
        self.vm.save.write_bytes(b"memory")
        self.world = World(folder, fence=fence(self.vm.save, ()))
        store.remember("web1", "vm.toml")
        for one in (self.world.whole, self.world.spare):
            archive.save(one.changeset, one.layer, store.changesets("web1"))
        self.whole_id = self.world.whole.changeset.changeset_id
        self.spare_id = self.world.spare.changeset.changeset_id
        store.add_changeset("web1", self.whole_id, self.spare_id)

    def __call__(self, on_conflict: OnConflict = OnConflict.STAGE) -> ResumeReport:
        vm = cast("Vm", self.vm)
        return pipeline.resume(vm, self.store, Timeline(), on_conflict=on_conflict)

    def states(self) -> dict[str, str]:
        """State of each change set: the whole, what stands in for all, and the rest."""
        names = {self.whole_id: "whole", self.spare_id: "spare"}
        rows = self.store.changeset_rows("web1")
        return {names.get(row.changeset_id, "rest"): str(row.state) for row in rows}

    def layers(self) -> set[str]:
        """What is kept of them."""
        kept = {path.name for path in self.store.changesets("web1").iterdir()}
        names = {self.whole_id: "whole", self.spare_id: "spare"}
        return {names.get(name, "rest") for name in kept}


@pytest.fixture
def resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Resume]:
    for name in ("APPLIER", "STUB"):
        program = tmp_path / name
        program.write_bytes(b"program")
        monkeypatch.setattr(reflection, name, program)
    with Store(tmp_path / "home") as store:
        yield Resume(tmp_path, store)


def test_package_that_conflicts_is_left_out_and_the_rest_applied(resume: Resume) -> None:
    guest = resume.vm.guest
    guest.conflicts = (PATH,)
    report = resume()
    assert resume.states() == {"whole": "failed", "spare": "discarded", "rest": "applied"}
    assert resume.layers() == {"whole", "rest"}
    assert [one.name for one in report.fell_back] == ["app"]
    assert report.fell_back[0].reason == f"paths of app conflicted: /usr/bin/app: {WHY}"
    assert [one.name for one in report.staged] == ["app"]
    assert report.conflicts == (PATH,)
    assert "every replaced or deleted path was as planned" in report.verified
    assert guest.applied == [f"oua-{resume.whole_id[:16]}", f"oua-{report.changeset_id[:16]}"]
    assert (guest.installed, guest.up, guest.medium) == (1, True, "")
    # Its manifest is what was applied, and it is found again.
    made, layer = archive.load(resume.store.changesets("web1"), report.changeset_id)
    archive.verify_layer(made, layer)
    assert made.instead_of == resume.whole_id


@pytest.mark.parametrize("place", ["detach 1", "attach 1", "applied 2", "dpkg", "open"])
def test_host_that_dies_is_followed_by_one_that_goes_on(resume: Resume, place: str) -> None:
    resume.vm.guest.conflicts = (PATH,)
    resume.vm.guest.killed_at = place
    with pytest.raises(KilledError):
        resume()
    assert resume.states() == {"whole": "failed", "spare": "fallback", "rest": "applying"}
    report = resume(OnConflict.REFUSE)
    assert resume.states() == {"whole": "failed", "spare": "discarded", "rest": "applied"}
    assert [one.name for one in report.fell_back] == ["app"]
    assert report.conflicts == (PATH,)
    assert resume.vm.guest.up


@pytest.mark.parametrize(
    ("error", "states"),
    [
        (InternalError("a defect"), {"whole": "failed", "spare": "applying"}),
        (OSError(28, "No space left on device"), {"whole": "failed", "spare": "applying"}),
        (InterruptedRunError("ended by SIGTERM"), {"whole": "applying", "spare": "fallback"}),
    ],
)
def test_rest_that_cannot_be_made_leaves_all_out_but_a_signal_ends_the_run(
    resume: Resume,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    states: dict[str, str],
) -> None:
    def fails(*_arguments: object) -> None:
        raise error

    resume.vm.guest.conflicts = (PATH,)
    resume.vm.guest.dpkg = "code 1"  # its answer for four packages is not played
    monkeypatch.setattr(make, "make", fails)
    with pytest.raises(GateClosedError):
        resume()
    assert resume.states() == states
    assert resume.vm.guest.installed == (0 if states["spare"] == "fallback" else 1)
    assert not resume.vm.guest.up


def test_what_was_made_and_not_recorded_is_removed(
    resume: Resume, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_arguments: object) -> None:
        raise KilledError

    resume.vm.guest.conflicts = (PATH,)
    with monkeypatch.context() as patch:
        patch.setattr(fallback, "begin", dies)
        with pytest.raises(KilledError):
            resume()
    assert resume.layers() == {"whole", "spare", "rest"}
    assert resume.states() == {"whole": "applying", "spare": "fallback"}
    with pytest.raises(ConflictError):
        resume(OnConflict.REFUSE)
    assert resume.layers() == {"whole"}


def test_conflict_of_nobody_leaves_all_out(resume: Resume) -> None:
    resume.vm.guest.conflicts = (PATH, NOBODYS)
    resume.vm.guest.dpkg = "code 1"  # its answer for four packages is not played
    with pytest.raises(GateClosedError, match="staged packages are not installed"):
        resume()
    assert resume.states() == {"whole": "failed", "spare": "applying"}
    assert resume.layers() == {"whole", "spare"}


def test_conflicts_that_are_not_all_told_leave_all_out() -> None:
    def result(reason: str, outcome: Outcome = Outcome.REFUSED) -> ApplierResult:
        return ApplierResult(outcome, "conflict", b"/a", reason, 0, 0, (), 0.0)

    two = (PATH, NOBODYS)
    assert conflicts.are_all(result(WHY), (PATH,))
    assert conflicts.are_all(result(f"{WHY}; 2 paths are not as expected"), two)
    assert not conflicts.are_all(result(f"{WHY}; 3 paths are not as expected"), two)
    assert not conflicts.are_all(result(WHY), two)
    assert not conflicts.are_all(result(WHY, Outcome.UNDONE), (PATH,))
