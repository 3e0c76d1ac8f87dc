"""Snapshots of a VM's files: taken, kept, pruned, gone back to, and what is in the way of each."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import lacking, need

from ouassister import snapshots
from ouassister.errors import RollbackRefusedError, StaleError, TamperedError, WorkDiskFullError
from ouassister.provider.retire import rename_save
from ouassister.provider.vmtoml import Disk, VmConfig
from ouassister.snapshots import Stage
from ouassister.state.fence import fence

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.host

MIB = 1 << 20


@dataclass(frozen=True)
class Sleeper:
    """Files of a VM that sleeps: a raw disk with a hole, a second one, a backing file, a save."""

    folder: Path

    @property
    def config(self) -> VmConfig:
        disks = (
            Disk("disk0", self.folder / "a.raw", "raw"),
            Disk("disk1", self.folder / "b.raw", "raw"),
        )
        where = (self.folder / "vm.toml", self.folder, "web1", self.folder / "save.img")
        return VmConfig(*where, (), self.folder / "qmp.sock", None, disks, ())

    @property
    def own(self) -> Path:
        return self.folder / "own"

    def sleep(self, word: str) -> None:
        """Have written to the disks, and be saved."""
        with (self.folder / "a.raw").open("r+b") as file:
            file.seek(3 * MIB)
            file.write(word.encode())
        (self.folder / "b.raw").write_text(word)
        (self.folder / "save.part").write_text(f"memory of {word}")
        (self.folder / "save.part").rename(self.folder / "save.img")

    def take(self, changeset_id: str) -> None:
        paths = [*(disk.path for disk in self.config.disks), self.folder / "base"]
        bound = fence(self.config.save, paths)
        snapshots.take(self.config, changeset_id, bound, self.own)

    def resume(self, changeset_id: str) -> None:
        """Take a snapshot and wake up."""
        self.take(changeset_id)
        snapshots.keep_save(self.config, changeset_id, self.own)
        self.config.retire_save()
        assert not self.config.save.exists()

    def go_back(self, word: str = snapshots.LAST) -> None:
        snapshots.go_back(self.config, snapshots.find(self.own, word), self.own)

    def content(self) -> dict[str, str]:
        """Every file of the VM that is not ours."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.folder.iterdir()
            if path.is_file() and not path.name.endswith(".resumed")
        }


def make(folder: Path) -> Sleeper:
    sleeper = Sleeper(folder)
    sleeper.own.mkdir()
    with (folder / "a.raw").open("wb") as file:
        file.truncate(8 * MIB)
    (folder / "a.raw").chmod(0o640)
    (folder / "base").write_text("below")
    sleeper.sleep("first")
    return sleeper


@pytest.fixture
def sleeper(tmp_path: Path) -> Sleeper:
    return make(tmp_path)


