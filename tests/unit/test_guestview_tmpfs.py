"""A tmpfs written out as a tree; what a hostile guest would like written elsewhere is refused."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from drgn import Object as DrgnObject
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import Tmpfs, TmpfsNode
from ouassister.kernel.page_frames import PageFrames
from ouassister.kernel.tmpfs import Extent, Where
from ouassister.kernel.tmpfs import TmpfsReader as TmpfsReaderClass
from ouassister.kernel.tmpfs_export import Exported, TmpfsExport

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from drgn import Object

    from ouassister.kernel.tmpfs import TmpfsReader

TIME = 1_000_000_000_123_456_789


class Reader:
    """Contents by inode number."""

    def __init__(self, contents: dict[int, list[Extent]]) -> None:
        self.contents = contents

    def inodes(self, _root: object) -> Iterator[tuple[bytes, object]]:
        for number in self.contents:
            yield b"", SimpleNamespace(i_ino=SimpleNamespace(value_=lambda n=number: n), n=number)

    def content(self, inode: SimpleNamespace) -> Iterator[Extent]:
        yield from self.contents[inode.n]


def node(path: bytes, inode: int, mode: int, **values: object) -> TmpfsNode:
    plain = TmpfsNode(
        path=path, inode=inode, mode=mode, uid=0, gid=0, links=1, size=0, major=0, minor=0,
        atime_ns=TIME, mtime_ns=TIME, ctime_ns=TIME, target=None, xattrs=(), swapped=0, absent=0,
    )  # fmt: skip
    return replace(plain, **values)  # type: ignore[arg-type]


ROOT = node(b"/", 1, stat.S_IFDIR | 0o755)


def export(
    folder: Path, nodes: list[TmpfsNode], contents: dict[int, list[Extent]] | None = None
) -> Exported:
    tree = Tmpfs(b"/run", 0, 5, (ROOT, *nodes))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        writer = TmpfsExport(cast("TmpfsReader", Reader(contents or {})), descriptor, owners=False)
        return writer.write(tree, cast("Object", None))
    finally:
        os.close(descriptor)


def test_tree_is_written_as_it_was(tmp_path: Path) -> None:
    extents = [Extent(8192, b"end", 3)]
    done = export(
        tmp_path,
        [
            node(b"/d", 2, stat.S_IFDIR | 0o750),
            node(b"/d/f", 3, stat.S_IFREG | 0o640, size=8195, links=2),
            node(b"/fifo", 4, stat.S_IFIFO | 0o600),
            node(b"/hard", 3, stat.S_IFREG | 0o640, size=8195, links=2),
            node(b"/link", 5, stat.S_IFLNK | 0o777, target=b"../../etc/passwd"),
            node(b"/socket", 6, stat.S_IFSOCK | 0o755),
        ],
        {3: extents},
    )
    assert done == Exported(7, ())
    assert (tmp_path / "d/f").read_bytes() == bytes(8192) + b"end"
    assert (tmp_path / "hard").stat().st_ino == (tmp_path / "d/f").stat().st_ino
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)
    assert (tmp_path / "link").readlink().as_posix() == "../../etc/passwd"
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750
    assert (tmp_path / "d").stat().st_mtime_ns == TIME
    assert (tmp_path / "d/f").stat().st_mtime_ns == TIME


def test_devices_and_unknown_pages_are_left_out_by_name(tmp_path: Path) -> None:
    done = export(
        tmp_path,
        [
            node(b"/absent", 2, stat.S_IFREG | 0o600, size=4096, absent=1),
            node(b"/null", 3, stat.S_IFCHR | 0o666, major=1, minor=3),
            node(b"/swapped", 4, stat.S_IFREG | 0o600, size=8192, swapped=2),
            node(b"/unknown", 5, stat.S_IFLNK | 0o777, swapped=1),
        ],
        {2: [], 4: []},
    )
    assert done.made == 1
    assert done.left_out == (
        "/absent: 1 pages are absent from the save",
        "/null: a device",
        "/swapped: 2 pages are swapped out",
        "/unknown: its content is not known",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [b"/../out", b"out", b"/a/../../out", b"/a\0b", b""])
def test_path_that_leads_out_is_corrupt(tmp_path: Path, path: bytes) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(CorruptGuestError):
        export(inside, [node(path, 2, stat.S_IFIFO | 0o600)])
    assert [one.name for one in tmp_path.iterdir()] == ["inside"]


def test_file_below_a_symbolic_link_is_corrupt(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    nodes = [
        node(b"/a", 2, stat.S_IFLNK | 0o777, target=os.fsencode(outside)),
        node(b"/a/b", 3, stat.S_IFIFO | 0o600),
    ]
    with pytest.raises(CorruptGuestError, match="several files named"):
        export(inside, nodes)
    assert list(outside.iterdir()) == []


def test_two_files_of_one_name_are_corrupt(tmp_path: Path) -> None:
    nodes = [node(b"/a", number, stat.S_IFREG | 0o600) for number in (2, 3)]
    with pytest.raises(CorruptGuestError, match="several files named /a"):
        export(tmp_path, nodes, {2: [], 3: []})


def test_file_that_is_not_as_described_is_corrupt(tmp_path: Path) -> None:
    contents = {2: [Extent(0, Where.SWAPPED, 4096)]}
    with pytest.raises(CorruptGuestError, match="not as it was described"):
        export(tmp_path, [node(b"/a", 2, stat.S_IFREG | 0o600, size=4096)], contents)


# --- pages ---------------------------------------------------------------------------------

VMEMMAP = 0x8000


def frames() -> tuple[FakeGuest, PageFrames]:
    guest = FakeGuest()
    guest.struct("page", ("flags", "Q"), ("mapping", "p"), ("index", "Q"), ("pad", 40))
    guest.variables["vmemmap_base"] = guest.place(0x7000, "Q", VMEMMAP)
    guest.enum("pageflags", PG_locked=0, PG_uptodate=3)
    return guest, PageFrames(guest.kernel)


def page(guest: FakeGuest, number: int, **values: object) -> int:
    at = VMEMMAP + number * 64
    guest.set("page", at, **values)
    return at


def test_page_of_a_folio_is_found_by_its_index() -> None:
    guest, reader = frames()
    head = page(guest, 16, flags=8, mapping=0x500, index=32)
    guest.place(18 * 4096, "5s", b"third")
    found = reader.read(head, 0x500, 34)
    assert found is not None
    assert found[:5] == b"third"


def test_page_never_filled_is_a_hole() -> None:
    guest, reader = frames()
    assert reader.read(page(guest, 16, mapping=0x500, index=0), 0x500, 0) is None


@pytest.mark.parametrize(
    ("mapping", "index", "shift"),
    [(0x600, 0, 0), (0x500, 1, 0), (0x500, -(1 << 30), 0), (0x500, 0, 8)],
)
def test_page_of_another_file_is_corrupt(mapping: int, index: int, shift: int) -> None:
    guest, reader = frames()
    at = page(guest, 16, flags=8, mapping=mapping, index=index)
    with pytest.raises(CorruptGuestError, match="foreign page"):
        reader.read(at + shift, 0x500, 0)


# --- attributes, links and content -----------------------------------------------------------


class TmpfsGuest(FakeGuest):
    """Inodes of a tmpfs."""

    def __init__(self) -> None:
        super().__init__()
        self.struct("list_head", ("next", "p"), ("prev", "p"))
        self.struct("page", ("flags", "Q"), ("mapping", "p"), ("index", "Q"), ("pad", 40))
        self.struct("xa_node", ("shift", "B"), ("pad", 7), ("slots", ("Q", 64)))
        self.struct("xarray", ("xa_head", "p"))
        self.struct("address_space", ("i_pages", "xarray"))
        self.struct("kid", ("val", "I"))
        self.struct("inode", ("i_mode", "H"), ("pad", 2), ("i_nlink", "I"), ("i_ino", "Q"),
                    ("i_uid", "kid"), ("i_gid", "kid"), ("i_size", "q"), ("i_rdev", "I"),
                    ("pad2", 4), ("i_acl", "p"), ("i_default_acl", "p"), ("i_link", "p"),
                    ("i_mapping", "p"))  # fmt: skip
        self.struct("simple_xattrs", ("head", "list_head"))
        self.struct("shmem_inode_info", ("xattrs", "simple_xattrs"), ("vfs_inode", "inode"))
        self.struct("simple_xattr", ("list", "list_head"), ("name", "p"), ("size", "Q"),
                    ("value", ("B", 0)))  # fmt: skip
        self.struct("posix_acl_entry", ("e_tag", "h"), ("e_perm", "H"), ("e_uid", "kid"))
        self.struct("posix_acl", ("a_count", "I"), ("a_entries", ("Q", 0)))
        self.enum("pageflags", PG_uptodate=3)
        self.variables["vmemmap_base"] = self.place(0x7000, "Q", VMEMMAP)
        self.next = 0x40000
        self.reader = TmpfsReaderClass(self.kernel)

    def inode(self, **values: object) -> Object:
        info = self.put("shmem_inode_info", xattrs__head__next=0)
        self.place(info, "Q", info)
        at = info + 16
        self.set("inode", at, i_mapping=self.put("address_space"), **values)
        return DrgnObject(self.prog, self.type("struct inode *"), at)

    def head(self, inode: Object, entry: int) -> None:
        mapping = inode.i_mapping.value_()
        self.place(mapping, "Q", entry)


def test_content_tells_pages_holes_and_what_is_swapped() -> None:
    guest = TmpfsGuest()
    inode = guest.inode(i_size=4 * 4096 + 10)
    mapping = inode.i_mapping.value_()
    guest.memory[20 * 4096 : 20 * 4096 + 4] = b"page"
    at = page(guest, 20, flags=8, mapping=mapping, index=1)
    never = page(guest, 21, flags=0, mapping=mapping, index=3)
    behind = page(guest, 22, flags=8, mapping=mapping, index=5)
    xa_node = guest.put("xa_node")
    for index, entry in ((1, at), (2, 0x1235), (3, never), (4, 0x77), (5, behind)):
        guest.place(xa_node + 8 + index * 8, "Q", entry)
    guest.head(inode, xa_node + 2)
    found = list(guest.reader.content(inode))
    assert [(one.position, one.size) for one in found] == [(4096, 4096), (8192, 4096), (16384, 10)]
    assert isinstance(found[0].data, bytes)
    assert found[0].data[:4] == b"page"
    assert [one.data for one in found[1:]] == [Where.SWAPPED, Where.SWAPPED]


def test_symbolic_links_short_and_long() -> None:
    guest = TmpfsGuest()
    short = guest.inode(i_size=3, i_link=guest.string(b"abc"))
    assert guest.reader._target(short, short.i_link.value_(), 3) == (b"abc", 0, 0)
    long = guest.inode(i_size=200)
    guest.memory[20 * 4096 : 20 * 4096 + 201] = b"l" * 200 + b"\0"
    guest.head(long, page(guest, 20, flags=8, mapping=long.i_mapping.value_(), index=0))
    assert guest.reader._target(long, 0, 200) == (b"l" * 200, 0, 0)
    guest.head(long, 0x1235)
    assert guest.reader._target(long, 0, 200) == (None, True, False)
    guest.head(long, 0)
    with pytest.raises(CorruptGuestError, match="leads nowhere"):
        guest.reader._target(long, 0, 200)
    with pytest.raises(CorruptGuestError, match="bytes"):
        guest.reader._target(long, 0, 1 << 40)


def test_attributes_and_access_lists() -> None:
    guest = TmpfsGuest()
    acl = guest.put("posix_acl", a_count=2)
    guest.new(16)
    guest.place(acl + 4, "hHIhHI", 1, 7, 123, 8, 5, 4)
    inode = guest.inode()
    head = inode.value_() - 16
    xattr = guest.put("simple_xattr", name=guest.string(b"user.x"), size=3)
    guest.new(8)
    guest.place(xattr + 32, "3s", b"a\0b")
    guest.place(head, "Q", xattr)
    guest.place(xattr, "Q", head)
    undefined = 0xFFFFFFFF
    access = struct.pack("<I2H I2H I", 2, 1, 7, undefined, 8, 5, 4)
    assert guest.reader._attributes(inode, acl, (1 << 64) - 1) == (
        (b"system.posix_acl_access", access), (b"user.x", b"a\0b"))  # fmt: skip


def test_absurd_attributes_are_corrupt() -> None:
    guest = TmpfsGuest()
    inode = guest.inode()
    head = inode.value_() - 16
    with pytest.raises(CorruptGuestError, match="access control list has"):
        guest.reader._attributes(inode, guest.put("posix_acl", a_count=1 << 31), 0)
    xattr = guest.put("simple_xattr", name=guest.string(b"user.x"), size=1 << 40)
    guest.place(head, "Q", xattr)
    guest.place(xattr, "Q", head)
    with pytest.raises(CorruptGuestError, match="attribute has"):
        guest.reader._attributes(inode, 0, 0)
    guest.set("simple_xattr", xattr, size=0)
    guest.place(xattr, "Q", xattr)
    with pytest.raises(CorruptGuestError, match="contains itself"):
        guest.reader._attributes(inode, 0, 0)


def test_file_with_more_pages_than_memory_is_corrupt() -> None:
    guest = TmpfsGuest()
    inode = guest.inode(i_size=1 << 62)
    # One entry at a high level of the tree stands for a number of pages that nobody can walk.
    xa_node = guest.put("xa_node", shift=42)
    guest.place(xa_node + 8, "Q", 0x1235)
    guest.head(inode, xa_node + 2)
    with pytest.raises(CorruptGuestError, match="more pages than there is memory"):
        list(guest.reader.content(inode))


def test_files_that_share_their_pages_are_corrupt() -> None:
    guest = TmpfsGuest()
    guest.reader._max_pages = 3
    inodes = [guest.inode(i_size=3 * 4096) for _ in range(2)]
    xa_node = guest.put("xa_node")
    guest.place(xa_node + 8, "2Q", 0x1235, 0x1235)
    for inode in inodes:
        guest.head(inode, xa_node + 2)
    assert guest.reader._count(inodes[0]) == (2, 0)
    assert guest.reader._count(inodes[0]) == (2, 0)  # another name of the same file
    with pytest.raises(CorruptGuestError, match="more pages than there is memory"):
        guest.reader._count(inodes[1])
