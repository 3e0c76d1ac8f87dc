"""What memory holds is laid over a file system, and a result that is not sound is refused."""

from __future__ import annotations

import os
import re
import stat
import struct
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need

from ouassister.disk import coherent, handover, proof, raw_inode
from ouassister.disk.libext2fs import Ext4, Super
from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel.cached_inodes import CachedFileSystem, CachedInode
from ouassister.kernel.pagecache import Piece
from ouassister.kernel.unflushed import Unflushed

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from ouassister.model import PhysAddr

pytestmark = pytest.mark.host

ROOT = 2
LAYOUTS = {
    "usual": ("-b", "4096"),
    "small-blocks": ("-b", "1024"),
    "old": ("-b", "1024", "-O", "^extent,^64bit,^metadata_csum,^flex_bg", "-I", "128"),
    "inline": ("-b", "4096", "-O", "inline_data"),
    "no-journal": ("-b", "4096", "-O", "^has_journal"),
    "clusters": ("-b", "4096", "-O", "bigalloc", "-C", "16384"),
}


class Ram:
    """Memory that is what a test puts into it."""

    def __init__(self) -> None:
        self._data = b""

    def put(self, data: bytes) -> int:
        self._data += data
        return len(self._data) - len(data)

    def read(self, address: PhysAddr, size: int) -> bytes:
        assert address + size <= len(self._data)
        return self._data[address : address + size]


