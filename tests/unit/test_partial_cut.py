"""Which packages are left out when paths conflict, and what stays."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

import pytest
from tests.unit.test_partial_status import database, stanza

from ouassister.changeset import archive
from ouassister.changeset.extract import Extraction
from ouassister.changeset.layer import LayerWriter
from ouassister.errors import TamperedError
from ouassister.model import (
    Action,
    Differing,
    Entry,
    Expected,
    Fence,
    FileStamp,
    Identity,
    Kind,
    PackageChange,
    Staged,
    StagedStep,
    StepKind,
)
from ouassister.packages.apt_status import Work
from ouassister.partial import status
from ouassister.partial.attribute import portions_of
from ouassister.partial.cut import WholeError
from ouassister.partial.make import Stored, make
from ouassister.shadow.events import Event, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ouassister.model import Changeset
    from ouassister.partial_model import Portions

FENCE = Fence(FileStamp("save", 1, 2, 3, 4, 5, ""), ())
STATE = Expected(12, 0o100644, 3, -5, 7)
FOLDER = b"/var/cache/ouassister/0123456789abcdef"
MADE = Action(("install", "-d", "-m", "0755", "-o", "0", "-g", "0", "/run/app"))
WHY = "it changed since the guest was suspended"
APP = PackageChange("app", "amd64", "1.0", "2.0")
LIB = PackageChange("lib", "amd64", "1.0", "2.0")
TOOL = PackageChange("tool", "all", "", "2.0")
USER = PackageChange("user", "amd64", "1.0", "2.0")
CHANGES = (LIB, APP, TOOL, USER)
LISTS = {
    "lib": {b"/usr/lib/lib.so", b"/usr/share/doc/lib", b"/usr/share/both"},
    "app": {b"/usr/bin/app", b"/usr/share/app", b"/usr/share/app/data", b"/etc/app.conf"},
    "tool": {b"/usr/bin/tool", b"/usr/share/both"},
    "user": {b"/usr/bin/user"},
}
OLD = (stanza("app"), stanza("base"), stanza("lib"), stanza("user", "1.0", "Depends: lib"))
NEW = (
    stanza("app", "2.0"),
    stanza("base"),
    stanza("lib", "2.0"),
    stanza("tool", "2.0"),
    stanza("user", "2.0", "Depends: lib (>= 2.0)"),
)
WORKS = (Work("lib", 100), Work("app", 110), Work("tool", 120), Work("libc-bin", 130))
CALLS = (
    Event(Outcome.DEFERRED, ("systemctl", "start", "app.service"), "app"),
    Event(Outcome.DEFERRED, ("systemctl", "restart", "lib.service"), "lib"),
)


def file(path: bytes, **more: object) -> Entry:
    entry = Entry(path, Kind.FILE, STATE, mode=0o644, mtime_ns=5, size=3)
    return dataclasses.replace(entry, **more)  # type: ignore[arg-type]


ENTRIES = (
    file(b"/etc/app.conf.dpkg-dist", expected=None),
    file(b"/etc/ld.so.cache", mtime_ns=115 * 10**9),
    file(b"/usr/bin/app"),
    file(b"/usr/bin/tool", expected=None),
    file(b"/usr/bin/user", same=True, expected=STATE),
    file(b"/usr/lib/lib.so"),
    Entry(b"/usr/share/app", Kind.DELETE, STATE, below=((b"/usr/share/app/data", STATE),)),
    Entry(b"/usr/share/both", Kind.DIRECTORY, None, mode=0o755),
    file(b"/var/lib/app/made", expected=None, mtime_ns=112 * 10**9),
    file(b"/var/lib/dpkg/info/app.list"),
    file(b"/var/lib/dpkg/info/lib:amd64.list"),
    file(b"/var/lib/dpkg/info/tool.list", expected=None),
    file(b"/var/lib/dpkg/status"),
    file(b"/var/lib/dpkg/status-old"),
)


NEW_FOLDER = Entry(b"/usr/share/app", Kind.DIRECTORY, None, mode=0o755)


class World:
    """An update of four packages, and what stands in for it, on disk."""

    def __init__(
        self,
        folder: Path,
        entries: Iterable[Entry] = ENTRIES,
        *,
        changes: tuple[PackageChange, ...] = CHANGES,
        staged: tuple[PackageChange, ...] = (),
        new: tuple[bytes, ...] = NEW,
        old: tuple[bytes, ...] = OLD,
        fence: Fence = FENCE,
    ) -> None:
        self.folder = folder
        self.fence = fence
        self.changes = changes
        status_new = status.dump(database(*new))
        content = {status.PATH: status_new}
        whole = self._stored("whole", list(entries), content, staged, None, "")
        portions = portions_of(
            whole.changeset.entries,
            {name: frozenset(paths) for name, paths in LISTS.items()},
            WORKS,
            status.dump(database(*old)),
            CALLS,
        )
        self.whole = whole
        self.spare = self._stored("spare", [], {}, changes, portions, whole.changeset.changeset_id)

    def _stored(
        self,
        name: str,
        entries: list[Entry],
        content: dict[bytes, bytes],
        staged: tuple[PackageChange, ...],
        portions: Portions | None,
        instead_of: str,
    ) -> Stored:
        content = {
            **content,
            **{FOLDER + b"/" + one.name.encode() + b".deb": one.name.encode() for one in staged},
        }
        if staged:
            for path in (FOLDER.rpartition(b"/")[0], FOLDER):
                entries.append(Entry(path, Kind.DIRECTORY, None, mode=0o700))
            for path in content.keys() - {status.PATH}:
                entries.append(file(path, expected=None, mode=0o600))
        layer = self.folder / name
        written = []
        with LayerWriter(layer) as writer:
            for entry in sorted(entries, key=lambda one: one.path.split(b"/")):
                if entry.same or entry.kind is not Kind.FILE:
                    written.append(entry if entry.same else writer.add(entry))
                    continue
                raw = content.get(entry.path, b"abc")
                source = self.folder / "content"
                source.write_bytes(raw)
                with source.open("rb", buffering=0) as opened:
                    sized = dataclasses.replace(entry, size=len(raw))
                    written.append(writer.add(sized, opened.fileno()))
            digest, size = writer.finish()
        packages = tuple(
            Staged(
                one.name, one.architecture, one.old, one.new, f"{one.name}.deb", len(one.name),
                hashlib.sha256(one.name.encode()).hexdigest(), False, "before",
            )
            for one in staged
        )  # fmt: skip
        numbers = tuple(range(len(packages)))
        return Stored(
            archive.build(
                Extraction(tuple(written), (), (), 0, digest, size),
                vm="web1",
                created_at_s=1,
                fence=self.fence,
                identity=Identity("boot", "machine"),
                changes=self.changes,
                left_out=(),
                actions=(MADE, Action(("systemctl", "daemon-reload"))),
                lock_paths=(b"/var/lib/dpkg/lock",),
                reboot_needed=False,
                staged=packages,
                staged_steps=(
                    StagedStep(StepKind.UNPACK, numbers),
                    StagedStep(StepKind.CONFIGURE, numbers),
                )
                if staged
                else (),
                staging_folder=FOLDER if staged else b"",
                instead_of=instead_of,
                portions=portions,
            ),
            layer,
        )

    def make(self, *paths: bytes) -> Changeset:
        found = [Differing(path, WHY) for path in paths]
        made = make(self.whole, self.spare, found, self.folder / "made")
        archive.verify_layer(made, self.folder / "made")
        return made

    def content(self, made: Changeset, path: bytes) -> bytes:
        (entry,) = (one for one in made.entries if one.path == path)
        raw = (self.folder / "made").read_bytes()[entry.offset :][: entry.size]
        assert hashlib.sha256(raw).hexdigest() == entry.sha256
        return raw


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def names(made: Changeset) -> set[str]:
    return {one.name for one in made.staged}


def test_conflict_costs_its_package_and_no_other(world: World) -> None:
    made = world.make(b"/usr/bin/app")
    assert names(made) == {"app"}
    assert made.staged[0].reason == f"paths of app conflicted: /usr/bin/app: {WHY}"
    archived = FOLDER + b"/app.deb"
    assert {one.path for one in made.entries} == {
        b"/etc/ld.so.cache",
        b"/usr/bin/tool",
        b"/usr/bin/user",
        b"/usr/lib/lib.so",
        b"/usr/share/both",
        b"/var/lib/app/made",
        b"/var/cache/ouassister",
        FOLDER,
        archived,
        b"/var/lib/dpkg/info/lib:amd64.list",
        b"/var/lib/dpkg/info/tool.list",
        b"/var/lib/dpkg/status",
    }
    assert world.content(made, archived) == b"app"
    assert world.content(made, b"/usr/lib/lib.so") == b"abc"
    # Stanza by stanza: the old one of what was left out, all else as it was emulated.
    assert world.content(made, b"/var/lib/dpkg/status") == b"".join(
        one + b"\n\n" for one in (stanza("app"), *NEW[1:])
    )
    assert [(str(one.kind), one.packages) for one in made.staged_steps] == [
        ("unpack", (0,)),
        ("configure", (0,)),
    ]
    # What its script asked for is asked for by its script in the guest; what is in memory stays.
    assert made.actions == (MADE, Action(("systemctl", "restart", "lib.service")))
    assert made.instead_of == world.whole.changeset.changeset_id
    assert made.changes == world.whole.changeset.changes
    assert (made.identity, made.fence) == (
        world.whole.changeset.identity,
        world.whole.changeset.fence,
    )


def test_what_depends_on_its_new_version_goes_with_it(world: World) -> None:
    made = world.make(b"/usr/lib/lib.so")
    assert names(made) == {"lib", "user"}
    reasons = {one.name: one.reason for one in made.staged}
    assert reasons["lib"].startswith("paths of lib conflicted")
    assert reasons["user"].startswith("it goes with what conflicted: paths of lib")
    assert b"/usr/bin/user" not in {one.path for one in made.entries}
    text = world.content(made, b"/var/lib/dpkg/status")
    assert text == b"".join(
        one + b"\n\n" for one in (stanza("app", "2.0"), stanza("base"), OLD[2], NEW[3], OLD[3])
    )


def test_what_an_old_version_does_not_bear_goes_with_it(tmp_path: Path) -> None:
    old = (stanza("app", "1.0", "Breaks: lib (>= 2.0)"), *OLD[1:])
    made = World(tmp_path, old=old).make(b"/usr/bin/app")
    assert names(made) == {"app", "lib", "user"}


def test_chain_of_dependents_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouassister.partial.make._MOST_ROUNDS", 1)
    with pytest.raises(WholeError, match="does not end"):
        world.make(b"/usr/lib/lib.so")


def test_new_package_that_is_left_out_has_no_stanza(world: World) -> None:
    made = world.make(b"/usr/bin/tool")
    assert names(made) == {"tool"}
    assert b"Package: tool" not in world.content(made, b"/var/lib/dpkg/status")
    assert b"/usr/share/both" in {one.path for one in made.entries}  # lib has it, too


@pytest.mark.parametrize(
    ("path", "left_out"),
    [
        (b"/usr/share/app/data", {"app"}),  # below what goes
        (b"/usr/share/app/new", {"app"}),
        (b"/etc/app.conf.dpkg-dist", {"app"}),
        (b"/usr/share/both", {"lib", "tool", "user"}),
    ],
)
def test_owner_of_a_conflict(world: World, path: bytes, left_out: set[str]) -> None:
    assert names(world.make(path)) == left_out


def test_several_conflicts_cost_their_packages(world: World) -> None:
    assert names(world.make(b"/usr/bin/app", b"/usr/bin/tool")) == {"app", "tool"}


def test_what_is_shared_goes_together(tmp_path: Path) -> None:
    shared = (*ENTRIES[:7], file(b"/usr/share/both"), *ENTRIES[8:])
    assert names(World(tmp_path, shared).make(b"/usr/bin/tool")) == {"tool", "lib", "user"}


def test_what_was_staged_before_stays_so(tmp_path: Path) -> None:
    world = World(tmp_path, staged=(TOOL,))
    made = world.make(b"/usr/bin/app")
    assert {one.name: one.reason for one in made.staged}["tool"] == "before"
    assert names(made) == {"app", "tool"}
    assert world.content(made, FOLDER + b"/tool.deb") == b"tool"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (b"/etc/ld.so.cache", "belongs to no package"),
        (b"/var/lib/app/made", "belongs to no package"),
        (b"/nowhere", "is in no package"),
        (b"/var/lib/dpkg", "belongs to no package"),
        (b"/usr", "all packages would be left out"),
    ],
)
def test_conflict_of_nobody_leaves_all_out(world: World, path: bytes, words: str) -> None:
    with pytest.raises(WholeError, match=words):
        world.make(path)


@pytest.mark.parametrize(
    "entry",
    [
        file(b"/etc/passwd", mtime_ns=115 * 10**9),  # app was the last to write it
        file(b"/srv/x", mtime_ns=110 * 10**9),
        file(b"/srv/x", mtime_ns=10**9),
        Entry(b"/srv/x", Kind.DELETE, STATE),
    ],
)
def test_entry_of_nobody_stays(tmp_path: Path, entry: Entry) -> None:
    made = World(tmp_path, (*ENTRIES, entry)).make(b"/usr/bin/app")
    assert names(made) == {"app"}
    assert entry.path in {one.path for one in made.entries}


def test_what_a_script_wrote_below_what_goes_goes(tmp_path: Path) -> None:
    below = file(b"/usr/share/app/z", expected=None, mtime_ns=115 * 10**9)
    made = World(tmp_path, (*ENTRIES[:6], NEW_FOLDER, below, *ENTRIES[7:])).make(b"/usr/bin/app")
    assert names(made) == {"app"}
    assert b"/usr/share/app/z" not in {one.path for one in made.entries}


def test_link_to_what_is_left_out_leaves_all_out(tmp_path: Path) -> None:
    link = Entry(b"/usr/bin/zlink", Kind.HARDLINK, None, target=b"/usr/bin/app")
    with pytest.raises(WholeError, match="zlink is a link to what is left out"):
        World(tmp_path, (*ENTRIES[:5], link, *ENTRIES[5:])).make(b"/usr/bin/app")


def test_who_wrote_below_what_goes_goes_with_it(tmp_path: Path) -> None:
    below = file(b"/usr/share/app/z", expected=None, mtime_ns=125 * 10**9)
    entries = (*ENTRIES[:6], NEW_FOLDER, below, *ENTRIES[7:])
    assert names(World(tmp_path, entries).make(b"/usr/bin/app")) == {"app", "tool"}


def test_entry_of_nobody_below_what_goes_leaves_all_out(tmp_path: Path) -> None:
    below = file(b"/usr/share/app/z", expected=None, mtime_ns=10**9)
    entries = (*ENTRIES[:6], NEW_FOLDER, below, *ENTRIES[7:])
    with pytest.raises(WholeError, match="nobody knows which package wrote /usr/share/app/z"):
        World(tmp_path, entries).make(b"/usr/bin/app")


def test_trigger_that_wrote_below_what_goes_leaves_all_out(tmp_path: Path) -> None:
    below = file(b"/usr/share/app/z", expected=None, mtime_ns=135 * 10**9)
    entries = (*ENTRIES[:6], NEW_FOLDER, below, *ENTRIES[7:])
    with pytest.raises(WholeError, match="libc-bin would have to be left out, and cannot be"):
        World(tmp_path, entries).make(b"/usr/bin/app")


def test_database_that_would_not_be_consistent_leaves_all_out(tmp_path: Path) -> None:
    # A package that is not part of the update has what it needs before and after, not in between.
    base = stanza("base", "1.0", "Depends: app (>= 2.0) | lib (<< 2.0)")
    new = (NEW[0], base, *NEW[2:])
    with pytest.raises(WholeError, match="base would have to be left out, and cannot be"):
        World(tmp_path, new=new).make(b"/usr/bin/app")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ((b"Package: app\nnonsense",), NEW, "nothing is known of what"),
        ((*OLD, stanza("app").replace(b"amd64", b"i386")), NEW, "nothing is known of what"),
        (OLD, (*NEW, stanza("app").replace(b"amd64", b"i386")), "more than one architecture"),
        (
            (stanza("app", state="Status: install ok half-configured"), *OLD[1:]),
            NEW,
            "app was not settled before",
        ),
    ],
)
def test_database_that_cannot_be_put_together_leaves_all_out(
    tmp_path: Path, old: tuple[bytes, ...], new: tuple[bytes, ...], words: str
) -> None:
    world = World(tmp_path, new=new)
    portions = portions_of(
        world.whole.changeset.entries,
        {name: frozenset(paths) for name, paths in LISTS.items()},
        WORKS,
        b"".join(one + b"\n\n" for one in old),
        (),
    )
    spare = dataclasses.replace(world.spare.changeset, portions=portions)
    world.spare = dataclasses.replace(world.spare, changeset=spare)
    with pytest.raises(WholeError, match=words):
        world.make(b"/usr/bin/app")


def test_all_is_left_out_where_nothing_is_known(world: World) -> None:
    spare = dataclasses.replace(world.spare.changeset, portions=None)
    world.spare = dataclasses.replace(world.spare, changeset=spare)
    with pytest.raises(WholeError, match="nothing is known"):
        world.make(b"/usr/bin/app")


def test_change_of_two_architectures_leaves_all_out(tmp_path: Path) -> None:
    twice = (*CHANGES, dataclasses.replace(APP, architecture="i386"))
    world = World(tmp_path)
    whole = dataclasses.replace(world.whole.changeset, changes=twice)
    world.whole = dataclasses.replace(world.whole, changeset=whole)
    with pytest.raises(WholeError, match="more than one architecture"):
        world.make(b"/usr/bin/app")


def test_layer_that_was_written_to_is_noticed(world: World) -> None:
    raw = bytearray(world.whole.layer.read_bytes())
    (entry,) = (one for one in world.whole.changeset.entries if one.path == b"/usr/lib/lib.so")
    raw[entry.offset] ^= 1
    world.whole.layer.write_bytes(raw)
    with pytest.raises(TamperedError, match=r"lib\.so is not what the change set says"):
        world.make(b"/usr/bin/app")


def test_holes_of_what_stays_are_kept(tmp_path: Path) -> None:
    world = World(tmp_path)
    zeros = hashlib.sha256(bytes(4096)).hexdigest()
    entries = tuple(
        dataclasses.replace(one, size=4096, holes=4096, sha256=zeros, offset=0)
        if one.path == b"/usr/lib/lib.so"
        else one
        for one in world.whole.changeset.entries
    )
    whole = dataclasses.replace(world.whole.changeset, entries=entries)
    raw = world.whole.layer.read_bytes()
    shift = 8192
    (tmp_path / "shifted").write_bytes(bytes(shift) + raw)
    moved = tuple(
        one
        if one.path == b"/usr/lib/lib.so"
        else dataclasses.replace(one, offset=one.offset + shift)
        for one in whole.entries
    )
    world.whole = Stored(dataclasses.replace(whole, entries=moved), tmp_path / "shifted")
    made = world.make(b"/usr/bin/app")
    (entry,) = (one for one in made.entries if one.path == b"/usr/lib/lib.so")
    assert (entry.size, entry.holes) == (4096, 4096)
    assert world.content(made, b"/usr/lib/lib.so") == bytes(4096)
