"""What one subject cannot tell is named, and the others are told; what is printed is escaped."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from tests.unit.fake_guest import FakeGuest

from ouassister.cli.inspect_lists import LISTS
from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.guest_model import (
    OpenFile,
    ProcessFiles,
    ProcessMaps,
    Socket,
    Sockets,
    Subject,
    Sysctl,
    Tmpfs,
    TmpfsNode,
    VirtAddr,
    Vma,
)
from ouassister.kernel.reader import GuestReader
from ouassister.model import GuestPid, GuestView, Uts

if TYPE_CHECKING:
    from ouassister.kernel.introspect import Guest

VIEW = GuestView(
    uts=Uts("Linux", "web1", "6.1.0", "#1", "x86_64", "(none)"), boot_id="", suspended_at_s=0,
    uptime_s=0, cpus=1, memory_bytes=0, tasks=(), mounts=(),
)  # fmt: skip
HOSTILE = b"\x1b[31m\nevil"


def reader() -> GuestReader:
    guest = SimpleNamespace(kernel=FakeGuest().kernel, degraded=["before: why"])
    return GuestReader(cast("Guest", guest))


@pytest.mark.parametrize(
    "error",
    [CorruptGuestError("a loop"), UnsupportedGuestError("no type"), PageAbsentError(0x1000)],
)
def test_subject_that_fails_is_named_and_the_others_are_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_self: GuestReader, _pid: int | None = None) -> None:
        raise error

    one = reader()
    monkeypatch.setattr(GuestReader, "processes", {7: None})
    monkeypatch.setattr(GuestReader, "held_locks", fail)
    monkeypatch.setattr(GuestReader, "maps", fail)
    monkeypatch.setattr(GuestReader, "files", lambda _self, _pid: ())
    view = one.fill(VIEW, frozenset((Subject.LOCKS, Subject.MAPS, Subject.FILES)))
    assert view.held_locks is None
    assert view.maps == ()
    assert view.files == (ProcessFiles(GuestPid(7), ()),)
    assert view.degraded == (
        "before: why", f"held locks: {error}", f"mappings of process 7: {error}")  # fmt: skip


def test_defect_of_ours_is_not_taken_for_the_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: GuestReader) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(GuestReader, "held_locks", fail)
    with pytest.raises(ZeroDivisionError):
        reader().fill(VIEW, frozenset((Subject.LOCKS,)))


def test_what_was_not_asked_for_is_not_read() -> None:
    assert reader().fill(VIEW, frozenset()) == replace(VIEW, degraded=("before: why",))


@pytest.mark.parametrize("name", LISTS)
def test_lists_print_nothing_that_a_terminal_acts_on(name: str) -> None:
    file = OpenFile(3, HOSTILE, 0, True, True, 0, 0, 0, 0, 0, False)
    node = TmpfsNode(
        HOSTILE, 1, 0o120777, 0, 0, 1, 0, 0, 0, 0, 0, 0, target=HOSTILE, xattrs=(), swapped=0,
        absent=0,
    )  # fmt: skip
    vma = Vma(VirtAddr(0), VirtAddr(4096), "r--p", 0, 0, 0, 0, HOSTILE)
    view = replace(
        VIEW,
        maps=(ProcessMaps(GuestPid(1), (vma,)),),
        files=(ProcessFiles(GuestPid(1), (file,)),),
        superblocks=(),
        sockets=Sockets((Socket("unix-stream", HOSTILE, 0, True, 0, 1),), 0),
        modules=(),
        sysctls=(Sysctl("kernel.hostname", HOSTILE), Sysctl("kernel.odd", None, "no place")),
        tmpfs=(Tmpfs(HOSTILE, 0, 1, (node,)),),
    )
    lines = "\n".join(LISTS[name][1](view)).split("\n")
    assert all(line.isprintable() for line in lines)
    if name not in ("file-systems", "modules"):
        assert any("evil" in line for line in lines)


def test_view_without_its_lists_prints_none() -> None:
    for _, lines, _ in LISTS.values():
        assert len("\n".join(lines(VIEW)).split("\n")) == 1


def test_more_open_files_than_there_may_be_are_cut_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ouassister.kernel.reader._MAX_ITEMS", 3)
    monkeypatch.setattr(GuestReader, "processes", {1: None, 2: None, 3: None})
    monkeypatch.setattr(GuestReader, "files", lambda _self, _pid: (None, None))
    view = reader().fill(VIEW, frozenset((Subject.FILES,)))
    assert view.files is not None
    assert [one.pid for one in view.files] == [1, 2]
    assert view.degraded[1:] == ("open files: more than 3, from process 2",)
