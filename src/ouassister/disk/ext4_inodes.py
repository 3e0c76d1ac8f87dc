"""Exact times and attributes of inodes, read from an ext4 file system itself.

The lower tree is mounted by ext4-view in a user namespace. Linux hides POSIX ACLs of a FUSE mount
that belongs to one (fs/fuse/acl.c, ``fuse_no_acl``), and a copy-up by overlayfs then loses them
without an error (fs/overlayfs/copy_up.c, ``ovl_copy_acl``). ``trusted.*`` is hidden as well, but
there the copy-up fails. Times that no ext4 writes (over 999,999,999 ns) are whole seconds there.

Layout: Linux, Documentation/filesystems/ext4 (super block, group descriptors, index nodes,
extended attributes) and fs/ext4/{ext4,xattr,acl}.h as of 6.1.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING, Self

from ouassister.errors import CorruptGuestError, InternalError, UnsupportedGuestError
from ouassister.model import Expected

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_SUPER_OFFSET = 1024
_MAGIC = 0xEF53
_INCOMPAT_META_BG = 0x10
_INCOMPAT_64BIT = 0x80
_GOOD_OLD_SIZE = 128
_OFFSET_LIMIT = 1 << 62
_XATTR_MAGIC = 0xEA020000
_XATTR_ENTRY = struct.Struct("<BBHIII")
_XATTR_BLOCK_HEADER = 32
# fs/ext4/xattr.h, EXT4_XATTR_INDEX_POSIX_ACL_*; these have no name.
_XATTR_ACLS = {2: "system.posix_acl_access", 3: "system.posix_acl_default"}

_ACL_DISK_VERSION = 1  # fs/ext4/acl.h, EXT4_ACL_VERSION
_ACL_VERSION = 2  # linux/posix_acl_xattr.h, POSIX_ACL_XATTR_VERSION
_ACL_UNDEFINED_ID = 0xFFFFFFFF
_ACL_USER_OBJ, _ACL_USER, _ACL_GROUP_OBJ, _ACL_GROUP, _ACL_MASK, _ACL_OTHER = 1, 2, 4, 8, 16, 32


class Inodes:
    """The inode tables of an ext4 file system that nobody writes to.

    Args:
        image: File or block device that holds the file system.

    Raises:
        UnsupportedGuestError: It is no ext4 file system, or of a layout not seen before.
    """

    def __init__(self, image: Path) -> None:
        self._file = image.open("rb", buffering=0)
        try:
            self._read_super()
        except BaseException:
            self._file.close()
            raise

    def _read_super(self) -> None:
        block = self._pread(_SUPER_OFFSET, 1024)
        (magic,) = struct.unpack_from("<H", block, 0x38)
        (log_block_size,) = struct.unpack_from("<I", block, 0x18)
        (revision,) = struct.unpack_from("<I", block, 0x4C)
        (incompat,) = struct.unpack_from("<I", block, 0x60)
        if magic != _MAGIC or log_block_size > 6 or revision != 1:
            raise UnsupportedGuestError("the guest's file system is not ext4")
        if incompat & _INCOMPAT_META_BG:
            raise UnsupportedGuestError("the guest's ext4 has the feature meta_bg")
        self._block_size = 1024 << log_block_size
        (self._count,) = struct.unpack_from("<I", block, 0)
        (self._first_block,) = struct.unpack_from("<I", block, 0x14)
        (self._per_group,) = struct.unpack_from("<I", block, 0x28)
        (self._inode_size,) = struct.unpack_from("<H", block, 0x58)
        (wide,) = struct.unpack_from("<H", block, 0xFE)
        self._descriptor_size = wide if incompat & _INCOMPAT_64BIT else 32
        if not (
            _GOOD_OLD_SIZE <= self._inode_size <= self._block_size
            and self._inode_size.bit_count() == 1
            and 32 <= self._descriptor_size <= self._block_size
            and self._per_group
        ):
            raise CorruptGuestError("the super block of the guest's ext4 contradicts itself")

    def __enter__(self) -> Self:
        """Keep the file open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def expected(self, status: os.stat_result) -> Expected:
        """What the guest's own lstat says of the object that the mount describes by ``status``.

        Raises:
            InternalError: The mount and the file system disagree: they are not the same one.
        """
        raw = self._inode(status.st_ino)
        mode, size_low = struct.unpack_from("<H2xI", raw, 0)
        (size_high,) = struct.unpack_from("<I", raw, 0x6C)
        size = size_low | size_high << 32
        ctime_ns = self._time(raw, 0x0C, 0x84)
        mtime_ns = self._time(raw, 0x10, 0x88)
        same = (
            mode == status.st_mode
            and (size == status.st_size or not stat.S_ISREG(mode))
            and ctime_ns // 1_000_000_000 == status.st_ctime_ns // 1_000_000_000
            and mtime_ns // 1_000_000_000 == status.st_mtime_ns // 1_000_000_000
        )
        if not same:
            raise InternalError(
                f"inode {status.st_ino} of the guest's file system is not what its mount shows"
            )
        return Expected(status.st_ino, mode, status.st_size, mtime_ns, ctime_ns)

    def acls(self, inode: int) -> dict[str, bytes]:
        """POSIX ACLs of an inode, by attribute, as getxattr gives them.

        Raises:
            CorruptGuestError: An attribute lies outside of its place.
            UnsupportedGuestError: One is stored in an inode of its own (feature ea_inode).
        """
        raw = self._inode(inode)
        found: dict[str, bytes] = {}
        end = _GOOD_OLD_SIZE + self._extra(raw)
        if end + 4 <= len(raw) and struct.unpack_from("<I", raw, end) == (_XATTR_MAGIC,):
            found |= _acls(raw[end + 4 :], 0)
        (low,) = struct.unpack_from("<I", raw, 0x68)
        (high,) = struct.unpack_from("<H", raw, 0x76)
        if block := low | high << 32:
            data = self._pread(block * self._block_size, self._block_size)
            if struct.unpack_from("<I", data, 0) != (_XATTR_MAGIC,):
                raise CorruptGuestError(f"no attributes in the attribute block of inode {inode}")
            found |= _acls(data, _XATTR_BLOCK_HEADER)
        return found

    def _inode(self, number: int) -> bytes:
        if not 0 < number <= self._count:
            raise InternalError(f"inode {number} is not of the guest's file system")
        group, index = divmod(number - 1, self._per_group)
        start = (self._first_block + 1) * self._block_size + group * self._descriptor_size
        descriptor = self._pread(start, self._descriptor_size)
        (table,) = struct.unpack_from("<I", descriptor, 0x08)
        if self._descriptor_size >= 64:
            table |= struct.unpack_from("<I", descriptor, 0x28)[0] << 32
        return self._pread(table * self._block_size + index * self._inode_size, self._inode_size)

    def _extra(self, raw: bytes) -> int:
        if len(raw) == _GOOD_OLD_SIZE:
            return 0
        extra: int = struct.unpack_from("<H", raw, 0x80)[0]
        if extra > len(raw) - _GOOD_OLD_SIZE:
            raise CorruptGuestError(f"i_extra_isize of an inode is {extra}")
        return extra

    def _time(self, raw: bytes, base: int, extra: int) -> int:
        # fs/ext4/ext4.h, ext4_decode_extra_time: two bits of epoch, thirty of nanoseconds.
        seconds: int = struct.unpack_from("<i", raw, base)[0]
        if _GOOD_OLD_SIZE + self._extra(raw) < extra + 4:
            return seconds * 1_000_000_000
        more: int = struct.unpack_from("<I", raw, extra)[0]
        return (seconds + ((more & 3) << 32)) * 1_000_000_000 + (more >> 2)

    def _pread(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, offset) if offset < _OFFSET_LIMIT else b""
        if len(data) != size:
            raise CorruptGuestError(f"the guest's file system ends before byte {offset + size}")
        return data


