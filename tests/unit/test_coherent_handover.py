"""The way of unflushed bytes from the save file to the sandbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ouassister.disk import handover
from ouassister.errors import InternalError, PageAbsentError
from ouassister.kernel.cached_inodes import CachedFileSystem, CachedInode
from ouassister.kernel.pagecache import Piece
from ouassister.kernel.unflushed import Unflushed

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.model import PhysAddr

UUID = bytes(range(16))
INODE = CachedInode(
    address=1, number=12, mode=0o100644, uid=1, gid=2, links=1, device=0, size=1 << 40,
    generation=9, atime_ns=-1, mtime_ns=2, ctime_ns=3, lazy=True, head=4, marks=1, pages=1,
    operations=6, alias=5, swap=False,
)  # fmt: skip


class Ram:
    """Memory whose every byte is its page's number; nothing above page 9 was saved."""

    def read(self, address: PhysAddr, size: int) -> bytes:
        if address + size > 10 * 4096:
            raise PageAbsentError(address)
        return bytes(at >> 12 for at in range(address, address + size))


def sample() -> Unflushed:
    system = CachedFileSystem(0, "ext4", 254, 1, UUID, 4096, 0, "vda1")
    return Unflushed(
        system,
        device=[Piece(8192, 4096, 4096), Piece(0, 1024, 2 * 4096 + 1024)],
        inodes=[INODE],
        files={12: [Piece(4096, 8192, 3 * 4096)]},
        names=[(2, b"name", 12), (2, b"\xff" * 255, 0)],
        first={12: Piece(0, 10, 6 * 4096)},
        clean={12: [Piece(0, 20, 7 * 4096), Piece(4096, 30, 8 * 4096)]},
    )


def test_everything_arrives(tmp_path: Path) -> None:
    path = tmp_path / "unflushed"
    size = handover.write(path, sample(), Ram())
    assert size == path.stat().st_size
    opened = handover.HandOver(path)
    try:
        assert (opened.uuid, opened.block_size) == (UUID, 4096)
        assert [(one.offset, one.size) for one in opened.device] == [(8192, 4096), (0, 1024)]
        assert [b"".join(opened.read(one)) for one in opened.device] == [b"\1" * 4096, b"\2" * 1024]
        (place,) = opened.files
        assert (place.inode, place.offset, place.size) == (12, 4096, 8192)
        assert b"".join(opened.read(place)) == b"\3" * 4096 + b"\4" * 4096
        (place,) = opened.first
        assert (place.inode, place.offset, b"".join(opened.read(place))) == (12, 0, b"\6" * 10)
        assert [(one.offset, b"".join(opened.read(one))) for one in opened.clean] == [
            (0, b"\7" * 20),
            (4096, b"\x08" * 30),
        ]
        (inode,) = opened.inodes
        for name in ("number", "mode", "uid", "gid", "links", "size", "generation", "lazy"):
            assert getattr(inode, name) == getattr(INODE, name)
        assert (inode.atime_ns, inode.mtime_ns, inode.ctime_ns) == (-1, 2, 3)
        assert list(opened.names()) == [(2, b"name", 12), (2, b"\xff" * 255, 0)]
    finally:
        opened.close()


def test_page_that_was_never_saved_is_told(tmp_path: Path) -> None:
    one = sample()
    one.files[12] = [Piece(0, 4096, 10 * 4096)]
    with pytest.raises(PageAbsentError):
        handover.write(tmp_path / "unflushed", one, Ram())


def test_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "unflushed"
    handover.write(path, sample(), Ram())
    whole = path.read_bytes()
    for length in [*range(0, 700, 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InternalError):
            handover.HandOver(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InternalError):
        handover.HandOver(path)


def test_other_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "unflushed"
    path.write_bytes(bytes(4096))
    with pytest.raises(InternalError, match="no such file"):
        handover.HandOver(path)


def test_size_that_no_file_has_is_refused(tmp_path: Path) -> None:
    one = sample()
    one.inodes = [INODE._replace(size=-1)]
    handover.write(tmp_path / "unflushed", one, Ram())
    with pytest.raises(InternalError, match="size -1"):
        handover.HandOver(tmp_path / "unflushed")


def test_name_that_is_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "unflushed"
    one = sample()
    one.device, one.files, one.inodes, one.names = [], {}, [], [(2, b"name", 12)]
    one.first, one.clean = {}, {}
    handover.write(path, one, Ram())
    raw = bytearray(path.read_bytes())
    raw[-5] = 200  # the length of the name
    path.write_bytes(raw)
    opened = handover.HandOver(path)
    with pytest.raises(InternalError, match="name"):
        list(opened.names())
    opened.close()
