"""Open files, control groups and memory of a process, made right and made by a hostile guest."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, cast

import pytest
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError, PageAbsentError
from ouassister.guest_model import VirtAddr, Vma
from ouassister.kernel.cgroups import Cgroups, slice_of, unit_of, user_unit_of
from ouassister.kernel.files import Files
from ouassister.kernel.process_memory import NotHereError, PageState, ProcessMemory

if TYPE_CHECKING:
    from drgn import Object

    from ouassister.kernel.file_names import FileNames

# --- open files ----------------------------------------------------------------------------


class Names:
    def file_system(self, _sb: int) -> tuple[bytes, int]:
        return b"ext4", 8 << 20

    def name(self, _mnt: int, dentry: int, _inode: int) -> bytes:
        return b"/%d" % dentry


def guest_with_files() -> tuple[FakeGuest, Files]:
    guest = FakeGuest()
    guest.struct("path", ("mnt", "p"), ("dentry", "p"))
    guest.struct("file", ("f_path", "path"), ("f_inode", "p"), ("f_flags", "I"), ("f_mode", "I"),
                 ("f_pos", "q"))  # fmt: skip
    guest.struct("inode", ("i_mode", "H"), ("pad", 6), ("i_ino", "Q"), ("i_sb", "p"),
                 ("i_nlink", "I"))  # fmt: skip
    guest.struct("fdtable", ("max_fds", "I"), ("pad", 4), ("fd", "p"), ("close_on_exec", "p"),
                 ("open_fds", "p"))  # fmt: skip
    guest.struct("files_struct", ("fdt", "p"))
    return guest, Files(guest.kernel, cast("FileNames", Names()))


def table(guest: FakeGuest, size: int, files: dict[int, int], cloexec: int = 0) -> int:
    slots, bits, on_exec = (guest.new(4096 * 8), guest.new(512), guest.new(512))
    for fd, file in files.items():
        guest.place(slots + fd * 8, "Q", file)
        guest.memory[bits + fd // 8] |= 1 << fd % 8
    guest.place(on_exec, "Q", cloexec)
    fdt = guest.put("fdtable", max_fds=size, fd=slots, open_fds=bits, close_on_exec=on_exec)
    return guest.put("files_struct", fdt=fdt)


def test_sparse_table_of_files() -> None:
    guest, reader = guest_with_files()
    live = guest.put("inode", i_mode=0o100644, i_ino=5, i_nlink=1)
    gone = guest.put("inode", i_mode=0o100600, i_ino=6, i_nlink=0)
    first = guest.put("file", f_path__dentry=1, f_inode=live, f_flags=0o2, f_mode=3, f_pos=77)
    second = guest.put("file", f_path__dentry=2, f_inode=gone, f_flags=0o100001, f_mode=2)
    found = reader.read(table(guest, 4096, {0: first, 3000: second}, cloexec=1))
    assert [(f.fd, f.path, f.flags, f.position, f.deleted) for f in found] == [
        (0, b"/1", 0o2000002, 77, False), (3000, b"/2", 0o100001, 0, True)]  # fmt: skip
    assert [(f.readable, f.writable, f.inode) for f in found] == [
        (True, True, 5), (False, True, 6)]  # fmt: skip


@pytest.mark.parametrize("size", [0, 1 << 21, 0xFFFF_FFFF])
def test_absurd_table_of_files_is_corrupt(size: int) -> None:
    guest, reader = guest_with_files()
    with pytest.raises(CorruptGuestError, match=f"table of {size}"):
        reader.read(table(guest, size, {}))


def test_slot_that_leads_nowhere_is_corrupt() -> None:
    guest, reader = guest_with_files()
    with pytest.raises(CorruptGuestError, match="leads nowhere"):
        reader.read(table(guest, 64, {1: 0xDEAD0000_0000}))


# --- control groups ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "unit", "user_unit", "in_slice"),
    [
        (b"/", b"", b"", b"-.slice"),
        (b"/init.scope", b"init.scope", b"", b"-.slice"),
        (b"/system.slice", b"", b"", b"system.slice"),
        (b"/system.slice/ssh.service", b"ssh.service", b"", b"system.slice"),
        (b"/system.slice/udevd.service/udev", b"udevd.service", b"", b"system.slice"),
        (b"/system.slice/system-getty.slice/getty@tty1.service", b"getty@tty1.service", b"",
         b"system-getty.slice"),
        (b"/system.slice/a\\x2db.service", b"a\\x2db.service", b"", b"system.slice"),
        (b"/user.slice/user-0.slice/session-3.scope", b"session-3.scope", b"", b"user-0.slice"),
        (b"/user.slice/user-7.slice/user@7.service/app.slice/app-x.slice/dbus.service",
         b"user@7.service", b"dbus.service", b"user-7.slice"),
        (b"/user.slice/user-7.slice/user@7.service/init.scope", b"user@7.service", b"init.scope",
         b"user-7.slice"),
        # Names that clash with the kernel's own files get an underscore in front.
        (b"/_cgroup.service", b"cgroup.service", b"", b"-.slice"),
        (b"/system.slice/__odd.service", b"_odd.service", b"", b"system.slice"),
        (b"/system.slice/no unit/x.service", b"", b"", b"system.slice"),
        (b"/system.slice/.service", b"", b"", b"system.slice"),
        (b"/system.slice/@x.service", b"", b"", b"system.slice"),
        (b"/system.slice/template@.service", b"", b"", b"system.slice"),
        (b"/system.slice/" + b"x" * 300 + b".service", b"", b"", b"system.slice"),
        (b"/docker/0123", b"", b"", b"-.slice"),
        (b"/x@y.slice/ssh.service", b"", b"", b"-.slice"),
    ],
)  # fmt: skip
def test_units_are_told_as_systemd_does(
    path: bytes, unit: bytes, user_unit: bytes, in_slice: bytes
) -> None:
    assert (unit_of(path), user_unit_of(path), slice_of(path)) == (unit, user_unit, in_slice)


def guest_with_cgroups() -> FakeGuest:
    guest = FakeGuest()
    guest.struct("list_head", ("next", "p"), ("prev", "p"))
    guest.struct("kernfs_node", ("parent", "p"), ("name", "p"))
    guest.struct("cgroup", ("kn", "p"), ("root", "p"))
    guest.struct("cgroup_root", ("subsys_mask", "I"), ("hierarchy_id", "i"), ("name", 64))
    guest.struct("cgrp_cset_link", ("cgrp", "p"), ("cgrp_link", "list_head"))
    guest.struct("css_set", ("dfl_cgrp", "p"), ("cgrp_links", "list_head"))
    guest.struct("task_struct", ("cgroups", "p"))
    return guest


def task(guest: FakeGuest, css_set: int) -> Object:
    return guest.container("task_struct", "cgroups", guest.put("task_struct", cgroups=css_set))


def chain(guest: FakeGuest, css_set: int, cgroups: list[int]) -> None:
    links = [guest.put("cgrp_cset_link", cgrp=one) for one in cgroups]
    nodes = [css_set + 8, *(link + 8 for link in links), css_set + 8]
    for here, after in itertools.pairwise(nodes):
        guest.place(here, "Q", after)


def test_hierarchies_of_both_versions() -> None:
    guest = guest_with_cgroups()
    top = guest.put("kernfs_node", name=guest.string(b""))
    below = guest.put("kernfs_node", parent=top, name=guest.string(b"ssh.service"))
    unified = guest.put("cgroup", kn=below, root=guest.put("cgroup_root", hierarchy_id=0))
    root = guest.put("cgroup_root", hierarchy_id=1, name=b"systemd")
    named = guest.put("cgroup", kn=top, root=root)
    css_set = guest.put("css_set", dfl_cgrp=unified)
    chain(guest, css_set, [named, unified])
    found = Cgroups(guest.kernel).of(task(guest, css_set))
    assert [(one.hierarchy, one.controllers, one.path) for one in found] == [
        (0, "", b"/ssh.service"), (1, "name=systemd", b"/")]  # fmt: skip


def test_control_group_below_itself_is_corrupt() -> None:
    guest = guest_with_cgroups()
    node = guest.put("kernfs_node", name=guest.string(b"x"))
    guest.set("kernfs_node", node, parent=node)
    cgroup = guest.put("cgroup", kn=node, root=guest.put("cgroup_root"))
    css_set = guest.put("css_set", dfl_cgrp=cgroup)
    chain(guest, css_set, [cgroup])
    with pytest.raises(CorruptGuestError, match="levels deep"):
        Cgroups(guest.kernel).of(task(guest, css_set))


def test_links_that_lead_in_circles_are_corrupt() -> None:
    guest = guest_with_cgroups()
    node = guest.put("kernfs_node", name=guest.string(b""))
    cgroup = guest.put("cgroup", kn=node, root=guest.put("cgroup_root"))
    css_set = guest.put("css_set", dfl_cgrp=cgroup)
    link = guest.put("cgrp_cset_link", cgrp=cgroup)
    guest.place(css_set + 8, "Q", link + 8)
    guest.place(link + 8, "Q", link + 8)
    with pytest.raises(CorruptGuestError, match="contains itself"):
        Cgroups(guest.kernel).of(task(guest, css_set))


# --- memory --------------------------------------------------------------------------------

PAGE = 4096
FRAME = 0x000F_FFFF_FFFF_F000
ABSENT = 0x70000


class Absent(FakeGuest):
    """One page was never saved."""

    def read(self, address: int, size: int) -> bytes:
        if address & ~0xFFF == ABSENT:
            raise PageAbsentError(address)
        return super().read(address, size)


def memory_of(entries: dict[int, int], *, large: int = 0) -> ProcessMemory:
    """Make a process whose first pages are mapped by these entries; ``large`` maps 2 MiB."""
    guest = Absent()
    guest.struct("mm_struct", ("pgd", "p"), ("arg_start", "Q"), ("arg_end", "Q"),
                 ("env_start", "Q"), ("env_end", "Q"))  # fmt: skip
    for level in (0x10000, 0x11000, 0x12000):
        guest.place(level, "Q", level + 0x1000 | 7)
    guest.place(0x12008, "Q", large)
    for page, entry in entries.items():
        guest.place(0x13000 + page * 8, "Q", entry)
    guest.place(0x20000, "12s", b"one\0two=2\0x\0")
    guest.place(0x21000, "4s", b"next")
    mm = guest.put("mm_struct", pgd=0x10000, arg_start=0, arg_end=4, env_start=4, env_end=12)
    vmas = [
        Vma(VirtAddr(0), VirtAddr(8 * PAGE), "rw-p", 0, 0, 0, 0, b""),
        Vma(VirtAddr(8 * PAGE), VirtAddr(9 * PAGE), "r--p", 0, 8, 1, 99, b"/lib"),
    ]
    return ProcessMemory(guest.kernel, mm, vmas)


def test_pages_are_told_apart() -> None:
    memory = memory_of(
        {
            0: 0x20000 | 7,
            1: 0x100 | (0x21000 ^ FRAME),  # PROT_NONE: here, with its frame inverted
            2: 0x0123_4567_0000_0000 & ~1,  # a swap entry of area 0
            3: 31 << 59,  # the kernel's own
            4: ABSENT | 7,
        }
    )
    states = [memory.state(page * PAGE) for page in (0, 1, 2, 3, 4, 5, 8, 9)]
    assert states == [
        PageState.PRESENT, PageState.PRESENT, PageState.SWAPPED, PageState.MOVING,
        PageState.ABSENT, PageState.UNTOUCHED, PageState.FILE, PageState.UNMAPPED,
    ]  # fmt: skip
    assert memory.read(VirtAddr(PAGE - 2), 6) == b"\0\0next"
    assert memory.arguments() == (b"one",)
    assert memory.environment() == (b"two=2", b"x")


@pytest.mark.parametrize("page", [2, 3, 4, 5, 8, 9, 1 << 40])
def test_page_that_is_not_here_is_never_read_as_zeros(page: int) -> None:
    memory = memory_of({2: 1 << 32, 3: 31 << 59, 4: ABSENT | 7})
    with pytest.raises(NotHereError) as caught:
        memory.read(VirtAddr(page * PAGE), 1)
    assert caught.value.state is not PageState.PRESENT
    assert caught.value.address == page * PAGE


def test_large_page_is_read() -> None:
    memory = memory_of({}, large=0x80 | 7)  # physical memory from 0
    assert memory.read(VirtAddr((2 << 20) + 0x21000), 4) == b"next"


def test_absurd_command_line_is_refused() -> None:
    memory = memory_of({0: 0x20000 | 7})
    memory._marks = [0, 1 << 40, 0, 0]
    with pytest.raises(Exception, match="was started with"):
        memory.arguments()
