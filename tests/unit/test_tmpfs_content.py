"""What is read of tmpfs, and what is left out by name: bounds, swap, files that contradict."""

from __future__ import annotations

import stat
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from drgn import Object as DrgnObject
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.guest_model import Tmpfs, TmpfsNode
from ouassister.kernel.tmpfs import Extent, TmpfsReader, Where
from ouassister.kernel.tmpfs_content import Mounted, TmpfsContents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from drgn import Object

    from ouassister.guest_model import TmpfsContent

NOEXEC = 0x04
DIRECTORY, REGULAR, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777


class Sleeper(FakeGuest):
    """Some tmpfs whose files are told by hand, but for what inodes say of their pages."""

    def __init__(self) -> None:
        super().__init__()
        self.struct("address_space", ("nrpages", "Q"))
        self.struct("inode", ("i_mapping", "p"))
        self.struct("shmem_inode_info", ("swapped", "Q"), ("vfs_inode", "inode"))
        self.struct("shmem_sb_info", ("max_blocks", "Q"), ("max_inodes", "Q"))
        self.trees: dict[int, list[tuple[bytes, Object]]] = {}
        self.modes: dict[int, int] = {}
        self.contents: dict[int, list[Extent]] = {}
        self.broken: set[int] = set()
        self.ram = False

    def tmpfs(self, target: bytes, *, flags: int = 0) -> Mounted:
        number = len(self.trees) + 1
        self.trees[number] = []
        self.file(number, b"/", DIRECTORY)
        info = self.put("shmem_sb_info", max_blocks=16, max_inodes=99)
        sb = SimpleNamespace(
            s_fs_info=_value(info), s_root=SimpleNamespace(read_=lambda: number), target=target
        )
        mount = SimpleNamespace(mnt_id=_value(number), mnt=SimpleNamespace(mnt_flags=_value(flags)))
        return Mounted(target, cast("Object", sb), (cast("Object", mount),))

    def file(
        self,
        number: int,
        path: bytes,
        mode: int = REGULAR,
        *,
        pages: int = 0,
        swapped: int = 0,
        extents: Iterable[Extent] = (),
    ) -> Object:
        mapping = self.put("address_space", nrpages=pages)
        at = self.put("shmem_inode_info", swapped=swapped, vfs_inode__i_mapping=mapping) + 8
        inode = DrgnObject(self.prog, self.type("struct inode *"), at)
        self.name(number, path, inode)
        self.modes[at] = mode
        self.contents[at] = list(extents)
        return inode

    def name(self, number: int, path: bytes, inode: Object) -> None:
        self.trees[number].append((path, inode))

    # --- what a TmpfsReader tells ---------------------------------------------------------------

    def is_ramfs(self, _sb: object) -> bool:
        return self.ram

    def inodes(self, root: int) -> Iterator[tuple[bytes, Object]]:
        if root in self.broken:
            raise CorruptGuestError("the dentry cache is cyclic")
        yield from self.trees[root]

    def describe(
        self, path: bytes, inode: Object, unread: list[str], *, attributes: bool, counted: bool
    ) -> TmpfsNode:
        assert not counted
        assert attributes is not self.ram
        if path == b"/bad":
            raise CorruptGuestError("a symbolic link leads nowhere")
        if path == b"/odd":
            unread += ["attributes of /odd: no such member", "/odd: 1 pages are swapped out"]
        return TmpfsNode(
            path=path, inode=1, mode=self.modes[inode.value_()], uid=0, gid=0, links=1, size=9,
            major=0, minor=0, atime_ns=0, mtime_ns=0, ctime_ns=0, target=None, xattrs=(),
            swapped=1, absent=0,
        )  # fmt: skip

    def tree(
        self, target: bytes, _sb: object, nodes: Iterable[TmpfsNode], _unread: object
    ) -> Tmpfs:
        return Tmpfs(target, 0, 1, tuple(nodes))

    def content(self, inode: Object) -> Iterator[Extent]:
        yield from self.contents[inode.value_()]

    def look(self, *mounted: Mounted, **bounds: int) -> tuple[TmpfsContent, ...]:
        reader = cast("TmpfsReader", self)
        return TmpfsContents(self.kernel, reader, **bounds).read(mounted)


def _value(number: int) -> SimpleNamespace:
    return SimpleNamespace(value_=lambda: number)


def page(position: int, data: bytes | Where = b"x" * 4096) -> Extent:
    return Extent(position, data, 4096)


def test_runs_limits_and_names_are_told() -> None:
    guest = Sleeper()
    mounted = guest.tmpfs(b"/run", flags=NOEXEC | 1)
    extents = [page(0), page(4096), page(3 * 4096, b"end")]
    inode = guest.file(1, b"/d.x/file", pages=3, extents=extents)
    guest.file(1, b"/d.x", DIRECTORY)
    guest.file(1, b"/d", DIRECTORY)
    guest.name(1, b"/d/file", inode)
    (told,) = guest.look(mounted)
    assert (told.size_bytes, told.inodes, told.noexec) == (16 * 4096, 99, (1,))
    # By bytes "/d.x/file" is the first; in the tree "/d/file" is.
    assert told.hard_links == ((b"/d.x/file", b"/d/file"),)
    ((path, runs),) = ((one.path, one.runs) for one in told.files)
    assert (path, runs) == (b"/d/file", ((0, b"x" * 8192), (3 * 4096, b"end")))
    assert [node.path for node in told.tmpfs.nodes] == [
        b"/", b"/d", b"/d/file", b"/d.x", b"/d.x/file"]  # fmt: skip
    assert told.left_out == ()


