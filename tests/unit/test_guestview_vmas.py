"""Mappings of a process in a tree and in a list, made right and made by a hostile guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError
from ouassister.kernel import vmas
from ouassister.kernel.vmas import Vmas

if TYPE_CHECKING:
    from ouassister.kernel.file_names import FileNames

LEAF, RANGE, ARANGE = 1, 2, 3


class Names:
    """Names of files by the address of their directory entry."""

    def file_system(self, _sb: int) -> tuple[bytes, int]:
        return b"ext4", 254 << 20 | 1

    def name(self, _mnt: int, dentry: int, _inode: int) -> bytes:
        return b"/file%d" % dentry


def guest_with(*, tree: bool) -> FakeGuest:
    guest = FakeGuest()
    guest.struct("path", ("mnt", "p"), ("dentry", "p"))
    guest.struct("file", ("f_path", "path"), ("f_inode", "p"))
    guest.struct("inode", ("i_ino", "Q"), ("i_sb", "p"))
    guest.struct("vm_special_mapping", ("name", "p"))
    guest.struct("anon_vma_name", ("kref", "I"), ("name", 80))
    common = [("vm_start", "Q"), ("vm_end", "Q"), ("vm_flags", "Q"), ("vm_pgoff", "Q"),
              ("vm_file", "p"), ("vm_ops", "p"), ("vm_private_data", "p"),
              ("anon_name", "p")]  # fmt: skip
    marks = [("start_brk", "Q"), ("brk", "Q"), ("start_stack", "Q")]
    if tree:
        guest.struct("maple_tree", ("ma_root", "p"))
        guest.struct("maple_range_64", ("parent", "p"), ("pivot", ("Q", 15)), ("slot", ("Q", 16)))
        guest.struct("maple_arange_64", ("parent", "p"), ("pivot", ("Q", 9)), ("slot", ("Q", 10)))
        guest.struct("maple_node", ("raw", 256))
        guest.struct("vm_area_struct", *common)
        guest.struct("mm_struct", ("mm_mt", "maple_tree"), *marks)
    else:
        guest.struct("vm_area_struct", *common, ("vm_next", "p"))
        guest.struct("mm_struct", ("mmap", "p"), *marks)
    return guest


def reader(guest: FakeGuest) -> Vmas:
    return Vmas(guest.kernel, cast("FileNames", Names()))


def leaf(guest: FakeGuest, entries: list[tuple[int, int]], *, kind: int = LEAF) -> int:
    """A node with (last address, slot) pairs; returns its encoded address."""
    at = guest.new(256, align=256)
    first = 16 if kind in (LEAF, RANGE) else 10
    for index, (last, slot) in enumerate(entries):
        if index < first - 1:
            guest.place(at + 8 + index * 8, "Q", last)
        guest.place(at + 8 + (first - 1) * 8 + index * 8, "Q", slot)
    return at | kind << 3 | 4


def mm_of(guest: FakeGuest, node: int) -> int:
    return guest.put("mm_struct", mm_mt__ma_root=node | 2, start_brk=0x50, brk=0x60,
                     start_stack=0x7010)  # fmt: skip


def test_tree_of_two_levels_is_read_in_order() -> None:
    guest = guest_with(tree=True)
    inode = guest.put("inode", i_ino=7)
    file = guest.put("file", f_path__dentry=5, f_inode=inode)
    one = guest.put("vm_area_struct", vm_start=0x1000, vm_end=0x3000, vm_flags=0x5, vm_pgoff=2,
                    vm_file=file)  # fmt: skip
    two = guest.put("vm_area_struct", vm_start=0x3000, vm_end=0x4000, vm_flags=0x83)
    three = guest.put("vm_area_struct", vm_start=0x7000, vm_end=0x8000, vm_flags=0x3)
    low = leaf(guest, [(0xFFF, 0), (0x2FFF, one), (0x3FFF, two)])
    high = leaf(guest, [(0x6FFF, 0), (0x7FFF, three), (0, 0)])
    found = reader(guest).read(mm_of(guest, leaf(guest, [(0x3FFF, low), (0, high)], kind=ARANGE)))
    assert [(v.start, v.end, v.permissions, v.offset, v.inode, v.path) for v in found] == [
        (0x1000, 0x3000, "r-xp", 0x2000, 7, b"/file5"),
        (0x3000, 0x4000, "rw-s", 0, 0, b""),
        (0x7000, 0x8000, "rw-p", 0, 0, b"[stack]"),
    ]
    assert (found[0].major, found[0].minor) == (254, 1)


def test_tree_of_a_process_without_mappings_is_empty() -> None:
    guest = guest_with(tree=True)
    assert reader(guest).read(guest.put("mm_struct")) == ()


def test_tree_that_contains_itself_is_corrupt() -> None:
    guest = guest_with(tree=True)
    node = leaf(guest, [(0x3FFF, 0), (0, 0)], kind=ARANGE)
    guest.place((node & ~0xFF) + 8 + 9 * 8, "Q", node)
    with pytest.raises(CorruptGuestError, match="cyclic"):
        reader(guest).read(mm_of(guest, node))


def test_tree_with_a_node_of_no_known_kind_is_corrupt() -> None:
    guest = guest_with(tree=True)
    with pytest.raises(CorruptGuestError, match="kind 9"):
        reader(guest).read(mm_of(guest, leaf(guest, [(0x3FFF, 0)]) & ~0x78 | 9 << 3))


def test_mappings_that_overlap_are_corrupt() -> None:
    guest = guest_with(tree=True)
    vma = guest.put("vm_area_struct", vm_start=0x1000, vm_end=0x3000)
    node = leaf(guest, [(0x2FFF, vma), (0x3FFF, vma)])
    with pytest.raises(CorruptGuestError, match="overlap"):
        reader(guest).read(mm_of(guest, node))


def test_tree_with_more_mappings_than_there_may_be_is_corrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = guest_with(tree=True)
    monkeypatch.setattr(vmas, "_MAX_VMAS", 2)
    areas = [
        guest.put("vm_area_struct", vm_start=at << 12, vm_end=(at + 1) << 12) for at in range(1, 5)
    ]
    node = leaf(guest, [((at + 2 << 12) - 1, area) for at, area in enumerate(areas)])
    with pytest.raises(CorruptGuestError, match="more than 2"):
        reader(guest).read(mm_of(guest, node))


def test_list_is_read_to_its_end() -> None:
    guest = guest_with(tree=False)
    name = guest.put("anon_vma_name", name=b"mine")
    last = guest.put("vm_area_struct", vm_start=0x5000, vm_end=0x6000, anon_name=name)
    first = guest.put("vm_area_struct", vm_start=0x1000, vm_end=0x2000, vm_next=last)
    found = reader(guest).read(guest.put("mm_struct", mmap=first))
    assert [(v.start, v.path) for v in found] == [(0x1000, b""), (0x5000, b"[anon:mine]")]


def test_list_that_contains_itself_is_corrupt() -> None:
    guest = guest_with(tree=False)
    vma = guest.put("vm_area_struct", vm_start=0x1000, vm_end=0x2000)
    guest.set("vm_area_struct", vma, vm_next=vma)
    with pytest.raises(CorruptGuestError, match="overlap"):
        reader(guest).read(guest.put("mm_struct", mmap=vma))


def test_special_mapping_and_heap_are_named() -> None:
    guest = guest_with(tree=False)
    guest.variables["special_mapping_vmops"] = 0x7777
    special = guest.put("vm_special_mapping", name=guest.string(b"[vdso]"))
    heap = guest.put("vm_area_struct", vm_start=0x5000, vm_end=0x6000)
    vdso = guest.put("vm_area_struct", vm_start=0x1000, vm_end=0x2000, vm_ops=0x7777,
                     vm_private_data=special, vm_next=heap)  # fmt: skip
    mm = guest.put("mm_struct", mmap=vdso, start_brk=0x5000, brk=0x6000)
    assert [v.path for v in reader(guest).read(mm)] == [b"[vdso]", b"[heap]"]