def chmod_acl(acl: bytes, mode: int) -> bytes:
    """Change an access ACL as chmod(2) does (fs/posix_acl.c, ``posix_acl_chmod``)."""
    entries = [*struct.iter_unpack("<HHI", acl[4:])]
    masked = any(tag == _ACL_MASK for tag, _, _ in entries)
    bits = {_ACL_USER_OBJ: mode >> 6 & 7, _ACL_OTHER: mode & 7}
    bits[_ACL_MASK if masked else _ACL_GROUP_OBJ] = mode >> 3 & 7
    return acl[:4] + b"".join(
        struct.pack("<HHI", tag, bits.get(tag, perm), who) for tag, perm, who in entries
    )


def _acls(data: bytes, first: int) -> dict[str, bytes]:
    return {
        _XATTR_ACLS[index]: _acl_from_disk(value)
        for index, value in _attributes(data, first)
        if index in _XATTR_ACLS
    }


def _attributes(data: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    """Index and value of each attribute; offsets of values count from ``data``."""
    at = first
    while at + 4 <= len(data) and data[at : at + 4] != bytes(4):
        if at + _XATTR_ENTRY.size > len(data):
            raise CorruptGuestError("an extended attribute of the guest's ext4 has no end")
        length, index, offset, inode, size, _ = _XATTR_ENTRY.unpack_from(data, at)
        if inode:
            raise UnsupportedGuestError("the guest's ext4 has the feature ea_inode")
        if offset + size > len(data):
            raise CorruptGuestError("an extended attribute of the guest's ext4 has no end")
        yield index, data[offset : offset + size]
        at += (_XATTR_ENTRY.size + length + 3) & ~3


def _acl_from_disk(raw: bytes) -> bytes:
    """fs/ext4/acl.c, ``ext4_acl_from_disk``: users and groups have an id, the others none."""
    parts = [struct.pack("<I", _ACL_VERSION)]
    try:
        if struct.unpack_from("<I", raw) != (_ACL_DISK_VERSION,):
            raise CorruptGuestError("an ACL of the guest's ext4 is not of version 1")
        at = 4
        while at < len(raw):
            tag, perm = struct.unpack_from("<HH", raw, at)
            at += 4
            who = _ACL_UNDEFINED_ID
            if tag in (_ACL_USER, _ACL_GROUP):
                (who,) = struct.unpack_from("<I", raw, at)
                at += 4
            parts.append(struct.pack("<HHI", tag, perm, who))
    except struct.error as error:
        raise CorruptGuestError("an ACL of the guest's ext4 has no end") from error
    return b"".join(parts)