class Sleeper:
    """A file system on a disk, and what its kernel remembers."""

    def __init__(self, folder: Path, options: tuple[str, ...], link: str = "") -> None:
        self.folder, self.image, self.ram = folder, folder / "image", Ram()
        self.block_size = int(options[options.index("-b") + 1])
        tree = folder / "tree"
        (tree / "dir").mkdir(parents=True)
        (tree / "dir" / "file").write_bytes(b"x" * 5000)
        (tree / "empty").touch()
        if link:
            (tree / "link").symlink_to(link)
        os.truncate(self._new("image"), 16 << 20)
        command = [need("mke2fs"), "-q", "-t", "ext4", *options, "-d", str(tree), str(self.image)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        self.found = Unflushed(self._system())
        self.number = {
            name: self._number(name)
            for name in ("dir", "dir/file", "empty", *["link"] * bool(link))
        }
        for number in (ROOT, *self.number.values()):
            self.found.inodes.append(self._inode(number))
        self.found.names += [
            (ROOT, b"dir", self.number["dir"]),
            (ROOT, b"empty", self.number["empty"]),
            (ROOT, b"missing", 0),
            (self.number["dir"], b"file", self.number["dir/file"]),
        ]

    def _new(self, name: str) -> Path:
        path = self.folder / name
        path.touch()
        return path

    def _system(self) -> CachedFileSystem:
        raw = self.image.read_bytes()[1024:2048]
        return CachedFileSystem(0, "ext4", 254, 1, raw[0x68:0x78], 4096, 0, "vda1")

    def _number(self, name: str) -> int:
        told = self.debugfs(f"stat /{name}")
        return int(told.split("Inode:")[1].split()[0])

    def debugfs(self, request: str, *options: str) -> str:
        command = [need("debugfs"), *options, "-R", request, str(self.image)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _inode(self, number: int) -> CachedInode:
        with Ext4(self.image) as ext4:
            raw = ext4.inode(number)
        zero = handover.Inode(number, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, lazy=False)
        values = {name: theirs for name, _, theirs in raw_inode._pairs(raw, zero)}
        size = struct.unpack_from("<I", raw, 4)[0]
        return CachedInode(
            0, number, values["mode"], values["owner"], values["group"], values["links"], 0, size,
            values["generation"], values["atime"], values["mtime"], values["ctime"], False, 0, 0,
            0, 0, 0, False,
        )  # fmt: skip

    def change(self, name: str, **what: int | bool) -> None:
        """Let memory say something else of an inode."""
        inodes = self.found.inodes
        for at, inode in enumerate(inodes):
            if inode.number == self.number[name]:
                inodes[at] = inode._replace(**what)  # type: ignore[arg-type]

    def dirty(self, name: str, offset: int, data: bytes) -> None:
        """Leave data of a file in memory."""
        pieces = self.found.files.setdefault(self.number[name], [])
        pieces.append(Piece(offset, len(data), self.ram.put(data)))

    def clean(self, name: str, offset: int, data: bytes) -> None:
        """Let memory have what the disk should have, too."""
        pieces = self.found.clean.setdefault(self.number[name], [])
        pieces.append(Piece(offset, len(data), self.ram.put(data)))

    def apply(self) -> dict[str, Any]:
        path = self.folder / "unflushed"
        path.unlink(missing_ok=True)
        handover.write(path, self.found, self.ram)
        where = {"image": str(self.image), "handover": str(path)}
        return coherent.apply(where) | {"proof": proof.prove(where)}

    def content(self, name: str) -> bytes:
        out = self.folder / "out"
        self.debugfs(f"dump /{name} {out}")
        return out.read_bytes()


@pytest.fixture(params=LAYOUTS)
def sleeper(request: pytest.FixtureRequest, tmp_path: Path) -> Sleeper:
    return Sleeper(tmp_path, LAYOUTS[request.param])


@pytest.fixture
def usual(tmp_path: Path) -> Sleeper:
    return Sleeper(tmp_path, LAYOUTS["usual"])


def test_nothing_in_memory_changes_nothing(sleeper: Sleeper) -> None:
    done = sleeper.apply()
    assert (done["blocks"], done["bytes"], done["inodes"], done["orphans"]) == (0, 0, 0, False)
    assert done["proof"] == {"inodes": 4, "names": 4, "pages": 0}
    assert sleeper.content("dir/file") == b"x" * 5000


def test_clean_pages_are_what_the_files_hold(sleeper: Sleeper) -> None:
    sleeper.clean("dir/file", 0, b"x" * 4096)
    sleeper.clean("dir/file", 4096, b"x" * 904)
    assert sleeper.apply()["proof"]["pages"] == 2


@pytest.mark.parametrize(
    ("offset", "data"), [(0, b"x" * 4095 + b"y"), (4096, b"y" * 904), (4096, b"x" * 905)]
)
def test_disk_of_an_earlier_moment_is_told_by_a_clean_page(
    sleeper: Sleeper, offset: int, data: bytes
) -> None:
    """All of its metadata is what memory says; the data was written back since."""
    sleeper.clean("dir/file", offset, data)
    told = f"inode {sleeper.number['dir/file']}: data at {offset:#x}"
    with pytest.raises(CorruptGuestError, match=told):
        sleeper.apply()


def test_block_is_zero_behind_the_target_of_a_link(tmp_path: Path) -> None:
    """Linux 5.10 keeps it in a page of the link; what an older file left is behind it."""
    sleeper = Sleeper(tmp_path, LAYOUTS["usual"], link="t" * 100)
    block = int(sleeper.debugfs("blocks /link").split()[0])
    with sleeper.image.open("r+b") as file:
        file.seek(block * 4096)
        file.write(b"old" * 1000)
    sleeper.dirty("link", 0, b"n" * 100 + b"old" * 1332)
    sleeper.apply()
    data = sleeper.image.read_bytes()[block * 4096 : (block + 1) * 4096]
    assert data == (b"n" * 100).ljust(4096, b"\0")
    assert sleeper.debugfs("stat /link").count("Size: 100") == 1


def test_first_page_of_a_file_wins_over_the_disk(sleeper: Sleeper) -> None:
    """A file outgrew its inode, and the journal put its first block over a newer one."""
    number = sleeper.number["dir/file"]
    size = sleeper.block_size
    sleeper.found.first[number] = Piece(0, 4096, sleeper.ram.put(b"new!" * 1024))
    sleeper.clean("dir/file", 0, b"new!" * (size // 4))
    sleeper.apply()
    assert sleeper.content("dir/file") == b"new!" * (size // 4) + b"x" * (5000 - size)


def test_first_page_of_a_file_without_blocks_changes_nothing(sleeper: Sleeper) -> None:
    number = sleeper.number["empty"]
    sleeper.found.first[number] = Piece(0, 4096, sleeper.ram.put(b"n" * 4096))
    sleeper.apply()
    told = sleeper.debugfs("stat /empty")
    assert "Size: 0" in told
    assert "Blockcount: 0" in told


def test_data_without_blocks_gets_blocks_and_its_size(sleeper: Sleeper) -> None:
    sleeper.dirty("empty", 0, b"a" * 4096)
    sleeper.dirty("empty", 40960, b"b" * 8192)
    sleeper.change("empty", size=45000, mtime_ns=1_700_000_000_000_000_000, lazy=True)
    sleeper.apply()
    content = sleeper.content("empty")
    assert content == b"a" * 4096 + bytes(36864) + b"b" * 4040


def test_data_over_blocks_that_are_there(sleeper: Sleeper) -> None:
    sleeper.dirty("dir/file", 4096, b"y" * 4096)
    sleeper.apply()
    assert sleeper.content("dir/file") == b"x" * 4096 + b"y" * 904


def test_data_in_preallocated_blocks_becomes_visible(usual: Sleeper) -> None:
    usual.debugfs("fallocate /empty 0 63", "-w")
    usual.dirty("empty", 8192, b"a" * 4096)
    usual.change("empty", size=12288)
    usual.apply()
    assert usual.content("empty") == bytes(8192) + b"a" * 4096
    assert "Uninit" in usual.debugfs("ex /empty")  # the rest stays as it was


def test_new_blocks_of_the_device_are_the_truth(usual: Sleeper) -> None:
    """A directory block in memory in which an entry is gone, and one has another name."""
    block = int(usual.debugfs("blocks /dir").split()[0])
    data = bytearray(usual.image.read_bytes()[block * 4096 : (block + 1) * 4096])
    at = data.index(b"file")
    data[at : at + 4] = b"FILE"
    with Ext4(usual.image) as ext4:
        seed = ext4.crc32c(ext4.text(Super.UUID, 16))
        raw = ext4.inode(usual.number["dir"])
        # fs/ext4/namei.c, ext4_dirblock_csum: seed, inode, generation, then the block
        struct.pack_into("<I", data, 4092, _crc32c(ext4, seed, usual.number["dir"], raw, data))
    usual.found.device.append(Piece(block * 4096, 4096, usual.ram.put(bytes(data))))
    usual.found.names[-1] = (usual.number["dir"], b"FILE", usual.number["dir/file"])
    usual.found.names.append((usual.number["dir"], b"file", 0))
    assert usual.apply()["blocks"] == 4096
    assert usual.content("dir/FILE") == b"x" * 5000


def _crc32c(ext4: Ext4, seed: int, number: int, raw: bytearray, data: bytearray) -> int:
    fold = ext4._lib.crc32c
    seed = fold(seed, struct.pack("<I", number), 4)
    seed = fold(seed, bytes(raw[0x64:0x68]), 4)
    return fold(seed, bytes(data[:4084]), 4084)


def test_journal_is_not_replayed(usual: Sleeper) -> None:
    """The disk says that there is something to replay; memory is newer, and the journal emptied."""
    with Ext4(usual.image) as ext4:
        ext4.set_number(Super.INCOMPAT, ext4.number(Super.INCOMPAT) | 4)
        place = ext4.block(8, 0) * ext4.block_size
        with usual.image.open("r+b") as file:
            file.seek(place + 0x1C)
            file.write(struct.pack(">I", 1))
    assert "needs_recovery" in usual.debugfs("stats")
    usual.apply()
    assert "needs_recovery" not in usual.debugfs("stats")
    assert usual.image.read_bytes()[place + 0x1C : place + 0x20] == bytes(4)


def test_deleted_files_are_released(usual: Sleeper) -> None:
    """An open file was unlinked: it is on the orphan list, and memory has pages of it."""
    number = usual.number["dir/file"]
    usual.debugfs("unlink /dir/file", "-w")
    usual.debugfs(f"set_inode_field <{number}> links_count 0", "-w")
    usual.debugfs(f"set_super_value last_orphan {number}", "-w")
    usual.debugfs(f"set_inode_field <{number}> dtime 0", "-w")
    usual.change("dir/file", links=0)
    usual.found.names[-1] = (usual.number["dir"], b"file", 0)
    assert usual.apply()["orphans"] is True
    assert "free" in usual.debugfs(f"testi <{number}>") or "not" in usual.debugfs(
        f"testi <{number}>"
    )


def test_inode_that_is_free_again_may_be_of_any_form(usual: Sleeper) -> None:
    """Memory still has it, without links; on the disk its place is nobody's."""
    number = 40
    told = usual.debugfs(f"imap <{number}>")
    place = re.search(r"located at block (\d+), offset (0x[0-9a-f]+)", told)
    assert place is not None
    with usual.image.open("r+b") as file:
        file.seek(int(place[1]) * 4096 + int(place[2], 16) + 0x7C)  # i_checksum_lo
        file.write(b"\x12\x34")
    gone = usual.found.inodes[-1]._replace(number=number, links=0)
    usual.found.inodes.append(gone)
    with Ext4(usual.image) as ext4, pytest.raises(CorruptGuestError, match="checksum"):
        ext4.inode(number)
    usual.apply()


@pytest.mark.parametrize("shared", [False, True])
def test_attributes_of_a_deleted_fifo_are_released(usual: Sleeper, *, shared: bool) -> None:
    """It has no blocks of data, and e2fsck does not look at that of its attributes."""
    usual.debugfs(f"ea_set /empty user.long {'v' * 1000}", "-w")
    for field in ("mode 010644", "flags 0", "block[0] 0", "links_count 0", "dtime 0"):
        usual.debugfs(f"set_inode_field /empty {field}", "-w")
    number = usual.number["empty"]
    usual.debugfs("unlink /empty", "-w")
    usual.debugfs(f"set_super_value last_orphan {number}", "-w")
    usual.change("empty", links=0, mode=0o10644)
    usual.found.names[1] = (ROOT, b"empty", 0)
    with Ext4(usual.image) as ext4:
        block = raw_inode.attribute_block(ext4.inode(number))
        if shared:
            told = (ext4._fs, block, bytes(4096), 1, None, number)
            assert ext4._lib.adjust_attributes(*told) == 0
            other = ext4.inode(usual.number["dir/file"])
            struct.pack_into("<I", other, 0x68, block)
            struct.pack_into("<I", other, 0x1C, struct.unpack_from("<I", other, 0x1C)[0] + 8)
            ext4.set_inode(usual.number["dir/file"], other)
    assert block
    assert usual.apply()["orphans"] is True
    assert ("not in use" in usual.debugfs(f"testb {block}")) is not shared
    if shared:
        assert "user.long" in usual.debugfs("ea_list /dir/file")


def test_deleted_files_are_released_without_a_journal(tmp_path: Path) -> None:
    """No list on the disk tells of them; memory does."""
    sleeper = Sleeper(tmp_path, LAYOUTS["no-journal"])
    for name, entry in (
        ("dir/file", (sleeper.number["dir"], b"file")),
        ("empty", (ROOT, b"empty")),
    ):
        number = sleeper.number[name]
        sleeper.debugfs(f"unlink /{name}", "-w")
        sleeper.debugfs(f"set_inode_field <{number}> links_count 0", "-w")
        sleeper.change(name, links=0)
        names = sleeper.found.names
        names[names.index((*entry, number))] = (*entry, 0)
    assert sleeper.apply()["orphans"] is True
    for number in (sleeper.number["dir/file"], sleeper.number["empty"]):
        assert "not in use" in sleeper.debugfs(f"testi <{number}>")


def test_orphan_file_of_a_mounted_file_system_is_settled(tmp_path: Path) -> None:
    sleeper = Sleeper(tmp_path, ("-b", "4096", "-O", "orphan_file"))
    with Ext4(sleeper.image) as ext4:
        ext4.set_number(Super.RO_COMPAT, ext4.number(Super.RO_COMPAT) | 0x10000)
    assert sleeper.apply()["orphans"] is False
    assert "orphan_present" not in sleeper.debugfs("stats")


# --- refusals ------------------------------------------------------------------------------


def test_other_file_system_is_refused(usual: Sleeper) -> None:
    usual.found.file_system = replace(usual.found.file_system, uuid=bytes(16))
    with pytest.raises(CorruptGuestError, match="UUID"):
        usual.apply()


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ({"mode": stat.S_IFREG | 0o777}, "mode"),
        ({"links": 2}, "links"),
        ({"size": 4999}, "size"),
        ({"size": 9000}, "size"),  # larger, and there are no pages for it
        ({"mtime_ns": 1}, "mtime"),
    ],
)
def test_inode_that_disagrees_is_named(usual: Sleeper, what: dict[str, int], told: str) -> None:
    usual.change("dir/file", **what)
    number = usual.number["dir/file"]
    with pytest.raises(CorruptGuestError, match=f"inode {number}: {told}"):
        usual.apply()


def test_time_under_way_is_taken_though_a_file_was_given_a_time_to_come(usual: Sleeper) -> None:
    to_come = 1_900_000_000
    usual.debugfs(f"set_inode_field empty mtime @{to_come}", "-w")
    usual.change("empty", mtime_ns=to_come * 1_000_000_000)
    newest = max(inode.ctime_ns for inode in usual.found.inodes)
    usual.change("dir/file", ctime_ns=newest + 100_000_000)
    assert usual.apply()["inodes"] == 1
    usual.change("empty", ctime_ns=newest + 60_000_000_000)  # also under way, and a minute later
    usual.change("dir/file", ctime_ns=newest + 200_000_000)
    with pytest.raises(CorruptGuestError, match=f"inode {usual.number['dir/file']}: ctime"):
        usual.apply()


@pytest.mark.parametrize(
    ("entry", "told"),
    [((ROOT, b"dir", 0), "dir in directory 2: absent in memory"),
     ((ROOT, b"nothing", 12), "nothing in directory 2: inode 12 in memory, absent"),
     ((ROOT, b"empty", 11), "empty in directory 2: inode 11 in memory, inode ")],
)  # fmt: skip
def test_name_that_disagrees_is_told(
    usual: Sleeper, entry: tuple[int, bytes, int], told: str
) -> None:
    usual.found.names.append(entry)
    with pytest.raises(CorruptGuestError, match=told):
        usual.apply()


def test_block_behind_the_device_is_refused(usual: Sleeper) -> None:
    usual.found.device.append(Piece(16 << 20, 4096, usual.ram.put(bytes(4096))))
    with pytest.raises(CorruptGuestError, match="beyond the end"):
        usual.apply()


def test_blocks_that_make_no_sound_file_system_are_refused(usual: Sleeper) -> None:
    """A bitmap in memory that says nothing is in use."""
    text = usual.debugfs("stats")
    block = int(text.split("block bitmap at ")[1].split(",")[0].split()[0])
    usual.found.device.append(Piece(block * 4096, 4096, usual.ram.put(bytes(4096))))
    with pytest.raises(CorruptGuestError, match=r"sound file system|checksum"):
        usual.apply()


def test_lost_file_is_found_by_e2fsck(usual: Sleeper) -> None:
    usual.debugfs("unlink /empty", "-w")
    usual.found.names = []
    with pytest.raises(CorruptGuestError, match=f"Unattached inode {usual.number['empty']}"):
        usual.apply()


def test_damaged_inode_is_refused(usual: Sleeper) -> None:
    usual.debugfs(f"set_inode_field <{usual.number['empty']}> checksum 0x12345678", "-w")
    with pytest.raises(CorruptGuestError, match=f"inode {usual.number['empty']}"):
        usual.apply()


def test_errors_that_the_guest_found_are_told(usual: Sleeper) -> None:
    usual.debugfs("set_super_value state 2", "-w")
    with pytest.raises(CorruptGuestError, match="has found errors"):
        usual.apply()


def test_no_room_is_refused(usual: Sleeper) -> None:
    usual.dirty("empty", 0, b"a" * (15 << 20))
    usual.change("empty", size=15 << 20)
    with pytest.raises(CorruptGuestError, match="writing inode"):
        usual.apply()


def test_something_else_than_ext4_is_refused(usual: Sleeper) -> None:
    usual.image.write_bytes(bytes(1 << 20))
    with pytest.raises(UnsupportedGuestError, match="cannot be opened"):
        usual.apply()


@pytest.mark.parametrize("feature", ["mmp"])
def test_feature_that_is_not_handled_is_named(tmp_path: Path, feature: str) -> None:
    sleeper = Sleeper(tmp_path, ("-b", "4096", "-O", feature))
    with pytest.raises(UnsupportedGuestError, match=feature):
        sleeper.apply()
