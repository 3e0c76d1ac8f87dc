"""A change set that meets a conflict, and the one that stands in for it; the guest is played.

A real guest does the same in tests/vm/test_conflict.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pytest
from tests.unit.played_guest import KilledError, PlayedGuest, PlayedVm

from ouassister import pipeline
from ouassister.changeset import archive
from ouassister.changeset.extract import Extraction
from ouassister.cli import resume_verb
from ouassister.errors import (
    ConflictError,
    GateClosedError,
    StaleError,
    TamperedError,
    UsageError,
)
from ouassister.model import (
    Changeset,
    Differing,
    Entry,
    Identity,
    Kind,
    PackageChange,
    Staged,
    StagedStep,
    StepKind,
)
from ouassister.pipeline import OnConflict
from ouassister.reflect import conflicts, fallback, reflection
from ouassister.reflect.applier_protocol import ApplierResult, Outcome
from ouassister.state.fence import fence
from ouassister.store.database import ChangesetState, Store
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ouassister.model import ResumeReport
    from ouassister.provider.interface import Vm

FOLDER = b"/var/cache/ouassister/0123456789abcdef"
DEB = b"archive"
LAYER = bytes(512) + DEB + bytes(505)
APP = PackageChange("app", "amd64", "1.0", "2.0")
LIBRARY = PackageChange("libfoo", "amd64", "", "2.0")
WHY = "it changed since the guest was suspended"
CONF = Differing(b"/etc/app.conf", WHY)
STATUS = Differing(b"/var/lib/dpkg/status", WHY)


@dataclass
class World:
    """A sleeping VM with a stored update."""

    store: Store
    vm: PlayedVm
    changeset: Changeset
    spare: Changeset

    @property
    def guest(self) -> PlayedGuest:
        return self.vm.guest

    def resume(self, on_conflict: OnConflict = OnConflict.STAGE) -> ResumeReport:
        return pipeline.resume(cast("Vm", self.vm), self.store, Timeline(), on_conflict=on_conflict)

    def states(self) -> tuple[str, str]:
        """Of the change set, and of the one that stands in for it."""
        found = {row.changeset_id: str(row.state) for row in self.store.changeset_rows("web1")}
        return found[self.changeset.changeset_id], found[self.spare.changeset_id]

    def serial(self, changeset: Changeset) -> str:
        return f"oua-{changeset.changeset_id[:16]}"

    def folder(self, changeset: Changeset) -> Path:
        return self.store.changesets("web1") / changeset.changeset_id


def made(save: Path, *, staged: tuple[PackageChange, ...], instead_of: str = "") -> Changeset:
    digest = hashlib.sha256(DEB).hexdigest()
    packages = tuple(
        Staged(
            one.name, one.architecture, one.old, one.new, f"{one.name}_2.0_amd64.deb", len(DEB),
            digest, False, "why",
        )
        for one in staged
    )  # fmt: skip
    entries = [
        Entry(
            FOLDER + b"/" + one.file.encode(), Kind.FILE, None, mode=0o600, size=len(DEB),
            sha256=digest, offset=512,
        )
        for one in packages
    ]  # fmt: skip
    if not instead_of:
        entries.insert(
            0, Entry(b"/etc/app.conf", Kind.FILE, None, size=7, sha256=digest, offset=512)
        )
    entries.sort(key=lambda entry: entry.path.split(b"/"))
    layer = hashlib.sha256(LAYER).hexdigest()
    return archive.build(
        Extraction(tuple(entries), (), (), 0, layer, len(LAYER)),
        vm="web1",
        created_at_s=1,
        fence=fence(save, ()),
        identity=Identity("boot", "machine"),
        changes=(APP, LIBRARY),
        left_out=(),
        actions=(),
        lock_paths=(b"/var/lib/dpkg/lock",),
        reboot_needed=False,
        staged=packages,
        staged_steps=(StagedStep(StepKind.INSTALL, tuple(range(len(packages)))),) if staged else (),
        staging_folder=FOLDER if staged else b"",
        instead_of=instead_of,
    )


def make_world(tmp_path: Path, store: Store, *, staged: tuple[PackageChange, ...] = ()) -> World:
    vm = PlayedVm(tmp_path, PlayedGuest())
    vm.save.write_bytes(b"memory")
    layer = tmp_path / "layer"
    layer.write_bytes(LAYER)
    changeset = made(vm.save, staged=staged)
    spare = made(vm.save, staged=(APP, LIBRARY), instead_of=changeset.changeset_id)
    store.remember("web1", "vm.toml")
    for one in (changeset, spare):
        archive.save(one, layer, store.changesets("web1"))
    store.add_changeset("web1", changeset.changeset_id, spare.changeset_id)
    return World(store, vm, changeset, spare)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name in ("APPLIER", "STUB"):
        program = tmp_path / name
        program.write_bytes(b"program")
        monkeypatch.setattr(reflection, name, program)
    with Store(tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def world(tmp_path: Path, store: Store) -> World:
    return make_world(tmp_path, store)


def test_conflict_is_refused_by_default_and_names_the_paths(world: World) -> None:
    world.guest.conflicts = (CONF, Differing(b"/usr/bin/app", "it is gone from the guest"))
    with pytest.raises(ConflictError) as caught:
        world.resume(OnConflict.REFUSE)
    error = caught.value
    assert (error.exit_status, error.code, error.impact) == (21, "conflict", "untouched")
    assert f"/etc/app.conf: {WHY}; /usr/bin/app: it is gone from the guest" in error.message
    assert error.paths == (
        ("/etc/app.conf", WHY),
        ("/usr/bin/app", "it is gone from the guest"),
    )
    assert "--on-conflict stage" in error.hint
    assert world.states() == ("failed", "discarded")
    assert not world.guest.up
    assert world.guest.applied == [world.serial(world.changeset)]
    assert not world.folder(world.spare).exists()


def test_conflict_falls_back_to_the_guests_own_dpkg_and_is_reported(world: World) -> None:
    world.guest.conflicts = (CONF,)
    report = world.resume()
    assert world.guest.applied == [world.serial(world.changeset), world.serial(world.spare)]
    assert (world.guest.installed, world.guest.up, world.guest.medium) == (1, True, "")
    assert world.states() == ("failed", "applied")
    assert report.changeset_id == world.spare.changeset_id
    assert report.conflicts == (CONF,)
    assert [(one.name, str(one.mode)) for one in report.fell_back] == [
        ("app", "staged"),
        ("libfoo", "staged"),
    ]
    assert report.fell_back[0].reason == f"paths conflicted: /etc/app.conf: {WHY}"
    assert [one.status for one in report.staged] == ["installed", "installed"]
    assert "every replaced or deleted path was as planned" not in report.verified
    assert "version and state of every staged package" in report.verified
    # A rollback would be of what the guest did itself.
    last = world.store.last_applied("web1")
    assert last is not None
    assert last.changeset_id == world.spare.changeset_id


def test_report_for_a_person_names_paths_and_packages(world: World) -> None:
    world.guest.conflicts = (Differing(b"/etc/\x1b.conf", WHY),) * 21
    lines = resume_verb.lines(world.resume())
    assert lines.count(f"  conflict: /etc/\\x1b.conf: {WHY}") == 20
    assert "  … and 1 more conflicts" in lines
    assert "  so the guest itself installed what was emulated: app, libfoo" in lines


def test_without_a_conflict_what_was_kept_for_one_goes(world: World) -> None:
    report = world.resume()
    assert report.changeset_id == world.changeset.changeset_id
    assert (report.conflicts, report.fell_back, report.staged) == ((), (), ())
    assert world.states() == ("applied", "discarded")
    assert not world.folder(world.spare).exists()
    assert world.folder(world.changeset).exists()


def test_what_was_staged_before_did_not_fall_back(tmp_path: Path, store: Store) -> None:
    world = make_world(tmp_path, store, staged=(LIBRARY,))
    world.guest.conflicts = (CONF,)
    report = world.resume()
    assert [one.name for one in report.fell_back] == ["app"]
    assert [one.name for one in report.staged] == ["app", "libfoo"]


def test_conflict_of_the_package_database_is_refused_whatever_the_policy(world: World) -> None:
    world.guest.conflicts = (STATUS, CONF)
    with pytest.raises(ConflictError, match="/var/lib/dpkg/status"):
        world.resume()
    assert world.states() == ("failed", "discarded")
    assert (world.guest.installed, world.guest.up) == (0, False)


def test_update_that_kept_nothing_is_told_before_the_vm_is_woken(
    tmp_path: Path, store: Store
) -> None:
    world = make_world(tmp_path, store)
    store.set_state(world.spare.changeset_id, ChangesetState.DISCARDED)
    with pytest.raises(UsageError, match="kept no archives") as caught:
        world.resume()
    assert "update --on-conflict stage" in caught.value.hint
    assert (world.vm.restored, world.states()[0]) == (0, "ready")
    assert world.resume(OnConflict.REFUSE).result == "applied"


def test_archives_that_are_not_what_was_kept_are_told_before_the_vm_is_woken(world: World) -> None:
    layer = world.folder(world.spare) / archive.LAYER
    layer.chmod(0o600)
    layer.write_bytes(LAYER[:-1] + b"x")
    with pytest.raises(TamperedError, match=r"layer\.tar has the SHA-256"):
        world.resume()
    assert (world.vm.restored, world.states()) == (0, ("ready", "fallback"))


def test_another_updates_archives_do_not_serve(tmp_path: Path, store: Store) -> None:
    world = make_world(tmp_path, store)
    other = dataclasses.replace(world.changeset, created_at_s=2)
    assert fallback.find(store, world.changeset) is not None
    with pytest.raises(UsageError, match="kept no archives"):
        fallback.find(store, dataclasses.replace(other, changeset_id="0" * 64))


def test_update_of_staged_packages_alone_needs_nothing_kept(tmp_path: Path, store: Store) -> None:
    world = make_world(tmp_path, store, staged=(APP, LIBRARY))
    store.set_state(world.spare.changeset_id, ChangesetState.DISCARDED)
    assert world.resume().result == "applied"


@pytest.mark.parametrize(
    "place", ["applied 1", "detach 1", "attach 1", "applied 2", "dpkg", "open"]
)
def test_resume_killed_at_any_moment_is_taken_up(world: World, place: str) -> None:
    world.guest.conflicts = (CONF,)
    world.guest.killed_at = place
    with pytest.raises(KilledError):
        world.resume()
    assert not world.guest.up
    assert not world.vm.save.exists()
    begun = place != "applied 1"
    assert world.states() == (("failed", "applying") if begun else ("applying", "fallback"))
    with pytest.raises(StaleError, match="not finished"):
        pipeline.discard(cast("Vm", world.vm), world.store)
    # What was begun goes on, whatever the policy says now.
    report = world.resume(OnConflict.REFUSE if begun else OnConflict.STAGE)
    assert world.states() == ("failed", "applied")
    assert report.conflicts == (CONF,)
    assert [one.name for one in report.fell_back] == ["app", "libfoo"]
    assert (world.guest.up, world.guest.medium, world.vm.restored) == (True, "", 1)


def test_resume_killed_before_it_fell_back_may_be_refused_instead(world: World) -> None:
    world.guest.conflicts = (CONF,)
    world.guest.killed_at = "applied 1"
    with pytest.raises(KilledError):
        world.resume()
    with pytest.raises(ConflictError):
        world.resume(OnConflict.REFUSE)
    assert world.states() == ("failed", "discarded")


def test_dpkg_that_fails_leaves_the_gate_closed_and_is_tried_again(world: World) -> None:
    world.guest.conflicts = (CONF,)
    world.guest.dpkg = "code 1"
    for _ in range(2):
        with pytest.raises(GateClosedError, match="staged packages are not installed"):
            world.resume()
        assert (world.states(), world.guest.up) == (("failed", "applying"), False)
    world.guest.dpkg = "code 0"
    assert world.resume().result == "already-applied"
    assert world.guest.up


def test_discard_drops_what_was_kept(world: World) -> None:
    dropped = pipeline.discard(cast("Vm", world.vm), world.store)
    assert set(dropped) == {world.changeset.changeset_id, world.spare.changeset_id}
    assert world.states() == ("discarded", "discarded")
    assert not world.folder(world.spare).exists()


def test_newer_update_supersedes_both(world: World) -> None:
    world.store.add_changeset("web1", "f" * 64)
    assert world.states() == ("discarded", "discarded")


def _told(outcome: Outcome, code: str, path: bytes = b"/a") -> ApplierResult:
    return ApplierResult(outcome, code, path, "why", 0, 0, (), 0.0)


@pytest.mark.parametrize(
    ("result", "found", "may"),
    [
        (_told(Outcome.REFUSED, "conflict"), (), True),
        (_told(Outcome.UNDONE, "conflict"), (), True),
        (_told(Outcome.NEEDS_PERSON, "conflict"), (), False),
        (_told(Outcome.REFUSED, "identity"), (), False),
        (_told(Outcome.REFUSED, "space"), (), False),
        (_told(Outcome.UNDONE, "verify"), (), False),
        (_told(Outcome.APPLIED, ""), (), False),
        # Of more conflicts than are told, the database's is the one that the result names.
        (_told(Outcome.REFUSED, "conflict", STATUS.path), (CONF,), False),
        (_told(Outcome.REFUSED, "conflict", CONF.path), (CONF, STATUS), False),
        (_told(Outcome.REFUSED, "conflict", b"/var/lib"), (), False),
        (_told(Outcome.REFUSED, "conflict", b"/var/lib/dpkg"), (), False),
        (_told(Outcome.REFUSED, "conflict", b"/var/lib/dpkg-not"), (), True),
        (_told(Outcome.REFUSED, "conflict", b"/var/lib/apt/extended_states"), (), False),
    ],
)
def test_only_a_conflict_outside_the_package_database_falls_back(
    result: ApplierResult, found: tuple[Differing, ...], *, may: bool
) -> None:
    assert conflicts.may_fall_back(result, found) is may


def test_change_that_the_applier_undid_falls_back_too(world: World) -> None:
    world.guest.conflicts = (CONF,)
    world.guest.outcome = "undone"
    assert world.resume().conflicts == (CONF,)
    assert world.states() == ("failed", "applied")
