"""The fence notices every change, and QEMU's image lock is seen without being taken."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import struct
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import NotSuspendedError, StaleError, StateError
from ouassister.state.fence import check_fence, fence, refuse_other, stamp
from ouassister.state.running import writer_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK = 4096


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    save, disk = tmp_path / "save.img", tmp_path / "disk.qcow2"
    save.write_bytes(os.urandom(100 * BLOCK + 17))
    disk.write_bytes(os.urandom(300 * BLOCK))
    return save, disk


def test_fence_untouched_holds(files: tuple[Path, Path]) -> None:
    binding = fence(files[0], files[1:])
    assert binding.save == stamp(files[0])
    assert [one.path for one in binding.disks] == [str(files[1])]
    check_fence(binding)
    files[1].read_bytes()  # reading changes nothing
    check_fence(binding)


def test_fence_of_other_files_is_refused_though_nothing_changed(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    save, disk = files
    binding = fence(save, [disk])
    refuse_other(binding, save, [disk])
    for other in ((tmp_path / "other", [disk]), (save, [disk, tmp_path / "other"])):
        with pytest.raises(StaleError, match=f"made for other files than {tmp_path / 'other'}"):
            refuse_other(binding, *other)


def test_stamp_of_small_and_empty_files(tmp_path: Path) -> None:
    for size in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 64 * BLOCK, 65 * BLOCK):
        path = tmp_path / str(size)
        path.write_bytes(bytes(size))
        assert stamp(path).size == size
        assert stamp(path) == stamp(path)


def put_times_back(path: Path, write: Callable[[], object]) -> None:
    before = path.stat()
    write()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def rewrite(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"changed")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "appended": (append, "has another size"),
    "rewritten": (lambda path: rewrite(path, 50 * BLOCK), "was written to"),
    "times put back": (
        lambda path: put_times_back(path, lambda: rewrite(path, 1)),
        "was written to, or its attributes",
    ),
    "replaced": (
        lambda path: (
            path.with_suffix(".new").write_bytes(path.read_bytes())
            and path.with_suffix(".new").replace(path)
        ),
        "is another file",
    ),
    "removed": (lambda path: path.unlink(), "is gone"),
    "made a folder": (make_folder, "is no regular file any more"),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_fence_change_is_named(files: tuple[Path, Path], which: int, change: str) -> None:
    binding = fence(files[0], files[1:])
    act, words = CHANGES[change]
    act(files[which])
    with pytest.raises(StaleError, match=words) as caught:
        check_fence(binding)
    assert str(files[which]) in caught.value.message


@pytest.mark.parametrize("offset", [0, 299 * BLOCK])
def test_fence_contents_count_when_all_else_is_equal(files: tuple[Path, Path], offset: int) -> None:
    before = stamp(files[1])
    rewrite(files[1], offset)
    after = stamp(files[1])
    times = dataclasses.replace(after, mtime_ns=before.mtime_ns, ctime_ns=before.ctime_ns)
    assert times != before
    assert times.sample_sha256 != before.sample_sha256


def test_fence_without_save_is_not_suspended(tmp_path: Path) -> None:
    with pytest.raises(NotSuspendedError):
        fence(tmp_path / "nothing", ())


def test_fence_without_disk_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"nothing\.qcow2 does not exist"):
        fence(files[0], (tmp_path / "nothing.qcow2",))


def test_fence_of_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StateError, match="no regular file"):
        fence(tmp_path / "fifo", ())


def lock(path: Path, byte: int) -> int:
    """Hold one of QEMU's lock bytes, as a process that has the image open."""
    descriptor = os.open(path, os.O_RDWR)
    kind = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
    fcntl.fcntl(descriptor, 37, kind)  # F_OFD_SETLK
    return descriptor


def test_writer_is_seen_by_its_lock_alone(files: tuple[Path, Path]) -> None:
    disk = files[1]
    assert not writer_of(disk)
    readers = [lock(disk, 100), lock(disk, 103), lock(disk, 201)]  # read, resize; "no writers"
    assert not writer_of(disk)
    writer = lock(disk, 101)
    assert writer_of(disk)
    assert writer_of(disk)  # asking took nothing
    os.close(writer)
    assert not writer_of(disk)
    for reader in readers:
        os.close(reader)
