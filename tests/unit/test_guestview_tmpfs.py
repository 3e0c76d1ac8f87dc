"""What a tmpfs contains, from its pages and inodes; what contradicts itself is refused."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from drgn import Object as DrgnObject
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError
from ouassister.kernel import dentries
from ouassister.kernel.page_frames import PageFrames
from ouassister.kernel.tmpfs import TmpfsReader, Where

if TYPE_CHECKING:
    from drgn import Object

# --- names ---------------------------------------------------------------------------------


def names_below(guest: FakeGuest, *names: bytes) -> list[bytes]:
    """Names of all that a directory has, of which each is told by hand."""
    guest.struct("hlist_node", ("next", "p"), ("pprev", "p"))
    guest.struct("hlist_head", ("first", "p"))
    guest.struct("qstr", ("hash", "I"), ("len", "I"), ("name", "p"))
    guest.struct("dentry", ("d_hash", "hlist_node"), ("d_name", "qstr"), ("d_sib", "hlist_node"),
                 ("d_children", "hlist_head"))  # fmt: skip
    before = 0
    for name in reversed(names):
        at = guest.put("dentry", d_hash__pprev=1, d_name__len=len(name), d_sib__next=before,
                       d_name__name=guest.string(name))  # fmt: skip
        before = guest.container("struct dentry", "d_hash", at).d_sib.address_of_().value_()
    root = guest.put("dentry", d_children__first=before)
    entry = DrgnObject(guest.prog, guest.type("struct dentry *"), root)
    return [path for path, _ in dentries.below(guest.kernel, entry, b"/")]


def test_names_are_told() -> None:
    found = names_below(FakeGuest(), b"a", b"..b", b"\x1b\n", b"n" * 255)
    assert sorted(found) == [b"/", b"/\x1b\n", b"/..b", b"/a", b"/" + b"n" * 255]


@pytest.mark.parametrize("name", [b"..", b".", b"/", b"../out", b"a/../../out", b"a\0b"])
def test_name_that_leads_out_is_corrupt(name: bytes) -> None:
    with pytest.raises(CorruptGuestError, match="directory entry is named"):
        names_below(FakeGuest(), b"a", name)


@pytest.mark.parametrize("name", [b"", b"n" * 256])
def test_name_of_absurd_length_is_corrupt(name: bytes) -> None:
    with pytest.raises(CorruptGuestError, match=f"a name of {len(name)} bytes"):
        names_below(FakeGuest(), name)


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
        self.reader = TmpfsReader(self.kernel)

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
