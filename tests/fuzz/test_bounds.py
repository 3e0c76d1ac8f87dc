"""What is small in memory and has no end when it is walked: found by thought, not by chance."""

from __future__ import annotations

import contextlib
import stat
import struct
import time
from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from tests.unit.test_btf import Composer, program
from tests.unit.test_coherent_pagecache import NODE, Fake
from tests.unit.test_tmpfs_content import Sleeper, page
from tests.unit.test_tmpfs_handover import ROOM, content, fill, view
from tests.unit.test_tmpfs_handover import node as tmpfs_node

from ouassister.errors import CorruptGuestError, InternalError, UnsupportedGuestError
from ouassister.guest_model import TmpfsFile
from ouassister.kernel import tasks
from ouassister.kernel.btf import Btf
from ouassister.kernel.fields import Fields
from ouassister.kernel.program import guest_reads
from ouassister.memory import VirtualMemory
from ouassister.model import GuestPid, PhysAddr, Task, VirtAddr
from ouassister.shadow import tmpfs_handover
from ouassister.state.data import GAP, Stretches, map_file

if TYPE_CHECKING:
    from pathlib import Path

    from drgn import Object

    from ouassister.kernel.program import Kernel
    from ouassister.memory import PhysicalMemory


def test_anonymous_members_that_double_at_each_level_are_refused() -> None:
    out = Composer()
    integer = out.integer("int", 4, 1)
    last = out.struct("", 4, [("leaf", integer, 0)])
    for level in range(60):  # 2 ** 60 members, for whoever looks for one by its name
        last = out.struct("top" if level == 59 else "", 4, [("", last, 0), ("", last, 0)])
    _, types = program(Btf(out.section()))
    start = time.process_time()
    with pytest.raises(CorruptGuestError, match="more than 65536 members"):
        types.struct("top")
    assert time.process_time() - start < 5


def test_member_of_another_kind_than_the_kernels_is_no_defect_of_ours() -> None:
    prog = _kernel().prog
    with (
        pytest.raises(UnsupportedGuestError, match="does not have a length"),
        guest_reads("a test"),
    ):
        assert prog.type("struct task").member("pid").type.length


def test_number_that_became_a_structure_is_no_defect_of_ours() -> None:
    with pytest.raises(UnsupportedGuestError, match="types are not"), guest_reads("a test"):
        Fields(cast("Kernel", _kernel()), "struct task", "pid")


def _kernel() -> SimpleNamespace:
    out = Composer()
    integer = out.integer("int", 4, 1)
    inner = out.struct("inner", 4, [("x", integer, 0)])
    out.struct("task", 4, [("pid", inner, 0)])
    prog, _ = program(Btf(out.section()))
    return SimpleNamespace(prog=prog, type=prog.type, virtual=None)


def test_page_cache_whose_nodes_share_their_children_is_refused() -> None:
    fake = Fake()
    child = 0
    for level in range(10):  # 64 ** 10 ways to no page at all
        address = NODE + level * 0x1000
        child = fake.node(address, 6 * level, dict.fromkeys(range(64), child))
    with pytest.raises(CorruptGuestError, match="more nodes than there is memory"):
        fake.walk(child)


def test_processes_that_share_one_long_command_line_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = bytes(128 << 10)
    one = Task(pid=GuestPid(1), parent=GuestPid(0), comm=b"", state="S", uid=0, exe=None,
               cmdline=(text,), start_ns=0, kernel_thread=False)  # fmt: skip
    monkeypatch.setattr(tasks, "_task", lambda _kernel, _task: one)
    processes = cast("dict[int, Object]", dict.fromkeys(range(1 << 17)))
    with pytest.raises(CorruptGuestError, match="command lines"):
        tasks.read_tasks(cast("Kernel", None), processes)


class Ram:
    """A table whose entries all lead back to it."""

    def read(self, _address: PhysAddr, size: int) -> bytes:
        return (struct.pack("<Q", 3) * 512)[:size]


def test_reads_are_bounded_where_somebody_bounds_them() -> None:
    space = VirtualMemory(cast("PhysicalMemory", Ram()), PhysAddr(0), 4)
    with space.bounded(5):
        space.read(VirtAddr(0), 8)
        with space.bounded(100):  # the outer bound holds
            for _ in range(4):
                space.read(VirtAddr(0), 8)
            with pytest.raises(CorruptGuestError, match="without end"):
                space.read(VirtAddr(0), 8)
        with pytest.raises(CorruptGuestError, match="without end"):
            space.read(VirtAddr(0), 8)
    with space.bounded(3):
        with space.bounded(1):
            space.read(VirtAddr(0), 8)
        space.read(VirtAddr(0), 8)  # one of the outer three is spent
        space.read(VirtAddr(0), 8)
        with pytest.raises(CorruptGuestError, match="without end"):
            space.read(VirtAddr(0), 8)
    space.read(VirtAddr(0), 8)


