"""What memory holds of one file system, as a file: the way from the save file to the sandbox.

The save file is open in the process with the caller's rights; the guest's file system is parsed
only in the sandbox. Between the two lies this file: records of fixed size, then names, then the
bytes in the order of the records. It is read where nothing is trusted, so every number in it is
checked against the file's own length.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, Protocol

from ouassister.errors import InternalError
from ouassister.model import PhysAddr

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from ouassister.kernel.pagecache import Piece
    from ouassister.kernel.unflushed import Unflushed

_MAGIC: Final = b"OUAview\x02"
_HEADER: Final = struct.Struct("<8s16sIIIIIIQ")
_DEVICE: Final = struct.Struct("<QQ")
_FILE: Final = struct.Struct("<IQQ")
_INODE: Final = struct.Struct("<IHIIIIqIqqq?")
_NAME: Final = struct.Struct("<IIB")
_CHUNK: Final = 1 << 20


class Memory(Protocol):
    """Guest-physical memory."""

    def read(self, address: PhysAddr, size: int) -> bytes:
        """Return exactly ``size`` bytes."""


class Inode(NamedTuple):
    """An inode as memory knows it; see ``CachedInode`` in `ouassister.kernel.superblocks`."""

    number: int
    mode: int
    uid: int
    gid: int
    links: int
    device: int
    size: int
    generation: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    lazy: bool


class Place(NamedTuple):
    """Bytes of the hand-over and where they belong: in a file, or on the device (inode 0)."""

    inode: int
    offset: int
    size: int
    at: int  # in the hand-over


def write(path: Path, unflushed: Unflushed, memory: Memory) -> int:
    """Write what was collected of one file system; return the size.

    Raises:
        PageAbsentError: A page that is needed was never saved.
    """
    device = unflushed.device
    files = [(number, piece) for number, some in unflushed.files.items() for piece in some]
    first = [*unflushed.first.items()]
    clean = [(number, piece) for number, some in unflushed.clean.items() for piece in some]
    pieces = (*files, *first, *clean)
    names = b"".join(
        _NAME.pack(directory, inode, len(name)) + name for directory, name, inode in unflushed.names
    )
    with path.open("xb") as out:
        os.fchmod(out.fileno(), 0o644)  # subordinate ids read it; the folder above is private
        out.write(
            _HEADER.pack(_MAGIC, unflushed.file_system.uuid, unflushed.file_system.block_size,
                         len(device), len(files), len(first), len(clean), len(unflushed.inodes),
                         len(names))
        )  # fmt: skip
        out.write(b"".join(_DEVICE.pack(piece.offset, piece.size) for piece in device))
        out.write(b"".join(_FILE.pack(inode, piece.offset, piece.size) for inode, piece in pieces))
        out.write(
            b"".join(
                _INODE.pack(one.number, one.mode, one.uid, one.gid, one.links, one.device, one.size,
                            one.generation, one.atime_ns, one.mtime_ns, one.ctime_ns,
                            one.lazy)
                for one in unflushed.inodes
            )
        )  # fmt: skip
        out.write(names)
        _copy(out, device, memory)
        _copy(out, (piece for _, piece in pieces), memory)
        return out.tell()


def _copy(out: BinaryIO, pieces: Iterable[Piece], memory: Memory) -> None:
    for piece in pieces:
        for done in range(0, piece.size, _CHUNK):
            size = min(_CHUNK, piece.size - done)
            out.write(memory.read(PhysAddr(piece.physical + done), size))


class HandOver:
    """An opened hand-over.

    Attributes:
        uuid: Of the file system.
        block_size: As the kernel uses it.
        device: Blocks of the device.
        files: Parts of files.
        first: The first page of files, where it may be newer than the disk though it is clean.
        clean: Parts of files that the disk has already.
        inodes: All inodes that were cached.

    Raises:
        InternalError: The file is not one that `write` made.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        try:
            self._load()
        except struct.error as error:
            self._file.close()
            raise InternalError("the hand-over from memory is cut short") from error
        except BaseException:
            self._file.close()
            raise

    def _load(self) -> None:
        (magic, self.uuid, self.block_size, devices, files, first, clean, inodes,
         names) = _HEADER.unpack(self._file.read(_HEADER.size))  # fmt: skip
        if magic != _MAGIC:
            raise InternalError("the hand-over from memory is no such file")
        self._file.seek(0, 2)
        end = self._file.tell()
        at = _HEADER.size
        pieces = files + first + clean
        tables = devices * _DEVICE.size + pieces * _FILE.size + inodes * _INODE.size + names
        if at + tables > end:
            raise InternalError("the hand-over from memory is cut short")
        self._file.seek(at)
        raw_devices = self._file.read(devices * _DEVICE.size)
        raw_files = self._file.read(pieces * _FILE.size)
        raw_inodes = self._file.read(inodes * _INODE.size)
        self._names = self._file.read(names)
        at += tables
        self.device: list[Place] = []
        parts: list[Place] = []
        for offset, size in _DEVICE.iter_unpack(raw_devices):
            self.device.append(Place(0, offset, size, at))
            at += size
        for inode, offset, size in _FILE.iter_unpack(raw_files):
            parts.append(Place(inode, offset, size, at))
            at += size
        if at != end:
            raise InternalError(f"the hand-over from memory has {end} bytes, not {at}")
        self.files = parts[:files]
        self.first = parts[files : files + first]
        self.clean = parts[files + first :]
        self.inodes = [*map(Inode._make, _INODE.iter_unpack(raw_inodes))]
        for inode in self.inodes:
            if inode.size < 0:
                raise InternalError(f"inode {inode.number} in the hand-over has size {inode.size}")

    def names(self) -> Iterator[tuple[int, bytes, int]]:
        """Yield directory, name and inode of each cached entry; 0 where there is no such file."""
        at, data = 0, self._names
        while at < len(data):
            if len(data) - at < _NAME.size:
                raise InternalError("a name in the hand-over from memory is cut short")
            directory, inode, length = _NAME.unpack_from(data, at)
            at += _NAME.size
            name = data[at : at + length]
            if len(name) != length or not name:
                raise InternalError("a name in the hand-over from memory is cut short")
            at += length
            yield directory, name, inode

    def read(self, place: Place) -> Iterator[bytes]:
        """Yield the bytes of a place, in pieces of a bounded size."""
        for done in range(0, place.size, _CHUNK):
            size = min(_CHUNK, place.size - done)
            self._file.seek(place.at + done)
            data = self._file.read(size)
            if len(data) != size:
                raise InternalError("the hand-over from memory is cut short")
            yield data

    def close(self) -> None:
        """Release the file."""
        self._file.close()