def test_file_with_swapped_pages_is_left_out_unread() -> None:
    guest = Sleeper()
    mounted = guest.tmpfs(b"/run")
    guest.file(1, b"/swapped", pages=1, swapped=7, extents=[page(0, Where.SWAPPED)])
    guest.file(1, b"/absent", pages=1, extents=[page(0, Where.ABSENT)])
    guest.file(1, b"/late", pages=1, extents=[page(0, Where.SWAPPED)])
    guest.file(1, b"/link", LINK)
    guest.file(1, b"/odd", DIRECTORY)
    (told,) = guest.look(mounted)
    assert told.files == ()
    assert sorted(told.left_out) == [
        (b"", "attributes of /odd: no such member"),
        (b"/absent", "a page is absent from the save"),
        (b"/late", "a page is swapped out"),
        (b"/link", "where it leads to is swapped out"),
        (b"/swapped", "7 pages are swapped out"),
    ]


def test_largest_files_are_left_out_beyond_the_bound() -> None:
    guest = Sleeper()
    run, shared = guest.tmpfs(b"/run"), guest.tmpfs(b"/dev/shm")
    guest.file(1, b"/two", pages=2, extents=[page(0), page(4096)])
    guest.file(2, b"/one", pages=1, extents=[page(0)])
    guest.file(2, b"/huge", pages=1 << 40, extents=[])
    guest.file(1, b"/three", pages=3)
    guest.file(1, b"/sparse", pages=0)
    told = guest.look(run, shared, max_bytes=5 * 4096)
    assert [{one.path for one in each.files} for each in told] == [
        {b"/two", b"/sparse"}, {b"/one"}]  # fmt: skip
    assert told[0].left_out == ((b"/three", "12 KiB are too much"),)
    assert told[1].left_out == ((b"/huge", f"{1 << 42} KiB are too much"),)


def test_file_that_has_more_pages_than_it_says_is_left_out() -> None:
    guest = Sleeper()
    mounted = guest.tmpfs(b"/run")
    guest.file(1, b"/liar", pages=1, extents=[page(0), page(4096)])
    (told,) = guest.look(mounted)
    assert told.left_out == ((b"/liar", "it has more pages than its inode says"),)
    assert told.files == ()


def test_file_that_contradicts_itself_is_left_out() -> None:
    guest = Sleeper()
    mounted = guest.tmpfs(b"/run")
    inode = guest.file(1, b"/broken", pages=1)
    guest.set("inode", inode.value_(), i_mapping=1 << 60)
    guest.file(1, b"/sound", pages=1, extents=[page(0)])
    guest.file(1, b"/bad")
    (told,) = guest.look(mounted)
    assert [path for path, _ in told.left_out] == [b"/bad", b"/broken"]
    assert [one.path for one in told.files] == [b"/sound"]


def test_tmpfs_with_too_many_files_is_empty_and_named() -> None:
    guest = Sleeper()
    small, large, none = guest.tmpfs(b"/run"), guest.tmpfs(b"/tmp"), guest.tmpfs(b"/x")
    for number in range(5):
        guest.file(2, b"/%d" % number)
    told = guest.look(large, small, none, max_nodes=4)  # /run is the first in any case
    assert [len(one.tmpfs.nodes) for one in told] == [1, 0, 1]
    assert told[1].left_out == ((b"", "it has more than 3 files"),)


def test_tmpfs_that_contradicts_itself_does_not_hide_the_others() -> None:
    guest = Sleeper()
    broken, sound = guest.tmpfs(b"/run"), guest.tmpfs(b"/tmp")
    guest.broken.add(1)
    told = guest.look(broken, sound)
    assert told[0].left_out == ((b"", "the dentry cache is cyclic"),)
    assert told[0].tmpfs.nodes == ()
    assert [node.path for node in told[1].tmpfs.nodes] == [b"/"]


def test_ramfs_has_no_limits() -> None:
    guest = Sleeper()
    guest.ram = True
    mounted = guest.tmpfs(b"/run/credentials/x")
    guest.file(1, b"/secret", pages=1, swapped=1, extents=[page(0, b"key")])
    (told,) = guest.look(mounted)
    assert (told.size_bytes, told.inodes) == (0, 0)
    assert [one.runs for one in told.files] == [((0, b"key"),)]


def test_kernel_without_the_layout_is_unsupported() -> None:
    guest = Sleeper()
    del guest.structs["shmem_sb_info"]
    with pytest.raises(UnsupportedGuestError):
        guest.look()