def test_file_of_absurd_size_or_time_is_left_out_by_name(tmp_path: Path) -> None:
    regular = stat.S_IFREG | 0o600
    paths = (b"/endless", b"/late", b"/negative", b"/wide")
    told = content(
        tmpfs_node(paths[0], regular, size=(1 << 63) - 1),
        tmpfs_node(paths[1], regular, atime_ns=(1 << 63) * 1_000_000_000, mtime_ns=-(1 << 80)),
        tmpfs_node(paths[2], regular, size=-1),
        tmpfs_node(paths[3], regular, size=1 << 63),
        files=tuple(TmpfsFile(path, ()) for path in paths),
    )
    (folder := tmp_path / "written").mkdir()
    assert tmpfs_handover.write(folder, view(told), ROOM) == (
        "/run/negative is not in the view: it has -1 bytes",
        f"/run/wide is not in the view: it has {1 << 63} bytes",
    )
    (note,) = fill(tmp_path, told)
    assert note.startswith("/run/endless: left out of the view: ")
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"late", "ouassister"}


@pytest.mark.parametrize("path", [b"/..", b"/.", b"/a\0b", b"/a/.."])
def test_path_that_leads_out_is_made_nowhere(tmp_path: Path, path: bytes) -> None:
    folder = stat.S_IFDIR | 0o700
    told = content(
        tmpfs_node(b"/a", folder),
        tmpfs_node(path, folder),
        tmpfs_node(path + b"/out", stat.S_IFIFO | 0o600),
    )
    with pytest.raises(InternalError, match="a file named"):
        fill(tmp_path, told)
    assert {one.name for one in tmp_path.rglob("*")} <= {"handed", "made", "0", "places", "a"}


def test_two_files_of_one_name_are_one(tmp_path: Path) -> None:
    fifo, folder = stat.S_IFIFO | 0o600, stat.S_IFDIR | 0o700
    told = content(
        tmpfs_node(b"/a", folder),
        tmpfs_node(b"/a", fifo),
        tmpfs_node(b"/a/below", fifo),
        tmpfs_node(b"/b", fifo),
        tmpfs_node(b"/b", folder),
        tmpfs_node(b"/b/below", fifo),
    )
    assert fill(tmp_path, told) == []
    made = tmp_path / "made"
    assert (made / "a").is_fifo()
    assert (made / "b/below").is_fifo()


def test_tmpfs_whose_files_are_all_the_same_pages_is_bounded() -> None:
    guest = Sleeper()
    run = guest.tmpfs(b"/run")
    extents = [page(number * 4096) for number in range(4)]
    for number in range(9):  # each says that it has these pages, and they are there once
        guest.file(1, b"/%d" % number, pages=4, extents=extents)
    guest.file(1, b"/liar", pages=0, extents=extents)
    (told,) = guest.look(run, max_bytes=5 * 4 * 4096)
    assert sum(len(data) for one in told.files for _, data in one.runs) == 5 * 4 * 4096
    assert told.left_out == (
        *((b"/%d" % number, "16 KiB are too much") for number in range(5, 9)),
        (b"/liar", "it has more pages than its inode says"),
    )


def test_gap_of_absurd_length_is_stepped_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"needle" + b"\1" * 94 + b"\1\2needle")
    end = 1 << 60
    with contextlib.closing(
        Stretches(
            map_file(tmp_path / "file"),
            array("q", (0, 100, end)),
            array("q", (0, GAP, 100)),
            end + 8,
        )
    ) as data:
        assert len(data) == end + 8
        assert list(data.search(b"needle", 0, len(data))) == [0, end + 2]
        assert list(data.search(b"\1\0\0", 0, len(data))) == [99]
        assert list(data.search(b"\0\1\2", 0, len(data))) == [end - 1]
        assert data.last(b"needle", 0, len(data)) == end + 2
        assert data.last(b"needle", 0, end + 7) == 0
        assert data.last(b"\1\0", 0, len(data)) == 99
        assert data.last(b"\0\1", 0, len(data)) == end - 1
        assert data.last(b"absent", 0, len(data)) == -1
        assert data[end - 2 : end + 3] == b"\0\0\1\2n"
        assert data[98:102] == b"\1\1\0\0"
