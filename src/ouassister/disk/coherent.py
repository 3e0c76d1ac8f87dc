"""Makes a copy of an ext4 file system what the sleeping kernel knows it to be.

Called in the sandbox, on the private copy, before it is mounted. The journal is not replayed: all
that it holds and the disk does not is in memory, newer or the same, because jbd2 keeps a buffer
in memory until it is at home (fs/jbd2/checkpoint.c). So the blocks of memory are laid over the
disk, and the journal is marked empty; fast commits need no care for the same reason.

The result must not be trusted before `ouassister.disk.proof` has seen it. That reads only, so it
can go on beside the work in the view.

Source: Linux v6.1 ``fs/jbd2/journal.c``, ``include/linux/jbd2.h`` (``journal_superblock_t``);
e2fsprogs 1.47
``e2fsck/super.c`` (``release_orphan_inodes``), e2fsck(8).
"""

from __future__ import annotations

import os
import stat
import struct
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ouassister.disk import raw_inode
from ouassister.disk.handover import HandOver
from ouassister.disk.libext2fs import Ext4, Super
from ouassister.disk.proof import e2fsck, is_own, refuse
from ouassister.errors import CorruptGuestError, UnsupportedGuestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.disk.handover import Place

_HAS_JOURNAL: Final = 0x4  # compatible feature
_RECOVER, _JOURNAL_DEVICE, _MMP = 0x4, 0x8, 0x100  # incompatible features
_ORPHAN_PRESENT: Final = 0x10000  # read-only compatible feature
_ERROR_FS: Final = 2
_ORPHAN_RUNS: Final = 3
_MAX_ORPHAN_BLOCKS: Final = 1 << 16  # mke2fs makes 512 at most
_UNDER_WAY_NS: Final = 10_000_000_000
_JOURNAL_MAGIC: Final = 0xC03B3998
_JOURNAL_START, _JOURNAL_CHECKSUM, _JOURNAL_SIZE = 0x1C, 0xFC, 1024
_JOURNAL_CSUM_FEATURES: Final = 0x8 | 0x10  # CSUM_V2, CSUM_V3


def apply(argument: dict[str, Any]) -> dict[str, Any]:
    """Lay what memory holds over an image; `ouassister.disk.proof` tells whether that was right.

    Args:
        argument: ``image``: file that holds the file system; ``handover``: what
            `ouassister.disk.handover.write` made of memory.

    Returns:
        ``blocks``: bytes of metadata that differed; ``bytes`` and ``files``: data that was
        written; ``inodes``: how many were set; ``orphans``: whether deleted files were released.

    Raises:
        CorruptGuestError: Disk and memory do not make one consistent file system.
        UnsupportedGuestError: The file system has a feature that is not handled.
    """
    image = Path(argument["image"])
    handover = HandOver(Path(argument["handover"]))
    try:
        written = _lay_blocks(image, handover)
        with Ext4(image) as ext4:
            _refuse_unknown(ext4, handover)
            _empty_journal(ext4, image)
            _write_files(ext4, handover)
            _write_first(ext4, handover)
            changed = _settle_inodes(ext4, handover)
            _list_orphans(ext4, handover)
            _release_attributes(ext4, handover)
            ext4.count_free()
            ext4.call_clean()
        released = _release_orphans(image)
        return {
            "blocks": written,
            "bytes": sum(place.size for place in handover.files),
            "files": len({place.inode for place in handover.files}),
            "inodes": changed,
            "orphans": released,
        }
    finally:
        handover.close()


def _lay_blocks(image: Path, handover: HandOver) -> int:
    """Write the blocks of the device that differ; return how many bytes."""
    written = 0
    descriptor = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        for place in handover.device:
            if place.offset + place.size > end:
                raise CorruptGuestError("a block in memory lies beyond the end of its device")
            at = place.offset
            for data in handover.read(place):
                if os.pread(descriptor, len(data), at) != data:
                    _write_all(descriptor, data, at)
                    written += len(data)
                at += len(data)
    finally:
        os.close(descriptor)
    return written


