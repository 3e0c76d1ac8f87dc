"""Block devices, file systems and locks, made right and made by a hostile guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel.blockdevs import BlockDevices
from ouassister.kernel.held_locks import read_held_locks
from ouassister.kernel.superblocks import read_superblocks

if TYPE_CHECKING:
    from ouassister.kernel.file_names import FileNames

# --- block devices ---------------------------------------------------------------------------


class Devices(FakeGuest):
    """A guest whose classes are in one set, as since v6.4."""

    def __init__(self) -> None:
        super().__init__()
        self.struct("list_head", ("next", "p"), ("prev", "p"))
        self.struct("kobject", ("name", "p"), ("entry", "list_head"), ("parent", "p"))
        self.struct("kset", ("list", "list_head"), ("kobj", "kobject"))
        self.struct("klist", ("k_list", "list_head"))
        self.struct("klist_node", ("n_klist", "p"), ("n_node", "list_head"))
        self.struct("class", ("name", "p"))
        self.struct("subsys_private", ("subsys", "kset"), ("klist_devices", "klist"),
                    ("class", "p"))  # fmt: skip
        self.struct("device", ("kobj", "kobject"))
        self.struct("device_private", ("knode_class", "klist_node"), ("device", "p"))
        self.struct("gendisk", ("disk_name", 32))
        self.struct("partition_meta_info", ("uuid", 37), ("volname", 64))
        self.struct("atomic", ("counter", "i"))
        self.struct("block_device", ("bd_start_sect", "Q"), ("bd_nr_sectors", "Q"),
                    ("bd_disk", "p"), ("__bd_flags", "atomic"), ("bd_dev", "I"),
                    ("bd_meta_info", "p"), ("bd_device", "device"))  # fmt: skip
        classes = self.put("kset")
        private = self.put("subsys_private")
        self.ring(classes, [private + 24])  # subsys.kobj.entry
        self.devices = private + 48
        self.ring(self.devices, [])
        self.set("subsys_private", private, **{"class": 0x900})
        self.variables = {"block_class": 0x900,
                          "class_kset": self.place(self.new(8), "Q", classes)}  # fmt: skip
        self.bus = self.put("kobject", name=self.string(b"pci0000:00"))

    def ring(self, head: int, nodes: list[int]) -> None:
        for here, after in zip([head, *nodes], [*nodes, head], strict=True):
            self.place(here, "Q", after)

    def add(self, devices: list[int]) -> None:
        owners = [self.put("device_private", device=device + 40) for device in devices]
        self.ring(self.devices, [owner + 8 for owner in owners])

    def disk(self) -> tuple[int, int]:
        disk = self.put("gendisk", disk_name=b"vda")
        whole = self.put(
            "block_device", bd_nr_sectors=100, bd_disk=disk, bd_dev=254 << 20,
            bd_device__kobj__name=self.string(b"vda"), bd_device__kobj__parent=self.bus,
        )  # fmt: skip
        meta = self.put("partition_meta_info", uuid=b"0123-45", volname=b"ro\x1bot")
        part = self.put(
            "block_device", bd_start_sect=10, bd_nr_sectors=20, bd_disk=disk, bd_dev=254 << 20 | 1,
            bd_meta_info=meta, bd_device__kobj__name=self.string(b"vda1"),
            bd_device__kobj__parent=whole + 40,
        )  # fmt: skip
        return whole, part


def set_flags(guest: Devices, device: int, flags: int) -> None:
    guest.place(device + 24, "I", flags)


def test_disk_and_partition() -> None:
    guest = Devices()
    whole, part = guest.disk()
    set_flags(guest, part, 0x101)
    guest.add([part, whole])
    found = BlockDevices(guest.kernel)
    disk, one = found.all
    assert (disk.name, disk.partition, disk.size, disk.read_only) == ("vda", 0, 51200, False)
    assert (one.name, one.disk, one.partition, one.start, one.size, one.read_only) == (
        "vda1", "vda", 1, 5120, 10240, True)  # fmt: skip
    assert (one.partition_uuid, one.partition_label) == ("0123-45", "ro\\x1bot")
    assert one.sysfs == b"/pci0000:00/vda/vda1"
    assert found.name(254 << 20 | 1) == "vda1"
    assert found.name(8 << 20 | 3) == "8:3"
    assert list(found.disks) == ["vda"]


def test_device_within_itself_is_corrupt() -> None:
    guest = Devices()
    whole, _ = guest.disk()
    guest.set("kobject", guest.bus, parent=guest.bus)
    guest.add([whole])
    with pytest.raises(CorruptGuestError, match="levels deep"):
        BlockDevices(guest.kernel)


def test_devices_that_lead_in_circles_are_corrupt() -> None:
    guest = Devices()
    whole, _ = guest.disk()
    guest.add([whole])
    node = int.from_bytes(guest.read(guest.devices, 8), "little")
    guest.place(node, "Q", node)
    with pytest.raises(CorruptGuestError, match="contains itself"):
        BlockDevices(guest.kernel)


def test_class_that_is_not_registered_is_unsupported() -> None:
    guest = Devices()
    guest.variables["block_class"] = 0x901
    with pytest.raises(UnsupportedGuestError, match="not registered"):
        BlockDevices(guest.kernel)


# --- file systems ----------------------------------------------------------------------------


def guest_with_superblocks() -> FakeGuest:
    guest = FakeGuest()
    guest.struct("list_head", ("next", "p"), ("prev", "p"))
    guest.struct("uuid", ("b", 16))
    guest.struct("sb_writers", ("frozen", "i"))
    guest.struct("super_block", ("s_list", "list_head"), ("s_dev", "I"), ("pad", 4),
                 ("s_blocksize", "Q"), ("s_type", "p"), ("s_flags", "Q"), ("s_magic", "Q"),
                 ("s_root", "p"), ("s_bdev", "p"), ("s_id", 32), ("s_uuid", "uuid"),
                 ("s_writers", "sb_writers"))  # fmt: skip
    guest.struct("file_system_type", ("name", "p"))
    guest.struct("block_device", ("bd_disk", "p"))
    guest.struct("gendisk", ("disk_name", 32))
    guest.variables["super_blocks"] = guest.place(guest.new(16), "2Q", 0, 0)
    return guest


def test_file_systems() -> None:
    guest = guest_with_superblocks()
    kind = guest.put("file_system_type", name=guest.string(b"ext4"))
    bdev = guest.put("block_device", bd_disk=guest.put("gendisk", disk_name=b"vda"))
    head = guest.variables["super_blocks"]
    being_made = guest.put("super_block", s_type=kind)
    one = guest.put("super_block", s_dev=8 << 20 | 1, s_blocksize=1024, s_type=kind, s_flags=1,
                    s_magic=0xEF53, s_root=1, s_bdev=bdev, s_id=b"vda1", s_uuid=bytes(range(16)),
                    s_writers__frozen=4)  # fmt: skip
    for here, after in ((head, being_made), (being_made, one), (one, head)):
        guest.place(here, "Q", after)
    (found,) = read_superblocks(guest.kernel)
    assert (found.fstype, found.id, found.disk) == ("ext4", "vda1", "vda")
    assert found.uuid == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert (found.major, found.minor, found.block_size) == (8, 1, 1024)
    assert (found.read_only, found.frozen) == (True, True)


def test_file_systems_that_lead_in_circles_are_corrupt() -> None:
    guest = guest_with_superblocks()
    one = guest.put("super_block")
    guest.place(guest.variables["super_blocks"], "Q", one)
    guest.place(one, "Q", one)
    with pytest.raises(CorruptGuestError, match="contains itself"):
        read_superblocks(guest.kernel)


# --- locks -----------------------------------------------------------------------------------


class Names:
    def file_system(self, _sb: int) -> tuple[bytes, int]:
        return b"ext4", 8 << 20 | 2

    def name(self, _mnt: int, _dentry: int, _inode: int) -> bytes:
        return b"/locked"


def guest_with_locks(*, core: bool) -> FakeGuest:
    guest = FakeGuest()
    guest.struct("cpumask", ("bits", "Q"))
    guest.struct("path", ("mnt", "p"), ("dentry", "p"))
    guest.struct("file", ("f_path", "path"), ("f_inode", "p"))
    guest.struct("inode", ("i_ino", "Q"), ("i_sb", "p"))
    guest.struct("file_lock_list_struct", ("lock", "Q"), ("hlist", "p"))
    prefix = "flc_" if core else "fl_"
    shared = [(prefix + name, kind) for name, kind in (("link", "p"), ("flags", "I"),
              ("type", "B"), ("pad", 3), ("pid", "i"), ("pad2", 4), ("file", "p"))]  # fmt: skip
    if core:
        guest.struct("file_lock_core", *shared)
        guest.struct("file_lock", ("before", "Q"), ("c", "file_lock_core"), ("fl_start", "q"),
                     ("fl_end", "q"))  # fmt: skip
    else:
        guest.struct("file_lock", *shared, ("fl_start", "q"), ("fl_end", "q"))
    guest.variables = {"file_lock_list": 0, "__per_cpu_offset": 0x2000, "__cpu_possible_mask": 0x10}
    guest.place(0x2000, "Q", guest.put("file_lock_list_struct"))
    guest.place(0x10, "Q", 1)
    return guest


def hang(guest: FakeGuest, node: int) -> None:
    head = int.from_bytes(guest.read(0x2000, 8), "little")
    guest.place(head + 8, "Q", node)


@pytest.mark.parametrize("core", [False, True])
def test_locks_of_both_layouts(core: bool) -> None:
    guest = guest_with_locks(core=core)
    prefix = "c__flc_" if core else "fl_"
    file = guest.put("file", f_inode=guest.put("inode", i_ino=77))
    lock = guest.put("file_lock", fl_start=10, fl_end=(1 << 63) - 1, **{
        f"{prefix}flags": 1, f"{prefix}type": 1, f"{prefix}pid": 42, f"{prefix}file": file,
    })  # fmt: skip
    hang(guest, lock + 8 * core)
    (found,) = read_held_locks(guest.kernel, cast("FileNames", Names()))
    assert (found.kind, found.write, found.pid, found.path) == ("posix", True, 42, b"/locked")
    assert (found.major, found.minor, found.inode) == (8, 2, 77)
    assert (found.start, found.end) == (10, None)


def test_lock_of_an_open_file_is_no_processs() -> None:
    guest = guest_with_locks(core=True)
    hang(guest, guest.put("file_lock", c__flc_flags=0x401, c__flc_pid=42) + 8)
    (found,) = read_held_locks(guest.kernel, cast("FileNames", Names()))
    assert (found.kind, found.pid, found.path) == ("ofd", -1, b"")


def test_locks_that_lead_in_circles_are_corrupt() -> None:
    guest = guest_with_locks(core=True)
    lock = guest.put("file_lock", c__flc_flags=2)
    guest.place(lock + 8, "Q", lock + 8)
    hang(guest, lock + 8)
    with pytest.raises(CorruptGuestError, match="contains itself"):
        read_held_locks(guest.kernel, cast("FileNames", Names()))


def test_guest_without_a_list_of_locks_is_unsupported() -> None:
    guest = guest_with_locks(core=True)
    del guest.structs["file_lock_list_struct"]
    with pytest.raises(UnsupportedGuestError, match="file_lock_list_struct"):
        read_held_locks(guest.kernel, cast("FileNames", Names()))
