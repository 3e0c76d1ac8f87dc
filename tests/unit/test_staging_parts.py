"""Who holds what, whose it is, what travels, and what is guessed."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import UpdaterError
from ouassister.guest_model import GuestPid, OpenFile, ProcessFiles, ProcessMaps, VirtAddr, Vma
from ouassister.model import (
    Archive,
    Entry,
    Expected,
    GuestView,
    Kind,
    Mode,
    PackageChange,
    PackageMode,
    Request,
    Task,
    TaskDetail,
    Uts,
)
from ouassister.packages.apt_status import Work
from ouassister.packages.owners import parse_search
from ouassister.restart.exposed import exposed
from ouassister.restart.kernels import installed_by, newer
from ouassister.restart.uses import ProcessUse, UsedFile
from ouassister.staging import carry, judge, predict
from ouassister.staging.held import HeldFile, of_view, written

if TYPE_CHECKING:
    from pathlib import Path

DATA = b"/var/lib/db/data"
SERVER = b"/usr/sbin/server"
UNIT = b"/usr/lib/systemd/system/db@.service"
HELD = HeldFile(DATA, 12, GuestPid(7), b"server", SERVER, "db@main.service")


def open_file(path: bytes, **more: object) -> OpenFile:
    plain = OpenFile(3, path, 1, True, True, 0, 254, 1, 12, 0o100644, False)
    return dataclasses.replace(plain, **more)  # type: ignore[arg-type]


def view(*files: OpenFile, vmas: tuple[Vma, ...] = ()) -> GuestView:
    detail = TaskDetail(
        GuestPid(7), (), 0, 0, 0, (), None, None, None, (), "db@main.service", "", ""
    )
    task = Task(
        GuestPid(7), GuestPid(1), b"server", "S", 0, SERVER + b" (deleted)", (), 0, False, detail
    )
    return GuestView(
        uts=Uts("", "", "", "", "", ""), boot_id="", suspended_at_s=0, uptime_s=0, cpus=1,
        memory_bytes=0, tasks=(task,), mounts=(), files=(ProcessFiles(GuestPid(7), files),),
        maps=(ProcessMaps(GuestPid(7), vmas),),
    )  # fmt: skip


def mapped(path: bytes, permissions: str) -> Vma:
    return Vma(VirtAddr(0), VirtAddr(4096), permissions, 0, 254, 1, 12, path)


def test_held_is_what_is_open_for_writing_and_has_a_name() -> None:
    assert of_view(view(open_file(DATA), open_file(DATA, fd=4))) == (HELD,)
    for odd in ({"writable": False}, {"deleted": True}, {"mode": 0o20620}):
        assert of_view(view(open_file(DATA, **odd))) == ()


def test_held_is_what_is_mapped_to_be_shared_and_written() -> None:
    assert of_view(view(vmas=(mapped(DATA, "rw-s"),))) == (HELD,)
    for permissions, path in (("rw-p", DATA), ("r--s", DATA), ("rw-s", DATA + b" (deleted)")):
        assert of_view(view(vmas=(mapped(path, permissions),))) == ()


def test_process_is_known_by_its_program_and_its_unit() -> None:
    assert HELD.known_by == (SERVER, UNIT)
    for unit in ("", "session-1.scope", "a/../b.service", "x" * 300 + ".service"):
        assert dataclasses.replace(HELD, unit=unit).known_by == (SERVER,)
    assert dataclasses.replace(HELD, program=b"", unit="").known_by == ()


def test_written_is_the_same_path_and_inode() -> None:
    def entry(inode: int, path: bytes = DATA) -> Entry:
        return Entry(path, Kind.FILE, Expected(inode, 0o100644, 1, 2, 3))

    assert written((HELD,), (entry(12),)) == (HELD,)
    assert written((HELD,), (entry(13), entry(12, b"/other"))) == ()
    assert written((HELD,), (Entry(DATA, Kind.FILE, None),)) == ()
    folder = Entry(
        b"/var/lib/db", Kind.DELETE, Expected(2, 0o40755, 0, 0, 0),
        below=((DATA, Expected(12, 0o100644, 1, 2, 3)),),
    )  # fmt: skip
    assert written((HELD,), (folder,)) == (HELD,)


PLANNED = ("db-server", "db-core", "other")
WORKS = (Work("db-core", 10), Work("db-server", 20), Work("other", 30))


@pytest.mark.parametrize(
    ("owners", "wrote", "culprits"),
    [
        ({DATA: ("db-server",), SERVER: ("db-core",)}, 20, {"db-server"}),
        ({SERVER: ("db-core",)}, 20, {"db-core"}),
        ({UNIT: ("db-server",)}, 10, {"db-server"}),
        ({SERVER: ("db-core",), UNIT: ("db-server",)}, 30, {"db-core", "db-server"}),
        ({SERVER: ("elsewhere",)}, 25, {"db-server"}),  # whose script was at work
        ({}, 20, {"db-core", "db-server"}),  # within one second, both were
        ({}, 5, set(PLANNED)),  # nobody knows
    ],
)
def test_package_that_wrote_a_held_file_is_found(
    owners: dict[bytes, tuple[str, ...]], wrote: int, culprits: set[str]
) -> None:
    reasons = judge.holders((HELD,), owners, {DATA: wrote}, WORKS, PLANNED)
    assert reasons.keys() == culprits
    assert all("/var/lib/db/data, which server (pid 7) holds" in why for why in reasons.values())


def test_owners_are_read_and_diversions_are_none() -> None:
    output = (
        b"diversion by dash from: /bin/sh\nlibc6:amd64, libc6:i386: /usr/share/doc\n"
        b"dash: /bin/sh\nEvil;rm: /x\nmore: /bin/sh\n"
    )
    assert parse_search(output) == {b"/usr/share/doc": ("libc6",), b"/bin/sh": ("dash", "more")}


# --- what travels ---

CHANGE = PackageChange("app", "all", "", "2.0")
CONTENT = b"deb"
DIGEST = hashlib.sha512(CONTENT).hexdigest()
ARCHIVE = Archive("app", "http://mirror.example/app.deb", "app_2.0_all.deb", 3, f"SHA512:{DIGEST}")
FOLDER = b"/var/cache/ouassister/1"


def test_archive_is_described_by_its_own_bytes(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE.file_name).write_bytes(CONTENT)
    (one,) = carry.staged({CHANGE: "why"}, (ARCHIVE,), Request(("app:all=2.0",)), tmp_path)
    assert (one.file, one.size, one.sha256, one.requested, one.reason) == (
        ARCHIVE.file_name, 3, hashlib.sha256(CONTENT).hexdigest(), True, "why",
    )  # fmt: skip
    entry = Entry(FOLDER + b"/app_2.0_all.deb", Kind.FILE, None, 0o600, size=3, sha256=one.sha256)
    carry.check((one,), FOLDER, (entry,))
    for odd in ({"sha256": "00"}, {"size": 4}, {"mode": 0o644}, {"uid": 1}):
        with pytest.raises(UpdaterError, match="not the archive that was verified"):
            carry.check((one,), FOLDER, (dataclasses.replace(entry, **odd),))
    with pytest.raises(UpdaterError, match="not in the change set"):
        carry.check((one,), FOLDER, (dataclasses.replace(entry, path=b"/elsewhere"),))


def test_archive_that_is_not_what_the_lists_say_does_not_travel(tmp_path: Path) -> None:
    path = tmp_path / ARCHIVE.file_name
    with pytest.raises(UpdaterError, match="is gone"):
        carry.staged({CHANGE: ""}, (ARCHIVE,), Request(), tmp_path)
    path.write_bytes(b"bed")
    with pytest.raises(UpdaterError, match="a script changed the archive"):
        carry.staged({CHANGE: ""}, (ARCHIVE,), Request(), tmp_path)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(UpdaterError, match="replaced"):
        carry.staged({CHANGE: ""}, (ARCHIVE,), Request(), tmp_path)
    for odd in ({"package": "other"}, {"file_name": "app_2.0_i386.deb"}, {"file_name": "$.deb"}):
        archive = dataclasses.replace(ARCHIVE, **odd)  # type: ignore[arg-type]
        with pytest.raises(UpdaterError, match="no archive that could be staged"):
            carry.staged({CHANGE: ""}, (archive,), Request(), tmp_path)


# --- what is guessed ---


def test_who_changes_the_selinux_policy_is_who_was_at_work_then() -> None:
    policy = Entry(
        b"/etc/selinux/default/policy/policy.33",
        Kind.FILE,
        Expected(1, 0o100644, 9, 1, 1),
        mtime_ns=8_900_000_000,
    )
    other = dataclasses.replace(policy, path=b"/etc/selinux/default/seusers")
    works = (Work("db", 3), Work("app", 7), Work("db", 9))
    planned = ("db", "app")
    words = "it changes the SELinux policy /etc/selinux/default/policy/policy.33, which the guest"
    (found,) = judge.policies((other, policy), works, planned).items()
    assert found == ("app", f"{words} has loaded")
    late = dataclasses.replace(policy, mtime_ns=1)  # a script gave it the time of something else
    assert judge.policies((late,), works, planned).keys() == {"db", "app"}
    assert judge.policies((other, dataclasses.replace(policy, same=True)), works, planned) == {}


def test_prediction_names_holders_of_data_and_what_was_staged_before() -> None:
    log = dataclasses.replace(HELD, path=b"/var/log/db.log")
    assert predict.suspects((HELD, log, dataclasses.replace(HELD, program=b""))) == (HELD,)
    db, app = PackageChange("db", "amd64", "1", "2"), PackageChange("app", "all", "1", "2")
    before = predict.recall(
        (
            ("web1", "not JSON"),
            ("web1", predict.remember(app, "its script failed")),
            ("web1", predict.remember(dataclasses.replace(db, new="1.5"), "another version")),
        )
    )
    assert predict.predict((db, app), (HELD,), {SERVER: ("db",)}, before) == (
        PackageMode("db", "amd64", Mode.STAGED, "server (pid 7) holds /var/lib/db/data open for"
                    " writing"),
        PackageMode("app", "all", Mode.STAGED, "it was staged for web1: its script failed"),
    )  # fmt: skip
    new = dataclasses.replace(db, old="")
    assert predict.predict((new,), (HELD,), {SERVER: ("db",)}, {}) == ()


# --- who runs what staged packages replace ---


def test_staged_packages_count_for_restarts_and_kernels() -> None:
    use = ProcessUse(GuestPid(7), b"server", "db.service", "", False, (UsedFile(SERVER, 9),), b"")
    assert exposed((use,), ()) == ()
    ((_use, found),) = exposed((use,), (), frozenset((SERVER,)))
    assert found.files == (SERVER,)
    releases = installed_by(("linux-image-6.1.0-30-amd64", "linux-image-6.1.0-9-amd64-unsigned"))
    assert newer("6.1.0-28-amd64", [*releases, *installed_by(("app",))]) == "6.1.0-30-amd64"
