"""libext2fs, the library of e2fsck and of ext4-view, for what has to be written into a file system.

Blocks for delayed allocations, extents that become written, sizes and times of inodes: e2fsprogs
knows how, with bitmaps, group descriptors and checksums. Called in the sandbox alone: the file
system is a guest's.

Source: e2fsprogs 1.47 ``lib/ext2fs/ext2fs.h``, ``fileio.c``, ``openfs.c``, ``csum.c``,
``dirent.c``; the first members of ``struct struct_ext2_filsys`` are part of its ABI.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Final, Self

from ouassister.errors import CorruptGuestError, HostNotReadyError, UnsupportedGuestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

# EXT2_FLAG_*. Backups of the super block and descriptors are left alone: nobody reads them here.
_RW, _CHANGED, _DIRTY, _MASTER_ONLY = 0x01, 0x02, 0x04, 0x200
_BITS64, _SKIP_MMP = 0x20000, 0x100000  # that wait is for file systems in use
_FILE_WRITE: Final = 1  # EXT2_FILE_WRITE
_FLAGS_AT, _SUPER_AT = 16, 32  # struct struct_ext2_filsys

_U32, _U64 = ctypes.c_uint32, ctypes.c_uint64
_PTR: Final = ctypes.c_void_p
_ENTRY: Final = ctypes.CFUNCTYPE(
    ctypes.c_int, _U32, ctypes.c_int, _PTR, ctypes.c_int, ctypes.c_int, _PTR, _PTR
)


class _Library:
    """The functions that are used, with their types."""

    def __init__(self) -> None:
        try:
            self._ext2 = ctypes.CDLL("libext2fs.so.2")
            self._errors = ctypes.CDLL("libcom_err.so.2")
        except OSError as error:
            raise HostNotReadyError(f"libext2fs is missing: {error}") from error
        self.io = ctypes.c_void_p.in_dll(self._ext2, "unix_io_manager")
        self.message = self._errors.error_message
        self.message.restype = ctypes.c_char_p
        self.message.argtypes = [ctypes.c_long]
        self._ext2.initialize_ext2_error_table()
        p, i, n, q = _PTR, ctypes.c_int, _U32, _U64
        self.open = self._get("open", ctypes.c_char_p, i, i, ctypes.c_uint, p, p)
        self.close = self._get("close_free", p)
        self.flush = self._get("flush", p)
        self.read_bitmaps = self._get("read_bitmaps", p)
        self.read_inode = self._get("read_inode_full", p, n, p, i)
        self.write_inode = self._get("write_inode_full", p, n, p, i)
        self.file_open = self._get("file_open", p, n, i, p)
        self.file_seek = self._get("file_llseek", p, q, i, p)
        self.file_write = self._get("file_write", p, ctypes.c_char_p, ctypes.c_uint, p)
        self.file_read = self._get("file_read", p, p, ctypes.c_uint, p)
        self.file_close = self._get("file_close", p)
        self.bmap = self._get("bmap2", p, n, p, p, i, q, p, p)
        self.dir_iterate = self._get("dir_iterate2", p, n, i, p, _ENTRY, p)
        self.group_free_blocks = self._get("bg_free_blocks_count", p, n, restype=_U32)
        self.group_free_inodes = self._get("bg_free_inodes_count", p, n, restype=_U32)
        self.has_blocks = self._get("inode_has_valid_blocks2", p, p, restype=i)
        self.adjust_attributes = self._get("adjust_ea_refcount3", p, q, p, i, p, n)
        self.count_block = self._get("block_alloc_stats2", p, q, i, restype=None)
        self.crc32c = self._get("crc32c_le", n, ctypes.c_char_p, ctypes.c_size_t, restype=_U32)

    def _get(
        self, name: str, *types: object, restype: object = ctypes.c_long
    ) -> Callable[..., int]:
        function = getattr(self._ext2, f"ext2fs_{name}")
        function.argtypes = list(types)
        function.restype = restype
        return function  # type: ignore[no-any-return]


class Super:
    """Offsets in ``struct ext2_super_block``; lib/ext2fs/ext2_fs.h."""

    INODES, BLOCKS, FREE_BLOCKS, FREE_INODES, FIRST_BLOCK = 0x00, 0x04, 0x0C, 0x10, 0x14
    MAX_MOUNTS, CHECK_INTERVAL = 0x36, 0x44
    BLOCKS_PER_GROUP, STATE, FIRST_INODE, INODE_SIZE = 0x20, 0x3A, 0x54, 0x58
    COMPAT, INCOMPAT, RO_COMPAT, UUID = 0x5C, 0x60, 0x64, 0x68
    JOURNAL_INODE, JOURNAL_DEVICE, LAST_ORPHAN = 0xE0, 0xE4, 0xE8
    BLOCKS_HIGH, FREE_BLOCKS_HIGH, ORPHAN_FILE = 0x150, 0x158, 0x280


class Ext4:
    """An open ext4 file system.

    Args:
        image: File that holds it; nobody else may have it open for writing.
        writable: It will be changed.

    Attributes:
        inode_size: Bytes of an inode.
        block_size: Bytes of a block.

    Raises:
        HostNotReadyError: libext2fs is not installed.
        UnsupportedGuestError: It is no ext4 file system that libext2fs knows.
    """

    def __init__(self, image: Path, *, writable: bool = True) -> None:
        self._lib = _Library()
        self._fs = ctypes.c_void_p()
        flags = _MASTER_ONLY | _BITS64 | _SKIP_MMP | (_RW if writable else 0)
        code = self._lib.open(bytes(image), flags, 0, 0, self._lib.io, ctypes.byref(self._fs))
        if code:
            raise UnsupportedGuestError(f"the guest's ext4 cannot be opened: {self._words(code)}")
        assert self._fs.value is not None  # noqa: S101 - no error
        pointer = ctypes.c_void_p.from_address(self._fs.value + _SUPER_AT).value
        assert pointer is not None  # noqa: S101 - no error
        self._super = (ctypes.c_char * 1024).from_address(pointer)
        self.inode_size = self.number(Super.INODE_SIZE, "H")
        self.block_size = 1024 << self.number(0x18)
        self._bitmaps = False

    def __enter__(self) -> Self:
        """Keep it open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is pending, unless an error passes through; close."""
        if kind is not None:
            self._change_flags(clear=_DIRTY | _CHANGED)
        fs, self._fs = self._fs, ctypes.c_void_p()
        code = self._lib.close(ctypes.byref(fs))
        if code and kind is None:
            raise CorruptGuestError(f"the view cannot be written: {self._words(code)}")

    # --- the super block ---

    def number(self, offset: int, code: str = "I") -> int:
        """Return a number of the super block."""
        value: int = struct.unpack_from(f"<{code}", self._super, offset)[0]
        return value

    def set_number(self, offset: int, value: int, code: str = "I") -> None:
        """Change a number of the super block."""
        struct.pack_into(f"<{code}", self._super, offset, value)
        self._change_flags(put=_DIRTY | _CHANGED)

    def text(self, offset: int, size: int) -> bytes:
        """Return bytes of the super block."""
        return self._super.raw[offset : offset + size]

    def _change_flags(self, put: int = 0, clear: int = 0) -> None:
        assert self._fs.value is not None  # noqa: S101 - open
        flags = ctypes.c_int.from_address(self._fs.value + _FLAGS_AT)
        flags.value = (flags.value | put) & ~clear

    def count_free(self) -> None:
        """Sum the free blocks and inodes of all groups, as mounting does.

        Memory counts them per processor, and the super block's own numbers are old.
        """
        blocks = self.number(Super.BLOCKS) | self._high(Super.BLOCKS_HIGH)
        per_group = self.number(Super.BLOCKS_PER_GROUP)
        groups = -(-(blocks - self.number(Super.FIRST_BLOCK)) // per_group)
        free = sum(self._lib.group_free_blocks(self._fs, group) for group in range(groups))
        inodes = sum(self._lib.group_free_inodes(self._fs, group) for group in range(groups))
        free <<= self.number(0x1C) - self.number(0x18)  # clusters to blocks
        self.set_number(Super.FREE_BLOCKS, free & 0xFFFF_FFFF)
        if self.number(Super.INCOMPAT) & 0x80:
            self.set_number(Super.FREE_BLOCKS_HIGH, free >> 32)
        self.set_number(Super.FREE_INODES, inodes)

    def call_clean(self) -> None:
        """Say that it was unmounted well, and that no periodic check is due."""
        self.set_number(Super.STATE, self.number(Super.STATE, "H") | 1, "H")
        self.set_number(Super.MAX_MOUNTS, -1, "h")
        self.set_number(Super.CHECK_INTERVAL, 0)

    def _high(self, offset: int) -> int:
        return self.number(offset) << 32 if self.number(Super.INCOMPAT) & 0x80 else 0

    def crc32c(self, data: bytes) -> int:
        """Return the checksum that ext4 and its journal use."""
        return self._lib.crc32c(0xFFFF_FFFF, data, len(data))

    # --- inodes and files ---

    def inode(self, number: int) -> bytearray:
        """Read an inode; its checksum is verified.

        Raises:
            CorruptGuestError: It is none, or its checksum is wrong.
        """
        raw = bytearray(self.inode_size)
        place = (ctypes.c_char * self.inode_size).from_buffer(raw)
        self._check(
            self._lib.read_inode(self._fs, number, place, self.inode_size), f"inode {number}"
        )
        return raw

    def set_inode(self, number: int, raw: bytearray) -> None:
        """Write an inode."""
        place = (ctypes.c_char * self.inode_size).from_buffer(raw)
        self._check(
            self._lib.write_inode(self._fs, number, place, self.inode_size), f"inode {number}"
        )

    def block(self, inode: int, index: int) -> int:
        """Return the block of the device that a block of a file lies in; 0 for a hole."""
        found = ctypes.c_uint64()
        self._check(
            self._lib.bmap(self._fs, inode, None, None, 0, index, None, ctypes.byref(found)),
            f"inode {inode}",
        )
        return found.value

    def write(self, inode: int, pieces: Iterator[tuple[int, bytes]]) -> None:
        """Write bytes into a file, with blocks where there are none yet.

        Raises:
            CorruptGuestError: There is no room, or the file's extents are damaged.
        """
        self._read_bitmaps()
        what = f"writing inode {inode}"
        file = ctypes.c_void_p()
        self._check(self._lib.file_open(self._fs, inode, _FILE_WRITE, ctypes.byref(file)), what)
        done = ctypes.c_uint()
        try:
            for offset, data in pieces:
                self._check(self._lib.file_seek(file, offset, 0, None), what)
                while data:
                    code = self._lib.file_write(file, data, len(data), ctypes.byref(done))
                    self._check(code, what)
                    data = data[done.value :]
        except BaseException:
            self._lib.file_close(file)
            raise
        self._check(self._lib.file_close(file), what)

    def has_blocks(self, raw: bytearray) -> bool:
        """Tell whether an inode can have blocks of data: inline ones and special files cannot."""
        return bool(
            self._lib.has_blocks(self._fs, (ctypes.c_char * self.inode_size).from_buffer(raw))
        )

    def release_attributes(self, inode: int, block: int) -> None:
        """Take an inode off those that share a block of extended attributes; the last frees it.

        Raises:
            CorruptGuestError: It is no such block.
        """
        self._read_bitmaps()
        buffer, left = ctypes.create_string_buffer(self.block_size), _U32()
        code = self._lib.adjust_attributes(self._fs, block, buffer, -1, ctypes.byref(left), inode)
        self._check(code, f"the attributes of inode {inode}")
        if not left.value:
            self._lib.count_block(self._fs, block, -1)

    def _read_bitmaps(self) -> None:
        if not self._bitmaps:
            self._check(self._lib.read_bitmaps(self._fs), "the bitmaps")
            self._bitmaps = True

    def read(self, inode: int, places: Iterable[tuple[int, int]]) -> list[bytes]:
        """Read bytes of a file: for each offset and size what is there, shorter at its end.

        Raises:
            CorruptGuestError: The file's extents are damaged.
        """
        what = f"reading inode {inode}"
        file = ctypes.c_void_p()
        self._check(self._lib.file_open(self._fs, inode, 0, ctypes.byref(file)), what)
        done = ctypes.c_uint()
        found = []
        try:
            for offset, size in places:
                self._check(self._lib.file_seek(file, offset, 0, None), what)
                buffer = ctypes.create_string_buffer(size)
                self._check(self._lib.file_read(file, buffer, size, ctypes.byref(done)), what)
                found.append(buffer.raw[: done.value])
        finally:
            self._lib.file_close(file)
        return found

    def entries(self, directory: int) -> dict[bytes, int]:
        """Read a directory; the checksums of its blocks are verified.

        Raises:
            CorruptGuestError: It is none, or is damaged.
        """
        found: dict[bytes, int] = {}

        def take(
            _directory: int,
            _kind: int,
            entry: int,
            _offset: int,
            _size: int,
            _block: int,
            _own: int,
        ) -> int:
            inode, length = _HEAD.unpack(ctypes.string_at(entry, 7))
            if inode:
                found[ctypes.string_at(entry + 8, length)] = inode
            return 0

        self._check(
            self._lib.dir_iterate(self._fs, directory, 0, None, _ENTRY(take), None),
            f"directory {directory}",
        )
        return found

    def _check(self, code: int, what: str) -> None:
        if code:
            raise CorruptGuestError(f"{what}: {self._words(code)}")

    def _words(self, code: int) -> str:
        return (self._lib.message(code) or b"").decode("utf-8", "replace")


_HEAD: Final = struct.Struct("<I2xB")  # struct ext2_dir_entry_2
