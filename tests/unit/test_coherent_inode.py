"""An inode on the disk against the same in memory."""

from __future__ import annotations

import stat
import struct

import pytest

from ouassister.disk import raw_inode
from ouassister.disk.handover import Inode

SECOND = 1_000_000_000
FILE = Inode(
    number=12, mode=stat.S_IFREG | 0o644, uid=70000, gid=80000, links=1, device=0, size=5,
    generation=7, atime_ns=3 * SECOND + 1, mtime_ns=2 * SECOND + 999_999_999,
    ctime_ns=4 * SECOND, lazy=False,
)  # fmt: skip


def on_disk(inode: Inode, size: int = 256, extra: int = 32) -> bytearray:
    raw = bytearray(size)
    struct.pack_into("<HHI", raw, 0, inode.mode, inode.uid & 0xFFFF, inode.size & 0xFFFFFFFF)
    struct.pack_into("<HH", raw, 0x18, inode.gid & 0xFFFF, inode.links)
    struct.pack_into("<I", raw, 0x64, inode.generation)
    struct.pack_into("<I", raw, 0x6C, inode.size >> 32)
    struct.pack_into("<HH", raw, 0x78, inode.uid >> 16, inode.gid >> 16)
    if size > 128:
        struct.pack_into("<H", raw, 0x80, extra)
    for place, more, value in (
        (0x08, 0x8C, inode.atime_ns),
        (0x0C, 0x84, inode.ctime_ns),
        (0x10, 0x88, inode.mtime_ns),
    ):
        seconds, ns = divmod(value, SECOND)
        struct.pack_into("<I", raw, place, seconds & 0xFFFF_FFFF)
        if size > 128 and extra >= more + 4 - 128:
            epoch = (seconds + (1 << 31)) >> 32
            struct.pack_into("<I", raw, more, ns << 2 | epoch)
    return raw


def test_same_inode_has_no_difference() -> None:
    assert raw_inode.difference(on_disk(FILE), FILE) == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mode": stat.S_IFREG | 0o600}, "mode"),
        ({"uid": 70000 - 65536}, "owner"),
        ({"gid": 80001}, "group"),
        ({"links": 2}, "links"),
        ({"generation": 8}, "generation"),
        ({"size": 6}, "size"),
        ({"size": 5 | 1 << 32}, "size"),
        ({"atime_ns": 3 * SECOND}, "atime"),
        ({"mtime_ns": 0}, "mtime"),
        ({"ctime_ns": 4 * SECOND + 1}, "ctime"),
    ],
)
def test_each_attribute_that_differs_is_named(change: dict[str, int], told: str) -> None:
    inode = FILE._replace(**change)  # type: ignore[arg-type]
    assert raw_inode.difference(on_disk(FILE), inode).split()[0] == told


def test_size_may_only_grow_and_only_with_unflushed_data() -> None:
    larger, smaller = FILE._replace(size=9000), FILE._replace(size=4)
    assert raw_inode.difference(on_disk(FILE), larger, late=True) == ""
    assert "size 9000 in memory, 5" in raw_inode.difference(on_disk(FILE), larger)
    assert "size 4 in memory, 5" in raw_inode.difference(on_disk(FILE), smaller, late=True)


def test_size_of_a_directory_is_never_late() -> None:
    directory = FILE._replace(mode=stat.S_IFDIR | 0o755)
    told = raw_inode.difference(on_disk(directory), directory._replace(size=6), late=True)
    assert told.startswith("size")


def test_lazy_times_may_differ_and_nothing_else() -> None:
    lazy = FILE._replace(lazy=True, mtime_ns=77)
    assert raw_inode.difference(on_disk(FILE), lazy, late=True) == ""
    assert raw_inode.difference(on_disk(FILE), lazy).startswith("mtime")
    eager = lazy._replace(lazy=False)
    assert raw_inode.difference(on_disk(FILE), eager, late=True).startswith("mtime")
    told = raw_inode.difference(on_disk(FILE), lazy._replace(links=3), late=True)
    assert told.startswith("links")


@pytest.mark.parametrize(
    "when",
    [0, 1, -1, -SECOND, (1 << 31) * SECOND - 1, (1 << 31) * SECOND, (3 << 32) * SECOND + 5],
)
def test_times_survive_the_way_to_the_disk_and_back(when: int) -> None:
    inode = FILE._replace(atime_ns=when, mtime_ns=when, ctime_ns=when, lazy=True, size=1 << 40)
    raw = on_disk(FILE)
    raw_inode.settle(raw, inode)
    assert raw == on_disk(inode)
    assert raw_inode.difference(raw, inode._replace(lazy=False)) == ""


def test_small_inodes_keep_whole_seconds() -> None:
    inode = FILE._replace(atime_ns=SECOND, mtime_ns=SECOND, ctime_ns=SECOND)
    raw = on_disk(FILE, size=128)
    raw_inode.settle(raw, inode)
    assert raw == on_disk(inode, size=128)


def test_extra_fields_outside_of_the_extra_size_are_not_touched() -> None:
    inode = FILE._replace(atime_ns=SECOND + 5)
    raw = on_disk(FILE, extra=8)  # covers ctime alone
    raw_inode.settle(raw, inode)
    assert raw[0x88:0x90] == bytes(8)


@pytest.mark.parametrize(
    ("old", "new", "device"),
    [
        (1 << 8 | 3, 0, 1 << 20 | 3),
        (0, 0x12300 | 0x45 | 0x6 << 20, 0x123 << 20 | 0x645),
    ],
)
def test_device_numbers_are_read_in_both_forms(old: int, new: int, device: int) -> None:
    inode = FILE._replace(mode=stat.S_IFBLK | 0o600, device=device, size=0)
    raw = on_disk(inode)
    struct.pack_into("<II", raw, 0x28, old, new)
    assert raw_inode.difference(raw, inode) == ""
    told = raw_inode.difference(raw, inode._replace(device=device + 1))
    assert told.startswith("device")


def test_time_that_was_being_set_does_not_count() -> None:
    ahead = FILE._replace(ctime_ns=9 * SECOND, mtime_ns=9 * SECOND)
    assert raw_inode.difference(on_disk(FILE), ahead, since=8 * SECOND) == ""
    assert raw_inode.difference(on_disk(FILE), ahead).startswith("ctime")
    assert raw_inode.difference(on_disk(FILE), ahead, since=10 * SECOND).startswith("ctime")
    behind = FILE._replace(ctime_ns=3 * SECOND)  # the disk knows of a later change
    assert raw_inode.difference(on_disk(FILE), behind, since=0).startswith("ctime")
    other = ahead._replace(links=2)
    assert raw_inode.difference(on_disk(FILE), other, since=0).startswith("links")
