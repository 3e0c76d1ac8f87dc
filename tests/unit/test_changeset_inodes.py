"""The reader of ext4 inodes against a hand-made file system of one group."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from ouassister.disk.ext4_inodes import Inodes, chmod_acl
from ouassister.errors import CorruptGuestError, InternalError, UnsupportedGuestError
from ouassister.model import Expected

if TYPE_CHECKING:
    from pathlib import Path

NONE = 2**32 - 1
TABLE = 3  # block of the inode table; blocks have 1 KiB
MTIME_NS = 2_443_203_506_123_456_789  # in 2047: the first epoch bit is set


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ON_DISK = struct.pack("<IHHHHIHHHHHH", 1, 1, 6, 2, 4, 1000, 4, 4, 16, 4, 32, 4)
AS_READ = acl((1, 6, NONE), (2, 4, 1000), (4, 4, NONE), (16, 4, NONE), (32, 4, NONE))


class Image:
    """Bytes of a file system with inode 12 in it, to be spoilt."""

    def __init__(self) -> None:
        self.data = bytearray(16 << 10)
        for offset, layout, value in [
            (0x00, "<I", 64),  # inodes
            (0x14, "<I", 1),  # first data block
            (0x28, "<I", 64),  # inodes per group
            (0x38, "<H", 0xEF53),
            (0x4C, "<I", 1),  # revision
            (0x58, "<H", 256),  # inode size
        ]:
            self.super(offset, layout, value)
        struct.pack_into("<I", self.data, 2 * 1024 + 8, TABLE)
        seconds, rest = divmod(MTIME_NS, 10**9)
        self.inode(0x00, "<H", 0o100640)
        self.inode(0x04, "<I", 5)
        self.inode(0x0C, "<i", -7)
        self.inode(0x10, "<i", seconds - 2**32)
        self.inode(0x80, "<H", 32)
        self.inode(0x84, "<I", 999 << 2)
        self.inode(0x88, "<I", rest << 2 | 1)

    def super(self, offset: int, layout: str, value: int) -> None:
        struct.pack_into(layout, self.data, 1024 + offset, value)

    def inode(self, offset: int, layout: str, value: int) -> None:
        struct.pack_into(layout, self.data, TABLE * 1024 + 11 * 256 + offset, value)

    def in_inode_xattr(self, index: int, value: bytes, *, offset: int = 40, inode: int = 0) -> None:
        at = TABLE * 1024 + 11 * 256 + 160
        entry = struct.pack("<BBHIII", 0, index, offset, inode, len(value), 0)
        self.data[at : at + 4] = struct.pack("<I", 0xEA020000)
        self.data[at + 4 : at + 4 + len(entry)] = entry
        if offset < 92:
            self.data[at + 4 + offset : at + 4 + offset + len(value)] = value

    def opened(self, path: Path) -> Inodes:
        (path / "image").write_bytes(self.data)
        return Inodes(path / "image")


def status(**more: int) -> os.stat_result:
    """What a mount of whole seconds would report."""
    seconds = {"mtime": MTIME_NS // 10**9, "ctime": -7} | more
    fields = [more.get("mode", 0o100640), more.get("ino", 12), 0, 1, 0, 0, more.get("size", 5)]
    times = [0, seconds["mtime"], seconds["ctime"]]
    nanoseconds = [0, seconds["mtime"] * 10**9, seconds["ctime"] * 10**9]
    # Positions 7 to 9 are whole seconds, 13 to 15 nanoseconds (CPython, posixmodule.c).
    return os.stat_result((*fields, *times, *map(float, times), *nanoseconds))


def test_expected_has_the_nanoseconds_of_the_file_system(tmp_path: Path) -> None:
    with Image().opened(tmp_path) as inodes:
        found = inodes.expected(status())
    assert found == Expected(12, 0o100640, 5, MTIME_NS, -7 * 10**9 + 999)


@pytest.mark.parametrize(
    "other", [{"mode": 0o100644}, {"size": 6}, {"mtime": 1}, {"ctime": 1}, {"ino": 13}]
)
def test_expected_of_another_object_is_refused(tmp_path: Path, other: dict[str, int]) -> None:
    with (
        Image().opened(tmp_path) as inodes,
        pytest.raises(InternalError, match="is not what its mount shows"),
    ):
        inodes.expected(status(**other))


@pytest.mark.parametrize("number", [0, 65, 2**63])
def test_inode_outside_of_the_file_system_is_refused(tmp_path: Path, number: int) -> None:
    with (
        Image().opened(tmp_path) as inodes,
        pytest.raises(InternalError, match="is not of the guest's file system"),
    ):
        inodes.expected(status(ino=number))


@pytest.mark.parametrize(
    ("offset", "layout", "value", "kind"),
    [
        (0x38, "<H", 0x1234, UnsupportedGuestError),  # magic
        (0x18, "<I", 7, UnsupportedGuestError),  # block size
        (0x4C, "<I", 0, UnsupportedGuestError),  # revision
        (0x60, "<I", 0x10, UnsupportedGuestError),  # meta_bg
        (0x58, "<H", 200, CorruptGuestError),  # inode size
        (0x58, "<H", 2048, CorruptGuestError),
        (0x28, "<I", 0, CorruptGuestError),  # inodes per group
        (0x60, "<I", 0x80, CorruptGuestError),  # 64bit with descriptors of 0 bytes
    ],
)
def test_super_block_not_as_known_is_refused(
    tmp_path: Path, offset: int, layout: str, value: int, kind: type[Exception]
) -> None:
    image = Image()
    image.super(offset, layout, value)
    with pytest.raises(kind):
        image.opened(tmp_path)


def test_image_that_ends_early_is_refused(tmp_path: Path) -> None:
    image = Image()
    struct.pack_into("<I", image.data, 2 * 1024 + 8, 2**32 - 1)
    with image.opened(tmp_path) as inodes, pytest.raises(CorruptGuestError, match="ends before"):
        inodes.expected(status())


def test_block_number_beyond_any_file_is_refused(tmp_path: Path) -> None:
    image = Image()
    image.inode(0x68, "<I", 2**32 - 1)
    image.inode(0x76, "<H", 2**16 - 1)
    start = TABLE * 1024 + 11 * 256
    inode = image.data[start : start + 256]
    image.super(0x18, "<I", 6)  # blocks of 64 KiB: an offset of 2**64 bytes
    image.data += bytes(256 << 10)
    struct.pack_into("<I", image.data, (2 << 16) + 8, TABLE)
    start = (TABLE << 16) + 11 * 256
    image.data[start : start + 256] = inode
    with image.opened(tmp_path) as inodes:
        assert inodes.expected(status()).inode == 12
        with pytest.raises(CorruptGuestError, match="ends before byte"):
            inodes.acls(12)


def test_extra_size_larger_than_the_inode_is_refused(tmp_path: Path) -> None:
    image = Image()
    image.inode(0x80, "<H", 129)
    with image.opened(tmp_path) as inodes, pytest.raises(CorruptGuestError, match="i_extra_isize"):
        inodes.expected(status())


def test_acl_in_the_inode_reads_as_getxattr_gives_it(tmp_path: Path) -> None:
    image = Image()
    image.in_inode_xattr(2, ON_DISK)
    with image.opened(tmp_path) as inodes:
        assert inodes.acls(12) == {"system.posix_acl_access": AS_READ}


def test_acl_in_a_block_reads_as_getxattr_gives_it(tmp_path: Path) -> None:
    image = Image()
    image.inode(0x68, "<I", 15)
    block = struct.pack("<I28x", 0xEA020000)
    block += struct.pack("<BBHIII", 3, 1, 512, 0, 4, 0) + b"abc\0"  # user.abc
    block += struct.pack("<BBHIII", 0, 3, 900, 0, len(ON_DISK), 0)
    image.data[15 << 10 : (15 << 10) + len(block)] = block
    image.data[(15 << 10) + 900 : (15 << 10) + 900 + len(ON_DISK)] = ON_DISK
    with image.opened(tmp_path) as inodes:
        assert inodes.acls(12) == {"system.posix_acl_default": AS_READ}


def test_attribute_block_without_its_mark_is_refused(tmp_path: Path) -> None:
    image = Image()
    image.inode(0x68, "<I", 15)
    with image.opened(tmp_path) as inodes, pytest.raises(CorruptGuestError, match="no attributes"):
        inodes.acls(12)


def test_attribute_outside_of_its_place_is_refused(tmp_path: Path) -> None:
    image = Image()
    image.in_inode_xattr(2, ON_DISK, offset=90)
    with image.opened(tmp_path) as inodes, pytest.raises(CorruptGuestError, match="no end"):
        inodes.acls(12)


def test_attribute_in_an_inode_of_its_own_is_refused(tmp_path: Path) -> None:
    image = Image()
    image.in_inode_xattr(2, ON_DISK, inode=13)
    with image.opened(tmp_path) as inodes, pytest.raises(UnsupportedGuestError, match="ea_inode"):
        inodes.acls(12)


@pytest.mark.parametrize("raw", [b"", b"\2\0\0\0", ON_DISK[:-1], ON_DISK[:10]])
def test_acl_that_is_cut_or_unknown_is_refused(tmp_path: Path, raw: bytes) -> None:
    image = Image()
    image.in_inode_xattr(2, raw)
    with image.opened(tmp_path) as inodes, pytest.raises(CorruptGuestError, match="an ACL"):
        inodes.acls(12)


def test_chmod_acl_changes_the_mask_when_there_is_one() -> None:
    assert chmod_acl(AS_READ, 0o4751) == acl(
        (1, 7, NONE), (2, 4, 1000), (4, 4, NONE), (16, 5, NONE), (32, 1, NONE)
    )
    minimal = acl((1, 6, NONE), (4, 4, NONE), (32, 4, NONE))
    assert chmod_acl(minimal, 0o751) == acl((1, 7, NONE), (4, 5, NONE), (32, 1, NONE))
