"""The way of what is in tmpfs to the sandbox; and what a hostile guest or a damaged file may do."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import InternalError
from ouassister.guest_model import Tmpfs, TmpfsContent, TmpfsFile, TmpfsNode
from ouassister.model import GuestView, Mount, Uts
from ouassister.shadow import tmpfs_fill, tmpfs_handover
from ouassister.shadow.tmpfs_handover import Place, TmpfsHandOver, read_places

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.shadow.tmpfs_handover import Record

TIME = 1_000_000_000_123_456_789
ROOM = 1 << 30


def node(path: bytes, mode: int, **values: object) -> TmpfsNode:
    plain = TmpfsNode(
        path=path, inode=1, mode=mode, uid=os.geteuid(), gid=os.getegid(), links=1, size=0,
        major=0, minor=0, atime_ns=TIME, mtime_ns=TIME, ctime_ns=TIME, target=None, xattrs=(),
        swapped=0, absent=0,
    )  # fmt: skip
    return replace(plain, **values)  # type: ignore[arg-type]


ROOT = node(b"/", stat.S_IFDIR | 0o755)
DIRECTORY = stat.S_IFDIR | 0o750
REGULAR = stat.S_IFREG | 0o640


def content(*nodes: TmpfsNode, **values: object) -> TmpfsContent:
    plain = TmpfsContent(
        tmpfs=Tmpfs(b"/run", 0, 23, (ROOT, *nodes)), size_bytes=1 << 20, inodes=100, noexec=(),
        hard_links=(), files=(), left_out=(),
    )  # fmt: skip
    return replace(plain, **values)  # type: ignore[arg-type]


def mount(target: bytes, number: int, parent: int = 1, **values: object) -> Mount:
    plain = Mount(b"tmpfs", target, "tmpfs", 0, 23, False, None, b"/", number, parent)
    return replace(plain, **values)  # type: ignore[arg-type]


DISK = mount(b"/", 1, 0, fstype="ext4", minor=1)
RUN = mount(b"/run", 2)


def view(
    *contents: TmpfsContent, mounts: tuple[Mount, ...] = (DISK, RUN), **values: object
) -> GuestView:
    plain = GuestView(
        uts=Uts("Linux", "web1", "6.1.0", "#1", "x86_64", "(none)"), boot_id="", suspended_at_s=1,
        uptime_s=1, cpus=1, memory_bytes=1 << 29, tasks=(), mounts=mounts, tmpfs_content=contents,
    )  # fmt: skip
    return replace(plain, **values)  # type: ignore[arg-type]


def records(path: Path) -> list[Record]:
    opened = TmpfsHandOver(path)
    try:
        return list(opened.records())
    finally:
        opened.close()


def names(path: Path) -> list[bytes]:
    """Full names of the records of a hand-over."""
    found: list[bytes] = []
    for one in records(path):
        found.append((found[one.parent] if found else b"").rstrip(b"/") + b"/" + one.name)
    return found


def test_everything_arrives_in_an_order_to_make_it(tmp_path: Path) -> None:
    told = content(
        node(b"/d", DIRECTORY, mtime_ns=-5),
        node(b"/d.x", DIRECTORY),
        node(b"/d/f", REGULAR, size=9000, uid=7, gid=8, xattrs=((b"user.a", b"1\0"),)),
        node(b"/d/g", REGULAR, size=9000),
        node(b"/l", stat.S_IFLNK | 0o777, target=b"../../etc"),
        node(b"/null", stat.S_IFCHR | 0o666, major=1, minor=3, mtime_ns=1 << 70),
        hard_links=((b"/d/g", b"/d/f"),),
        files=(TmpfsFile(b"/d/f", ((0, b"a" * 4096), (8192, b"end"))),),
    )
    assert tmpfs_handover.write(tmp_path, view(told), ROOM) == ()
    opened = TmpfsHandOver(tmp_path / "0")
    found = list(opened.records())
    opened.close()
    assert (opened.size_bytes, opened.inodes, opened.count) == (1 << 20, 100, len(found))
    # The last one is made for the shadow's own folder.
    assert names(tmp_path / "0") == [
        b"/", b"/d", b"/d/f", b"/d/g", b"/d.x", b"/l", b"/null", b"/ouassister"]  # fmt: skip
    file = found[2]
    assert (file.mode, file.uid, file.gid, file.size, file.mtime_ns) == (REGULAR, 7, 8, 9000, TIME)
    assert file.runs == ((0, b"a" * 4096), (8192, b"end"))
    assert file.xattrs == ((b"user.a", b"1\0"),)
    assert (found[3].same, found[3].runs) == (2, ())
    assert found[1].mtime_ns == -5
    assert found[5].target == b"../../etc"
    assert (found[6].device, found[6].mtime_ns) == (os.makedev(1, 3), (1 << 63) - 1)


def test_places_are_those_that_programs_see(tmp_path: Path) -> None:
    other = content(tmpfs=Tmpfs(b"/tmp", 0, 24, (ROOT,)), noexec=(4,))
    mounts = (
        DISK,
        RUN,
        mount(b"/tmp", 4, minor=24),
        mount(b"/dev", 5, minor=24),
        mount(b"/dev/shm", 6, 5),
        mount(b"/dev/other", 7, 5),
        mount(b"/sys/fs/cgroup", 8, 1),
        mount(b"/var/tmp", 9, 1, minor=24, root=b"/part", read_only=True),
        mount(b"/covered", 10, 1),
        mount(b"/covered", 11, 10, fstype="ext4", minor=1),
        mount(b"/unknown", 12, 1, minor=99),
    )
    tmpfs_handover.write(tmp_path, view(content(), other, mounts=mounts), ROOM)
    assert read_places(tmp_path) == (
        Place(0, b"/", b"/run", False, False),
        Place(1, b"/", b"/tmp", False, True),
        Place(1, b"/part", b"/var/tmp", True, False),
        Place(0, b"/", b"/dev/shm", False, False),
    )
    tmpfs_handover.forget(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["places"]


def test_nothing_handed_over_is_not_the_same_as_no_tmpfs(tmp_path: Path) -> None:
    assert read_places(tmp_path) is None
    (note,) = tmpfs_handover.write(
        tmp_path, view(tmpfs_content=None, degraded=("tmpfs content: no such member",)), ROOM
    )
    assert "no such member" in note
    assert read_places(tmp_path) is None
    assert tmpfs_handover.write(tmp_path, view(), ROOM) == ()
    assert read_places(tmp_path) == ()


def test_more_mounts_than_the_bound_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tmpfs_handover, "_MAX_PLACES", 2)
    mounts = (DISK, *(mount(b"/m%d" % number, number) for number in range(2, 6)))
    notes = tmpfs_handover.write(tmp_path, view(content(), mounts=mounts), ROOM)
    assert notes == ("of tmpfs, the first 2 mounts are in the view",)
    assert len(read_places(tmp_path) or ()) == 2


def test_what_is_not_known_is_left_out_and_named(tmp_path: Path) -> None:
    told = content(
        node(b"/absent", REGULAR, size=5),
        node(b"/forgotten", REGULAR, size=5),
        node(b"/huge", DIRECTORY, size=1 << 63),
        node(b"/huge/below", DIRECTORY),
        node(b"/link", REGULAR, size=5),
        node(b"/" + b"n" * 256, DIRECTORY),
        node(b"/orphan/file", stat.S_IFIFO),
        hard_links=((b"/link", b"/absent"),),
        left_out=((b"/absent", "2 pages are swapped out"), (b"", "attributes of x: odd")),
    )
    notes = tmpfs_handover.write(tmp_path, view(told), ROOM)
    assert names(tmp_path / "0") == [b"/", b"/ouassister"]
    assert notes == (
        "/run/absent is not in the view: 2 pages are swapped out",
        "/run is not wholly in the view: attributes of x: odd",
        "/run/forgotten is not in the view: its content is not known",
        f"/run/huge is not in the view: it has {1 << 63} bytes",
        f"/run/{'n' * 256} is not in the view: its name is too long",
    )


def test_largest_files_are_left_out_where_the_disk_is_small(tmp_path: Path) -> None:
    sizes = {b"/a": 3000, b"/b": 10, b"/c": 5000, b"/d": 900}
    told = content(
        *(node(path, REGULAR, size=size) for path, size in sizes.items()),
        files=tuple(TmpfsFile(path, ((0, bytes(size)),)) for path, size in sizes.items()),
    )
    notes = tmpfs_handover.write(tmp_path, view(told), 8 * 1000)
    assert names(tmp_path / "0") == [b"/", b"/b", b"/d", b"/ouassister"]
    assert [note.split()[0] for note in notes] == ["/run/a", "/run/c"]
    assert all("no room" in note for note in notes)


def test_many_notes_are_counted(tmp_path: Path) -> None:
    told = content(left_out=tuple((b"/%d" % number, "odd") for number in range(30)))
    notes = tmpfs_handover.write(tmp_path, view(told), ROOM)
    assert len(notes) == 21
    assert notes[-1] == "and 10 more of /run"


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, REGULAR, stat.S_IFSOCK])
def test_mount_points_are_folders_whatever_the_guest_has(tmp_path: Path, mode: int) -> None:
    told = content(
        node(b"/ouassister", mode, target=b"/etc", size=3),
        node(b"/ouassister/below", stat.S_IFIFO),
        node(b"/same", mode, target=b"/etc", size=3),
        hard_links=((b"/same", b"/ouassister"),),
        files=(TmpfsFile(b"/ouassister", ((0, b"abc"),)),),
    )
    deep = mount(b"/run/user/7/disk", 3, 2, fstype="ext4", minor=1)
    notes = tmpfs_handover.write(tmp_path, view(told, mounts=(DISK, RUN, deep)), ROOM)
    assert "/run/ouassister of the guest is hidden by one of ours" in notes
    found = dict(zip(names(tmp_path / "0"), records(tmp_path / "0"), strict=True))
    for path in (b"/ouassister", b"/user", b"/user/7", b"/user/7/disk"):
        assert found[path].mode == stat.S_IFDIR | 0o755, path
    assert b"/same" not in found


def test_mount_point_below_too_many_folders_is_not_made(tmp_path: Path) -> None:
    deep = mount(b"/run" + b"/d" * 64, 3, 2, fstype="ext4", minor=1)
    tmpfs_handover.write(tmp_path, view(content(), mounts=(DISK, RUN, deep)), ROOM)
    assert names(tmp_path / "0") == [b"/", b"/ouassister"]


# --- a hand-over that is not what was written ---------------------------------------------------


def sample(folder: Path) -> bytes:
    folder.mkdir()
    told = content(
        node(b"/d", DIRECTORY),
        node(b"/d/f", REGULAR, size=9, xattrs=((b"user.a", b"1"),)),
        node(b"/d/g", REGULAR, size=9),
        hard_links=((b"/d/g", b"/d/f"),),
        files=(TmpfsFile(b"/d/f", ((0, b"abc"), (5, b"defg"))),),
    )
    tmpfs_handover.write(folder, view(told), ROOM)
    return (folder / "0").read_bytes()


def test_every_cut_is_refused(tmp_path: Path) -> None:
    whole = sample(tmp_path / "whole")
    cut = tmp_path / "cut"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(InternalError, match="cut short"):
            records(cut)
    cut.write_bytes(whole + b"\0")
    with pytest.raises(InternalError, match="too long"):
        records(cut)
    cut.write_bytes(b"X" + whole[1:])
    with pytest.raises(InternalError, match="no such file"):
        records(cut)


HEADER = 8 + struct.calcsize("<QQI")
SECOND = HEADER + struct.calcsize("<IIIIIIQqqHHHI")  # after the root, which has no name


@pytest.mark.parametrize("name", [b"..", b".", b"/", b"\0", b"a/b", b"n" * 256, b""])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: bytes) -> None:
    whole = bytearray(sample(tmp_path / "whole"))
    at = SECOND + struct.calcsize("<IIIIIIQqq")
    struct.pack_into("<H", whole, at, len(name))
    end = SECOND + struct.calcsize("<IIIIIIQqqHHHI")
    whole[end : end + 1] = name  # instead of "d"
    odd = tmp_path / "odd"
    odd.write_bytes(whole)
    with pytest.raises(InternalError, match="a file named"):
        records(odd)


@pytest.mark.parametrize(
    ("offset", "value", "match"),
    [(0, 1, "not in order"), (0, 7, "not in order"), (0, 0xFFFFFFFF, "a file named"),
     (4, 5, "not in order")],
)  # fmt: skip
def test_records_in_no_order_are_refused(
    tmp_path: Path, offset: int, value: int, match: str
) -> None:
    whole = bytearray(sample(tmp_path / "whole"))
    struct.pack_into("<I", whole, SECOND + offset, value)
    odd = tmp_path / "odd"
    odd.write_bytes(whole)
    with pytest.raises(InternalError, match=match):
        records(odd)


def test_bytes_behind_the_end_are_refused(tmp_path: Path) -> None:
    whole = sample(tmp_path / "whole")
    odd = tmp_path / "odd"
    odd.write_bytes(whole.replace(struct.pack("<QI", 5, 4), struct.pack("<QI", 6, 4)))
    with pytest.raises(InternalError, match="behind the end"):
        records(odd)


# --- making it ----------------------------------------------------------------------------------


def fill(folder: Path, told: TmpfsContent) -> list[str]:
    handed, made = folder / "handed", folder / "made"
    handed.mkdir()
    made.mkdir()
    tmpfs_handover.write(handed, view(told), ROOM)
    opened = TmpfsHandOver(handed / "0")
    try:
        return tmpfs_fill.fill_folder(made, opened, b"/run")
    finally:
        opened.close()


def test_tree_is_made(tmp_path: Path) -> None:
    told = content(
        node(b"/d", DIRECTORY),
        node(b"/d/f", REGULAR, size=9000),
        node(b"/d/g", REGULAR, size=9000),
        node(b"/link", stat.S_IFLNK | 0o777, target=b"../../etc"),
        node(b"/socket", stat.S_IFSOCK | 0o755),
        hard_links=((b"/d/g", b"/d/f"),),
        files=(TmpfsFile(b"/d/f", ((8192, b"end"),)),),
    )
    assert fill(tmp_path, told) == []
    made = tmp_path / "made"
    assert (made / "d/f").read_bytes() == bytes(8192) + b"end" + bytes(805)
    assert (made / "d/f").samefile(made / "d/g")
    assert (made / "d").stat().st_mtime_ns == (made / "d/f").stat().st_mtime_ns == TIME
    assert stat.S_IMODE((made / "d").stat().st_mode) == 0o750
    assert (made / "link").readlink().as_posix() == "../../etc"
    assert stat.S_ISSOCK((made / "socket").stat().st_mode)


def test_file_below_a_symbolic_link_is_not_made(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    told = content(
        node(b"/a", stat.S_IFLNK | 0o777, target=os.fsencode(outside)),
        node(b"/a/b", stat.S_IFIFO | 0o600),
    )
    fill(tmp_path, told)
    assert list(outside.iterdir()) == []
    assert (tmp_path / "made/a").is_symlink()


def test_records_that_are_no_tree_are_refused(tmp_path: Path) -> None:
    whole = sample(tmp_path / "whole")
    odd, made = tmp_path / "odd", tmp_path / "made"
    made.mkdir()
    # The last record, the folder of ours, below "g", which is a file and not open.
    at = whole.rindex(b"ouassister") - struct.calcsize("<IIIIIIQqqHHHI")
    odd.write_bytes(whole[:at] + struct.pack("<I", 3) + whole[at + 4 :])
    opened = TmpfsHandOver(odd)
    with pytest.raises(InternalError, match="is no tree"):
        tmpfs_fill.fill_folder(made, opened, b"/run")
    opened.close()


def test_type_that_linux_has_not_is_left_out(tmp_path: Path) -> None:
    assert fill(tmp_path, content(node(b"/odd", 0o600))) == [
        "/run/odd: of unknown type 0, left out of the view"
    ]
    assert [one.name for one in (tmp_path / "made").iterdir()] == ["ouassister"]


@pytest.mark.parametrize("target", [b"", b"x" * 4096])
def test_link_that_none_can_have_is_left_out(tmp_path: Path, target: bytes) -> None:
    (note,) = fill(tmp_path, content(node(b"/l", stat.S_IFLNK | 0o777, target=target)))
    assert note.startswith("/run/l: left out of the view: ")
    assert [one.name for one in (tmp_path / "made").iterdir()] == ["ouassister"]


@pytest.mark.parametrize("key", [b"", b"user." + b"n" * 251, b"odd"])
def test_attribute_that_none_can_have_is_left_out(tmp_path: Path, key: bytes) -> None:
    (note,) = fill(tmp_path, content(node(b"/d", DIRECTORY, xattrs=((key, b"x"),))))
    assert note.startswith("/run/d: attribute ")
    assert (tmp_path / "made/d").is_dir()


def test_file_larger_than_the_file_system_takes_is_left_out(tmp_path: Path) -> None:
    told = content(
        node(b"/a", REGULAR, size=(1 << 63) - 1),
        node(b"/b", REGULAR, size=(1 << 63) - 1),
        hard_links=((b"/b", b"/a"),),
        files=(TmpfsFile(b"/a", (((1 << 63) - 2, b"x"),)),),
    )
    (note,) = fill(tmp_path, told)
    assert note.startswith("/run/a: left out of the view: ")
    assert [one.name for one in (tmp_path / "made").iterdir()] == ["ouassister"]


@pytest.mark.parametrize(
    ("size", "inodes", "wanted"),
    [(0, 0, f"size={1 << 30},nr_inodes={1 << 20}"), (1 << 60, 1 << 60,
     f"size={1 << 30},nr_inodes={1 << 20}"), (4096, 1, "size=4096,nr_inodes=66")],
)  # fmt: skip
def test_limits_are_bounded(tmp_path: Path, size: int, inodes: int, wanted: str) -> None:
    tmpfs_handover.write(tmp_path, view(content(size_bytes=size, inodes=inodes)), ROOM)
    opened = TmpfsHandOver(tmp_path / "0")
    opened.close()
    assert tmpfs_fill.limits(opened) == wanted
