"""A guest that rewrites a file of a package as it wakes up, before the applier has looked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tests.vm.world import with_capture

from ouassister import pipeline
from ouassister.changeset import archive
from ouassister.demo.frames import count_frames
from ouassister.errors import ConflictError
from ouassister.model import Kind
from ouassister.partial import status
from ouassister.pipeline import OnConflict
from ouassister.provider import qemu
from ouassister.provider.qemu import RunningVM
from ouassister.reflect import reflection
from ouassister.store.database import Store
from ouassister.testing import guest_run
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vm.world import World

    from ouassister.model import ResumeReport

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

PATH = "/usr/bin/oua-hello"
WISH = ("--install", "oua-hello", "--install", "oua-extra")
NEW = {"oua-hello": "2.0", "oua-library": "1.0", "oua-extra": "1.0"}
# What a script of oua-service writes: it belongs to no package.
NOBODYS = "/usr/share/oua-service.release"
KNOCK = ["/bin/bash", "-c", "echo knock >/dev/udp/10.0.2.2/9"]
VERSIONS = "dpkg-query -W -f '${Package} ${Version} ${db:Status-Abbrev}\\n' 'oua-*'"


class KilledError(BaseException):
    """The host's side dies here."""


def _out(vm: RunningVM, script: str) -> str:
    return guest_run(vm, script, timeout_s=120).stdout.decode().strip()


def _writes_as_it_wakes_up(path: str, patch: pytest.MonkeyPatch) -> None:
    """What a service does that keeps its state in a file of a package; and it sends a frame."""
    cont = RunningVM.cont

    def continued(self: RunningVM) -> None:
        cont(self)
        script = f"echo '# woken' >>{path}; echo knock >/dev/udp/10.0.2.2/9 || true"
        guest_run(self, ["/bin/bash", "-c", script], timeout_s=120)

    patch.setattr(RunningVM, "cont", continued)


def _resume(world: World, on_conflict: OnConflict) -> ResumeReport:
    with Store(world.home) as store:
        return pipeline.resume(world.config, store, Timeline(print), on_conflict=on_conflict)


def _is_updated(world: World, new: dict[str, str]) -> None:
    """As in a guest that was updated awake: versions, package database, every file."""
    with qemu.attach(world.config) as vm:
        lines = [line.split() for line in _out(vm, VERSIONS).splitlines()]
        assert {name: (v, s) for name, v, s in lines if name in new} == {
            name: (version, "ii") for name, version in new.items()
        }
        assert _out(vm, "dpkg --audit") == ""
        assert _out(vm, f"dpkg --verify {' '.join(new)}") == "??5?????? c /etc/oua-hello.conf"
        assert _out(vm, "cat /etc/oua-hello.conf") == "setting=admin"
        assert _out(vm, "oua-hello; oua-extra") == "two\nextra"
        assert _out(vm, "test ! -e /usr/share/oua-hello/gone && echo gone") == "gone"
        assert _out(vm, "readlink /usr/share/oua-hello/becomes-link") == "new"
        left = "ls -d /var/cache/ouassister /run/ouassister-*.sh /var/lib/ouassister/journal"
        assert _out(vm, f"{left} 2>/dev/null; true") == ""
        assert json.loads(_out(vm, "cat /var/lib/ouassister/attestation.json"))["result"] == (
            "verified"
        )


def _is_as_emulated(world: World, changeset_id: str) -> None:
    """Every file of the whole update, and every stanza of its package database."""
    with Store(world.home) as store:
        changeset, layer = archive.load(store.changesets(world.config.name), changeset_id)
    files = {
        entry.path.decode(): entry
        for entry in changeset.entries
        if entry.kind is Kind.FILE and entry.path != status.OLD_PATH
    }
    database = files.pop(status.PATH.decode())
    raw = layer.read_bytes()[database.offset :][: database.size]
    with qemu.attach(world.config) as vm:
        sums = _out(vm, f"sha256sum {' '.join(files)}").splitlines()
        found = guest_run(vm, f"cat {status.PATH.decode()}").stdout
    assert len(files) > 10
    assert {line.split()[1]: line.split()[0] for line in sums} == {
        path: entry.sha256 for path, entry in files.items()
    }
    assert {one.text for one in status.parse(found)} == {one.text for one in status.parse(raw)}