def _write_all(descriptor: int, data: bytes, at: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count


def _refuse_unknown(ext4: Ext4, handover: HandOver) -> None:
    if ext4.text(Super.UUID, 16) != handover.uuid:
        raise CorruptGuestError(
            "the file system on the disk is not the one in memory (their UUIDs differ)"
        )
    if ext4.number(Super.STATE, "H") & _ERROR_FS:
        raise CorruptGuestError(
            "the guest's kernel has found errors in its file system",
            hint="run e2fsck in the guest; see its kernel log",
        )
    incompatible = ext4.number(Super.INCOMPAT)
    for bit, name in ((_MMP, "mmp"), (_JOURNAL_DEVICE, "journal_dev")):
        if incompatible & bit:
            raise UnsupportedGuestError(f"the guest's ext4 has the feature {name}")
    if ext4.number(Super.JOURNAL_DEVICE):
        raise UnsupportedGuestError("the guest's ext4 has its journal on another device")


def _empty_journal(ext4: Ext4, image: Path) -> None:
    """Mark the journal as empty: whatever is in it is at home by now."""
    if not ext4.number(Super.COMPAT) & _HAS_JOURNAL:
        return
    place = ext4.block(ext4.number(Super.JOURNAL_INODE), 0) * ext4.block_size
    with image.open("r+b", buffering=0) as file:
        raw = bytearray(os.pread(file.fileno(), _JOURNAL_SIZE, place))
        if not place or len(raw) != _JOURNAL_SIZE or _be32(raw, 0) != _JOURNAL_MAGIC:
            raise CorruptGuestError("the journal of the guest's ext4 has no super block")
        struct.pack_into(">I", raw, _JOURNAL_START, 0)
        if _be32(raw, 0x28) & _JOURNAL_CSUM_FEATURES:
            struct.pack_into(">I", raw, _JOURNAL_CHECKSUM, 0)
            struct.pack_into(">I", raw, _JOURNAL_CHECKSUM, ext4.crc32c(bytes(raw)))
        _write_all(file.fileno(), bytes(raw), place)
    ext4.set_number(Super.INCOMPAT, ext4.number(Super.INCOMPAT) & ~_RECOVER)


def _be32(raw: bytearray, offset: int) -> int:
    value: int = struct.unpack_from(">I", raw, offset)[0]
    return value


def _write_files(ext4: Ext4, handover: HandOver) -> None:
    """Write the pages of files up to each file's size: behind it they are zero."""
    inodes = {inode.number: inode for inode in handover.inodes}
    for number, places in groupby(handover.files, key=lambda place: place.inode):
        raw = ext4.inode(number)
        if raw_inode.flags(raw) & raw_inode.ENCRYPT_FL:
            raise UnsupportedGuestError(
                f"inode {number} is encrypted and has unflushed data",
                hint="resume the VM, run 'sync' in it and save it again",
            )
        inode = inodes.get(number)
        size = inode.size if inode else 0
        if inode and stat.S_ISLNK(inode.mode):
            # The block has to be zero behind the target (e2fsck/pass1.c, its check of links).
            block = ext4.block_size
            ext4.write(number, _pieces(handover, places, size, -(-size // block) * block))
            raw = ext4.inode(number)
            raw_inode.set_size(raw, size)
            ext4.set_inode(number, raw)
        else:
            ext4.write(number, _pieces(handover, places, size, size))


def _pieces(
    handover: HandOver, places: Iterator[Place], size: int, end: int
) -> Iterator[tuple[int, bytes]]:
    """Yield what is below ``size``, with zeros behind it up to ``end``."""
    for place in places:
        at = place.offset
        for data in handover.read(place):
            if at < end:
                yield at, data[: max(0, size - at)].ljust(len(data), b"\0")[: end - at]
            at += len(data)


def _write_first(ext4: Ext4, handover: HandOver) -> None:
    """Let the first block of a file be what its page holds; see ``Unflushed.first``."""
    for place in handover.first:
        flags = raw_inode.flags(ext4.inode(place.inode))
        if flags & (raw_inode.ENCRYPT_FL | raw_inode.INLINE_DATA_FL):
            continue
        data = b"".join(handover.read(place))[: ext4.block_size]
        if ext4.block(place.inode, 0) and ext4.read(place.inode, [(0, len(data))]) != [data]:
            ext4.write(place.inode, iter([(0, data)]))


def _settle_inodes(ext4: Ext4, handover: HandOver) -> int:
    """Set sizes and times that are in memory alone; return how many inodes had to be changed.

    A change sets the inode's times before it has a handle of the journal, which it may have to wait
    for (fs/inode.c, ``file_update_time``; fs/ext4/inode.c, ``ext4_dirty_inode``): a guest that is
    stopped there has the time in memory alone. It is one of the last that memory knows; of these
    only the change times count, since a file can be given any other, one to come included.
    """
    unflushed = {place.inode for place in handover.files}
    newest = max((one.ctime_ns for one in handover.inodes), default=0)
    since = newest - _UNDER_WAY_NS
    wrong: list[str] = []
    changed = 0
    for inode in sorted(handover.inodes, key=lambda one: one.number):
        if not inode.links or is_own(inode.number):
            continue
        raw = ext4.inode(inode.number)
        late = inode.lazy or inode.number in unflushed
        if not late and not raw_inode.difference(raw, inode):
            continue
        if not late and raw_inode.flags(raw) & raw_inode.EA_INODE_FL:
            continue  # its times and links hold other things
        told = raw_inode.difference(raw, inode, late=late, since=since)
        if told:
            if late:  # else the proof finds it
                wrong.append(f"inode {inode.number}: {told}")
            continue
        before = bytes(raw)
        raw_inode.settle(raw, inode)
        if raw != before:
            ext4.set_inode(inode.number, raw)
            changed += 1
    refuse(wrong)
    return changed


def _list_orphans(ext4: Ext4, handover: HandOver) -> None:
    """Without a journal, deleted files that are open are on no list (ext4_orphan_add): make one."""
    if ext4.number(Super.COMPAT) & _HAS_JOURNAL:
        return
    for inode in handover.inodes:
        raw = ext4.inode(inode.number)
        if not inode.links and raw_inode.is_orphan(raw):
            raw_inode.set_next_orphan(raw, ext4.number(Super.LAST_ORPHAN))
            ext4.set_inode(inode.number, raw)
            ext4.set_number(Super.LAST_ORPHAN, inode.number)


def _release_attributes(ext4: Ext4, handover: HandOver) -> None:
    """Release what e2fsck would lose: attributes of deleted inodes that have no blocks of data.

    It passes by the attributes' block of inline and special files (e2fsck 1.47 ``e2fsck/super.c``,
    ``release_inode_blocks``), and finds it lost afterwards.
    """
    for inode in handover.inodes:
        if inode.links or is_own(inode.number):
            continue
        try:
            raw = ext4.inode(inode.number)
        except CorruptGuestError:
            continue  # nobody reads it any more; if that is not so, the proof finds it
        block = raw_inode.attribute_block(raw)
        if block and raw_inode.is_orphan(raw) and not ext4.has_blocks(raw):
            ext4.release_attributes(inode.number, block)
            raw_inode.forget_attribute_block(raw)
            ext4.set_inode(inode.number, raw)


def _release_orphans(image: Path) -> bool:
    """Release what was deleted while it was open; tell whether there was any.

    On a file system that calls itself clean, e2fsck 1.47 releases the inodes that an orphan file
    lists, empties the file only when it is run again, and leaves the feature flag where there was
    nothing.
    """
    released = False
    for _ in range(_ORPHAN_RUNS):
        with Ext4(image) as ext4:
            if not _empty_orphan_file(ext4, image) or ext4.number(Super.LAST_ORPHAN):
                released = True
            else:
                features = ext4.number(Super.RO_COMPAT)
                if features & _ORPHAN_PRESENT:
                    ext4.set_number(Super.RO_COMPAT, features & ~_ORPHAN_PRESENT)
                return released
        e2fsck(image, "-p", good=(0, 1))
    return released


def _empty_orphan_file(ext4: Ext4, image: Path) -> bool:
    """Tell whether an orphan file lists nothing (fs/ext4/orphan.c): each block ends in 8 others."""
    if not ext4.number(Super.RO_COMPAT) & _ORPHAN_PRESENT:
        return True
    number = ext4.number(Super.ORPHAN_FILE)
    blocks = -(-raw_inode.size(ext4.inode(number)) // ext4.block_size)
    if blocks > _MAX_ORPHAN_BLOCKS:
        raise CorruptGuestError(f"the orphan file of the guest's ext4 has {blocks} blocks")
    with image.open("rb", buffering=0) as file:
        for index in range(blocks):
            place = ext4.block(number, index) * ext4.block_size
            if os.pread(file.fileno(), ext4.block_size - 8, place).strip(b"\0"):
                return False
    return True
