"""An inode as it lies on the disk, next to what memory says of it.

Source: Linux v6.1 ``fs/ext4/ext4.h`` (``struct ext4_inode``, ``ext4_decode_extra_time``),
``fs/ext4/inode.c`` (``ext4_fill_raw_inode``, ``__ext4_iget``).
"""

from __future__ import annotations

import stat
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.disk.handover import Inode

ENCRYPT_FL, EA_INODE_FL = 0x800, 0x20_0000
INLINE_DATA_FL, CASEFOLD_FL = 0x1000_0000, 0x4000_0000
_GOOD_OLD_SIZE: Final = 128
_SECOND: Final = 1_000_000_000
_SIZE, _DTIME, _LINKS, _FLAGS, _BLOCKS, _SIZE_HIGH = 0x04, 0x14, 0x1A, 0x20, 0x28, 0x6C
_FILE_ACL, _FILE_ACL_HIGH = 0x68, 0x76
# Seconds, and two bits of epoch below thirty of nanoseconds.
_TIMES: Final = (("atime", 0x08, 0x8C), ("ctime", 0x0C, 0x84), ("mtime", 0x10, 0x88))


def flags(raw: bytearray) -> int:
    """Return ``i_flags``."""
    value: int = struct.unpack_from("<I", raw, _FLAGS)[0]
    return value


def difference(
    raw: bytearray, inode: Inode, *, late: bool = False, since: int | None = None
) -> str:
    """Tell what of an inode on the disk differs from memory.

    Args:
        raw: The inode on the disk.
        inode: The same in memory.
        late: What the kernel may be late with does not count: times of a lazy inode, and a size
            that delayed allocation will make larger.
        since: A time that memory has set then or later, and the disk has not, does not count
            either: what sets it was under way.

    Returns:
        Name and both values; empty when they agree.
    """
    for name, ours, theirs in _pairs(raw, inode):
        if ours == theirs:
            continue
        if late and name == "size" and stat.S_ISREG(inode.mode) and theirs < ours:
            continue
        is_time = name in ("atime", "ctime", "mtime")
        if is_time and ((late and inode.lazy) or (since is not None and theirs < ours >= since)):
            continue
        return f"{name} {ours} in memory, {theirs} in the view"
    return ""


def settle(raw: bytearray, inode: Inode) -> None:
    """Set what the kernel may be late with: size and times."""
    if stat.S_ISREG(inode.mode):
        set_size(raw, inode.size)
    for name, place, extra in _TIMES:
        seconds, nanoseconds = divmod(_time_of(inode, name), _SECOND)
        low = (seconds + (1 << 31)) % (1 << 32) - (1 << 31)
        struct.pack_into("<i", raw, place, low)
        if _has(raw, extra):
            struct.pack_into("<I", raw, extra, nanoseconds << 2 | (seconds - low) >> 32 & 3)


def size(raw: bytearray) -> int:
    """Return ``i_size``."""
    low, high = (struct.unpack_from("<I", raw, at)[0] for at in (_SIZE, _SIZE_HIGH))
    return int(low | high << 32)


def set_size(raw: bytearray, value: int) -> None:
    """Set ``i_size``."""
    struct.pack_into("<I", raw, _SIZE, value & 0xFFFF_FFFF)
    struct.pack_into("<I", raw, _SIZE_HIGH, value >> 32)


def attribute_block(raw: bytearray) -> int:
    """Return ``i_file_acl``: the block of extended attributes; 0 for none."""
    (low,) = struct.unpack_from("<I", raw, _FILE_ACL)
    (high,) = struct.unpack_from("<H", raw, _FILE_ACL_HIGH)
    return int(low | high << 32)


def forget_attribute_block(raw: bytearray) -> None:
    """Set ``i_file_acl`` to none."""
    struct.pack_into("<I", raw, _FILE_ACL, 0)
    struct.pack_into("<H", raw, _FILE_ACL_HIGH, 0)


def is_orphan(raw: bytearray) -> bool:
    """Tell whether an inode has no name any more and was not released."""
    (mode,) = struct.unpack_from("<H", raw, 0)
    (links,) = struct.unpack_from("<H", raw, _LINKS)
    return bool(mode) and not links


def set_next_orphan(raw: bytearray, number: int) -> None:
    """Link the next inode of the orphan list (``NEXT_ORPHAN``)."""
    struct.pack_into("<I", raw, _DTIME, number)


def _pairs(raw: bytearray, inode: Inode) -> Iterator[tuple[str, int, int]]:
    mode, uid = struct.unpack_from("<HH", raw, 0)
    gid, links = struct.unpack_from("<HH", raw, 0x18)
    (generation,) = struct.unpack_from("<I", raw, 0x64)
    uid_high, gid_high = struct.unpack_from("<HH", raw, 0x78)
    yield "mode", inode.mode, mode
    yield "owner", inode.uid, uid | uid_high << 16
    yield "group", inode.gid, gid | gid_high << 16
    yield "links", inode.links, links
    yield "generation", inode.generation, generation
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        yield "device", inode.device, _device(raw)
    elif stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
        yield "size", inode.size, size(raw)
    for name, place, extra in _TIMES:
        yield name, _time_of(inode, name), _time(raw, place, extra)


def _time_of(inode: Inode, name: str) -> int:
    return {"atime": inode.atime_ns, "ctime": inode.ctime_ns, "mtime": inode.mtime_ns}[name]


def _time(raw: bytearray, place: int, extra: int) -> int:
    seconds: int = struct.unpack_from("<i", raw, place)[0]
    if not _has(raw, extra):
        return seconds * _SECOND
    more: int = struct.unpack_from("<I", raw, extra)[0]
    return (seconds + ((more & 3) << 32)) * _SECOND + (more >> 2)


def _has(raw: bytearray, extra: int) -> bool:
    """Tell whether ``i_extra_isize`` covers a field."""
    if len(raw) <= _GOOD_OLD_SIZE:
        return False
    size: int = struct.unpack_from("<H", raw, _GOOD_OLD_SIZE)[0]
    return _GOOD_OLD_SIZE + size >= extra + 4


def _device(raw: bytearray) -> int:
    """Decode a device number: the old form, or else the new one (include/linux/kdev_t.h)."""
    old, new = struct.unpack_from("<II", raw, _BLOCKS)
    if old:
        return int((old >> 8 & 0xFF) << 20 | old & 0xFF)
    return int((new >> 8 & 0xFFF) << 20 | new & 0xFF | new >> 12 & 0xFFF00)