@contextlib.contextmanager
def mounted(place: Path, *words: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        lacking("mounting takes root")
    place.mkdir()
    subprocess.run(["mount", *words, str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_vm_sleeps_as_before_after_it_went_back_again_and_again(sleeper: Sleeper) -> None:
    before = sleeper.content()
    disk = sleeper.config.disks[0].path
    was = disk.stat()
    for name in ("1" * 64, "2" * 64, "3" * 64):
        sleeper.resume(name)
        (taken,) = snapshots.known(sleeper.own)
        assert (taken.stage, taken.changeset_id) == (Stage.KEPT, name)
        sleeper.sleep(f"after {name}")
        sleeper.go_back()
        assert sleeper.content() == before
        now = disk.stat()
        assert (now.st_mode, now.st_uid, now.st_mtime_ns) == (
            was.st_mode,
            was.st_uid,
            was.st_mtime_ns,
        )
        assert now.st_blocks * 512 < now.st_size, "the hole was filled"
        assert snapshots.known(sleeper.own) == ()


def test_links_that_the_gate_had_closed_are_known_again_after_going_back(sleeper: Sleeper) -> None:
    for name, before, after in (("1", ("nic0", "nic1"), ()), ("2", (), ("nic0",))):
        sleeper.config.keep_closed(before)
        sleeper.resume(name * 64)
        sleeper.config.keep_closed(after)
        sleeper.sleep("later")
        sleeper.go_back()
        assert sleeper.config.closed_by_gate == before


def test_save_that_has_two_names_is_out_of_the_way_all_the_same(tmp_path: Path) -> None:
    save = tmp_path / "save.img"
    save.write_text("memory")
    os.link(save, tmp_path / "save.img.resumed")  # between two names, rename(2) does nothing
    rename_save(save)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["save.img.resumed"]


def test_save_that_is_a_link_is_copied_and_its_target_left_alone(sleeper: Sleeper) -> None:
    save = sleeper.config.save
    target = save.rename(sleeper.folder / "elsewhere")
    save.symlink_to(target)
    was = target.stat()
    sleeper.resume("1" * 64)
    assert (target.stat().st_nlink, target.stat().st_ctime_ns) == (1, was.st_ctime_ns)
    sleeper.go_back()
    assert (save.is_symlink(), save.read_text()) == (False, "memory of first")


def test_oldest_are_pruned_and_an_older_one_can_be_gone_back_to(sleeper: Sleeper) -> None:
    for number in range(1, 5):
        sleeper.resume(str(number) * 64)
        sleeper.sleep(f"sleep {number}")
    assert snapshots.prune(sleeper.own, 2) == ("2" * 16, "1" * 16)
    assert [one.snapshot_id for one in snapshots.known(sleeper.own)] == ["4" * 16, "3" * 16]
    assert sorted(path.name for path in sleeper.folder.glob("*.ouassister-*")) == [
        f"{name}.ouassister-{number * 16}"
        for name in ("a.raw", "b.raw", "save.img")
        for number in "34"
    ]
    with pytest.raises(RollbackRefusedError, match="there is no snapshot '1111"):
        sleeper.go_back("1" * 16)
    sleeper.go_back("3" * 16)
    assert (sleeper.folder / "b.raw").read_text() == "sleep 2"
    assert sleeper.config.save.read_text() == "memory of sleep 2"
    assert snapshots.discard(sleeper.own) == ("4" * 16,)
    assert list(sleeper.folder.glob("*.ouassister-*")) == []


def test_copy_shares_its_blocks_where_the_file_system_can(tmp_path: Path) -> None:
    need("mkfs.xfs")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True)
    with mounted(tmp_path / "mount", "-o", "loop", str(image)) as place:
        sleeper = make(place)
        (place / "b.raw").write_bytes(os.urandom(250 * MIB))  # there is no room for a second one
        before = sleeper.content()
        sleeper.resume("1" * 64)
        sleeper.sleep("after")
        sleeper.go_back()
        assert sleeper.content() == before


def test_no_room_is_told_before_anything_is_copied(tmp_path: Path) -> None:
    with mounted(tmp_path / "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as place:
        sleeper = make(place)
        (place / "b.raw").write_bytes(bytes(600 << 10))
        before = sleeper.content()
        with pytest.raises(WorkDiskFullError, match=f"in {place}, which has 0"):
            sleeper.take("1" * 64)
        assert (sleeper.content(), snapshots.known(sleeper.own)) == (before, ())


def test_room_that_goes_while_it_is_copied_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_data = snapshots._copy_data

    def filled(old: int, new: int) -> None:
        with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        copy_data(old, new)

    with mounted(tmp_path / "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as place:
        sleeper = make(place)
        before = sleeper.content()
        # The record lies where there is room.
        monkeypatch.setattr(Sleeper, "own", tmp_path)
        monkeypatch.setattr(snapshots, "_copy_data", filled)
        with pytest.raises(WorkDiskFullError, match="no room for a snapshot"):
            sleeper.take("1" * 64)
        (place / "filler").unlink()
        assert (sleeper.content(), snapshots.known(sleeper.own)) == (before, ())


def test_what_a_killed_run_left_is_swept_and_no_way_back(sleeper: Sleeper) -> None:
    before = sleeper.content()
    child = os.fork()
    if child == 0:
        os.fsync = lambda _file: os.kill(os.getpid(), 9) if _copying(sleeper) else None  # type: ignore[assignment]
        sleeper.take("1" * 64)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert [one.stage for one in snapshots.known(sleeper.own)] == [Stage.COPYING]
    assert sleeper.content() != before
    with pytest.raises(RollbackRefusedError, match="there is no snapshot"):
        sleeper.go_back()
    snapshots.sweep(sleeper.own)
    assert sleeper.content() == before


def _copying(sleeper: Sleeper) -> bool:
    return (sleeper.folder / f"b.raw.ouassister-{'1' * 16}").exists()


def test_snapshot_whose_save_is_still_to_come_is_swept_unless_the_resume_goes_on(
    sleeper: Sleeper,
) -> None:
    sleeper.take("1" * 64)
    snapshots.sweep(sleeper.own, "1" * 64)
    snapshots.keep_save(sleeper.config, "2" * 64, sleeper.own)
    assert [one.stage for one in snapshots.known(sleeper.own)] == [Stage.COPIED]
    snapshots.sweep(sleeper.own, "2" * 64)
    assert snapshots.known(sleeper.own) == ()


@pytest.mark.parametrize("name", ["a.raw.ouassister-1111111111111111", "base"])
def test_snapshot_that_was_written_to_is_refused_and_nothing_done(
    sleeper: Sleeper, name: str
) -> None:
    sleeper.resume("1" * 64)
    sleeper.sleep("after")
    with (sleeper.folder / name).open("r+b") as file:
        file.write(b"written")
    before = sleeper.content()
    with pytest.raises(StaleError, match="is not what it was"):
        sleeper.go_back()
    (sleeper.folder / name).unlink()
    del before[name]
    with pytest.raises(StaleError, match="is gone: there is no way back"):
        sleeper.go_back()
    assert sleeper.content() == before


def test_way_back_that_was_stopped_is_gone_to_its_end(
    sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sleeper.content()
    sleeper.resume("1" * 64)
    sleeper.sleep("between")
    sleeper.resume("2" * 64)
    sleeper.sleep("after")
    replace = Path.replace

    def stopped(self: Path, target: Path | str) -> Path:
        if str(target).endswith("b.raw"):
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            sleeper.go_back("1" * 16)
    assert not sleeper.config.save.exists(), "it would wake up on disks that are not its own"
    with pytest.raises(StaleError, match="half way back"):
        snapshots.discard(sleeper.own)
    with pytest.raises(RollbackRefusedError, match=f"half way back to the snapshot {'1' * 16}"):
        sleeper.go_back("2" * 16)
    sleeper.go_back()  # the one that was begun, not the newest
    snapshots.discard(sleeper.own)
    assert sleeper.content() == before


def test_snapshot_of_other_files_is_refused(sleeper: Sleeper) -> None:
    sleeper.resume("1" * 64)
    (sleeper.folder / "a.raw").rename(sleeper.folder / "c.raw")
    (sleeper.folder / "a.raw").symlink_to("c.raw")
    with pytest.raises(RollbackRefusedError, match="of other files than web1 has now"):
        sleeper.go_back()


def test_record_that_cannot_be_read_is_no_snapshot(sleeper: Sleeper) -> None:
    (sleeper.own / "snapshots.json").write_text('[{"snapshot_id": 1}]')
    with pytest.raises(TamperedError, match="is unreadable"):
        snapshots.known(sleeper.own)