def _frames(world: World, capture: Path, patch: pytest.MonkeyPatch) -> list[int]:
    """What the guest has sent whenever its links are opened."""
    frames: list[int] = []
    set_links = RunningVM.set_links

    def counted(self: RunningVM, *, up: bool) -> None:
        if up:
            frames.append(count_frames(capture))
        set_links(self, up=up)

    patch.setattr(RunningVM, "set_links", counted)
    return frames


def test_conflict_costs_its_package_behind_the_closed_gate(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = with_capture(world)
    before = world.hashes()
    update = world.run("update", *WISH, "--on-conflict", "stage")
    assert update.status == 0, update
    assert {one["mode"] for one in update.result["modes"]} == {"emulated"}
    assert update.result["fallback_bytes"] > 0
    assert world.hashes() == before
    with monkeypatch.context() as patch:
        _writes_as_it_wakes_up(PATH, patch)
        frames = _frames(world, capture, patch)
        report = _resume(world, OnConflict.STAGE)
    assert frames == [0]
    assert [(one.path, one.reason) for one in report.conflicts] == [
        (PATH.encode(), "it changed since the guest was suspended")
    ]
    # The others are reflected as they were emulated.
    (fell_back,) = report.fell_back
    assert fell_back.name == "oua-hello"
    assert fell_back.reason.startswith(f"paths of oua-hello conflicted: {PATH}")
    assert [(one.name, one.version, one.status) for one in report.staged] == [
        ("oua-hello", "2.0", "installed")
    ]
    assert report.failed_actions == ()
    assert "version and state of every staged package" in report.verified
    _is_updated(world, NEW)
    _is_as_emulated(world, update.result["changeset_id"])
    refused = world.run("rollback")
    assert (refused.status, refused.code) == (20, "rollback-refused")


def test_conflict_of_nobody_costs_all_and_a_host_that_dies_meanwhile_is_followed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = {**NEW, "oua-service": "1.0"}
    capture = with_capture(world)
    update = world.run("update", *WISH, "--install", "oua-service", "--on-conflict", "stage")
    assert update.status == 0, update

    def dies(*_arguments: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        _writes_as_it_wakes_up(NOBODYS, patch)
        patch.setattr(reflection, "_change_medium", dies)
        with pytest.raises(KilledError):
            _resume(world, OnConflict.STAGE)
    with qemu.attach(world.config) as vm:
        assert "oua-extra" not in _out(vm, VERSIONS)
        guest_run(vm, KNOCK, check=False)
    assert count_frames(capture) == 0
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    assert [one["path"] for one in resumed.result["conflicts"]] == [NOBODYS]
    assert {one["name"] for one in resumed.result["fell_back"]} == new.keys()
    assert all(NOBODYS in one["reason"] for one in resumed.result["fell_back"])
    assert "every replaced or deleted path was as planned" not in resumed.result["verified"]
    assert {one["status"] for one in resumed.result["staged"]} == {"installed"}
    _is_updated(world, new)


def test_conflict_refuses_all_by_default(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = with_capture(world)
    update = world.run("update", *WISH)
    assert update.status == 0, update
    early = world.run("resume", "--on-conflict", "stage")
    assert (early.status, early.code) == (2, "usage")
    assert not qemu.is_running(world.config)
    with monkeypatch.context() as patch:
        _writes_as_it_wakes_up(PATH, patch)
        with pytest.raises(ConflictError) as caught:
            _resume(world, OnConflict.REFUSE)
    assert caught.value.paths == ((PATH, "it changed since the guest was suspended"),)
    assert count_frames(capture) == 0
    with qemu.attach(world.config) as vm:
        versions = {line.split()[0]: line.split()[1] for line in _out(vm, VERSIONS).splitlines()}
        assert versions["oua-hello"] == "1.0"
        assert "oua-extra" not in versions
        assert _out(vm, f"tail -n1 {PATH}") == "# woken"
