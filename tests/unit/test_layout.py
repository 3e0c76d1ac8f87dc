"""Where the guest's file systems lie and stand, from its own tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ouassister.disk.layout import Layout, Piece, Place, Volume, make_layout, needs_devices, visible
from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.guest_model import BlockDevice, MappedDevice, MappedLeg, MappedRange
from ouassister.model import BlockRange, GuestView, Mount, Uts

MIB = 1 << 20
ROOT = Mount(
    b"/dev/vda1", b"/", "ext4", 254, 1, False, BlockRange("vda", MIB, 8 * MIB), b"/", 27, 1
)
BOOT = Mount(
    b"/dev/vda2", b"/boot", "ext4", 254, 2, False, BlockRange("vda", 9 * MIB, MIB), b"/", 30, 27
)
ESP = Mount(
    b"/dev/vda3", b"/boot/efi", "vfat", 254, 3, True, BlockRange("vda", 10 * MIB, MIB), b"/", 31, 30
)
PROC = Mount(b"proc", b"/proc", "proc", 0, 20, False, None, b"/", 28, 27)
LV = Mount(
    b"/dev/mapper/vg-home", b"/home", "ext4", 253, 0, False,
    BlockRange("dm-0", 0, 6 * MIB), b"/", 32, 27,
)  # fmt: skip


def view(*mounts: Mount, **more: object) -> GuestView:
    return GuestView(
        uts=Uts("Linux", "web1", "6.1.0", "#1", "x86_64", "(none)"),
        boot_id="",
        suspended_at_s=1,
        uptime_s=1,
        cpus=1,
        memory_bytes=1 << 29,
        tasks=(),
        mounts=mounts,
        **more,  # type: ignore[arg-type]
    )


def partition(name: str, disk: str, number: int, start: int, size: int) -> BlockDevice:
    return BlockDevice(name, 254, number, disk, number, start, size, False, "", "", b"")


def mapped(*ranges: MappedRange) -> MappedDevice:
    return MappedDevice("dm-0", "vg-home", "LVM-x", ranges)


def linear(start: int, size: int, device: str, at: int | None) -> MappedRange:
    return MappedRange(start, size, "linear", (MappedLeg(device, at),))


DEVICES = (
    partition("vda", "vda", 0, 0, 64 * MIB),
    partition("vda4", "vda", 4, 20 * MIB, 8 * MIB),
    partition("vdb", "vdb", 0, 0, 8 * MIB),
)


def test_file_systems_in_the_order_of_their_mounts() -> None:
    # As a namespace lists them after switch_root: children may come first.
    made = make_layout(view(ESP, PROC, BOOT, ROOT))
    assert made == Layout(
        (
            Volume("vda1", 254, 1, "ext4", (Piece("vda", MIB, 8 * MIB),)),
            Volume("vda2", 254, 2, "ext4", (Piece("vda", 9 * MIB, MIB),)),
            Volume("vda3", 254, 3, "vfat", (Piece("vda", 10 * MIB, MIB),)),
        ),
        (
            Place(0, b"/", b"/", False),
            Place(1, b"/", b"/boot", False),
            Place(2, b"/", b"/boot/efi", True),
        ),
    )


def test_bind_mount_is_another_place_of_its_file_system() -> None:
    bound = replace(BOOT, target=b"/srv/x", root=b"/grub", number=40, parent=27)
    made = make_layout(view(ROOT, BOOT, bound))
    assert len(made.volumes) == 2
    assert made.places[2] == Place(1, b"/grub", b"/srv/x", False)


@pytest.mark.parametrize(
    ("path", "volume", "inside"),
    [
        (b"/etc/passwd", 0, b"/etc/passwd"),
        (b"/", 0, b"/"),
        (b"/boot", 1, b"/"),
        (b"/bootx", 0, b"/bootx"),
        (b"/boot/efi/a", 2, b"/a"),
        (b"/srv/x/font", 1, b"/grub/font"),
    ],
)
def test_path_is_on_the_uppermost_file_system(path: bytes, volume: int, inside: bytes) -> None:
    bound = replace(BOOT, target=b"/srv/x", root=b"/grub", number=40, parent=27)
    assert make_layout(view(ROOT, BOOT, ESP, bound)).locate(path) == (volume, inside)


def test_what_is_covered_is_not_mounted() -> None:
    initial = replace(ROOT, source=b"rootfs", fstype="rootfs", block=None, number=1, parent=1)
    over = replace(BOOT, source=b"/dev/vda9", minor=9, number=50, parent=30)
    assert visible((initial, ROOT, BOOT, ESP, over)) == (ROOT, over)  # the ESP is below BOOT


@pytest.mark.parametrize(
    "mounts",
    [
        (ROOT, replace(BOOT, number=40, parent=41), replace(BOOT, number=41, parent=40)),
        (ROOT, replace(ROOT, number=41, parent=27), replace(ROOT, number=27, parent=41)),
    ],
)
def test_mounts_in_a_circle_end(mounts: tuple[Mount, ...]) -> None:
    try:
        found = visible(mounts)
    except CorruptGuestError:
        return
    assert len(found) <= len(mounts)


@pytest.mark.parametrize(
    ("mount", "kind"),
    [
        (replace(BOOT, fstype="xfs", target=b"/var/www"), "covers"),
        (replace(BOOT, fstype="nfs4", block=None, target=b"/net"), "covers"),
        (replace(BOOT, block=BlockRange("loop0", 0, MIB), target=b"/snap/x"), "covers"),
        (replace(BOOT, fstype="tmpfs", block=None, target=b"/tmp"), "memory"),
        (replace(BOOT, fstype="tmpfs", block=None, target=b"/run/lock"), ""),
        (replace(BOOT, fstype="cgroup2", block=None, target=b"/cg"), ""),
    ],
)
def test_other_mounts(mount: Mount, kind: str) -> None:
    made = make_layout(view(ROOT, mount))
    assert made.memory == ((mount.target,) if kind == "memory" else ())
    assert made.covers == ((mount.target,) if kind == "covers" else ())
    assert bool(made.notes) == (kind == "covers")


XFS = replace(BOOT, fstype="xfs", target=b"/srv/data", number=61)
BTRFS = Mount(
    b"none", b"/", "btrfs", 0, 38, False, BlockRange("vda", MIB, 8 * MIB), b"/@", 27, 1
)  # fmt: skip


def test_what_the_hosts_kernel_can_read_is_offered() -> None:
    (note,) = make_layout(view(ROOT, XFS)).notes
    assert note.startswith("/srv/data (xfs on /dev/vda2) is not read: an update that writes there")
    assert "'host_kernel_mounts = true' in the vm.toml" in note
    made = make_layout(view(ROOT, XFS), host_kernel_mounts=True)
    assert (made.covers, made.notes) == ((), ())
    assert made.volumes[1].by_host_kernel
    assert not made.volumes[1].is_ext
    assert made.places[1] == Place(1, b"/", b"/srv/data", read_only=False)


@pytest.mark.parametrize("target", [b"/usr", b"/var", b"/var/lib", b"/usr/bin", b"/etc"])
@pytest.mark.parametrize("fstype", ["xfs", "f2fs"])
def test_what_is_needed_is_not_covered(target: bytes, fstype: str) -> None:
    mount = replace(XFS, target=target, fstype=fstype)
    with pytest.raises(UnsupportedGuestError, match="is needed and cannot be read") as caught:
        make_layout(view(ROOT, mount))
    assert ("host_kernel_mounts" in caught.value.hint) == (fstype == "xfs")


def test_root_that_the_hosts_kernel_can_read() -> None:
    with pytest.raises(UnsupportedGuestError, match="is /@ of btrfs, not ext4") as caught:
        make_layout(view(BTRFS))
    assert "host_kernel_mounts" in caught.value.hint
    made = make_layout(view(BTRFS), host_kernel_mounts=True)
    assert made.volumes == (Volume("vda", 0, 38, "btrfs", (Piece("vda", MIB, 8 * MIB),), b"/@"),)
    assert made.places == (Place(0, b"/", b"/", read_only=False),)
    several = replace(BTRFS, block=None)
    with pytest.raises(UnsupportedGuestError, match="not on a disk that can be told"):
        make_layout(view(several), host_kernel_mounts=True)


def test_subvolumes_are_volumes() -> None:
    home = replace(BTRFS, target=b"/home", root=b"/@home", number=62, parent=27)
    part = replace(BTRFS, target=b"/opt", root=b"/@home/a/opt", number=63, parent=27)
    of_root = replace(BTRFS, target=b"/var/www", root=b"/@/srv/www", number=64, parent=27)
    alike = replace(BTRFS, target=b"/mnt", root=b"/@home2", number=65, parent=27)
    whole = replace(BTRFS, target=b"/btrfs", root=b"/", number=66, parent=27)
    mounts = (BTRFS, home, part, of_root, alike, whole)
    made = make_layout(view(*mounts), host_kernel_mounts=True)
    assert [volume.root for volume in made.volumes] == [b"/@", b"/@home", b"/@home2"]
    assert [(place.volume, place.root, place.target) for place in made.places] == [
        (0, b"/", b"/"),
        (1, b"/", b"/home"),
        (1, b"/a/opt", b"/opt"),
        (0, b"/srv/www", b"/var/www"),
        (2, b"/", b"/mnt"),
    ]
    assert made.covers == (b"/btrfs",)
    assert made.notes == ("/btrfs is not read: the guest's root is a part of it",)


def test_parts_in_one_another_are_one_volume() -> None:
    top = replace(BTRFS, target=b"/srv/top", root=b"/", number=62, parent=27)
    part = replace(BTRFS, target=b"/srv/part", root=b"/@data", number=63, parent=27)
    made = make_layout(view(ROOT, top, part), host_kernel_mounts=True)
    assert [volume.root for volume in made.volumes] == [b"/", b"/"]
    assert [place.root for place in made.places] == [b"/", b"/", b"/@data"]


def test_unmounted_automount_is_told() -> None:
    auto = replace(PROC, fstype="autofs", target=b"/boot/efi", number=60)
    (note,) = make_layout(view(ROOT, auto)).notes
    assert note.startswith("/boot/efi is mounted on demand and was not")


@pytest.mark.parametrize(
    ("mounts", "what"),
    [
        ((), "is not on a disk"),
        ((PROC,), "is not on a disk"),
        ((replace(ROOT, block=None, fstype="nfs4"),), "is not on a disk"),
        ((replace(ROOT, fstype="xfs"),), "is xfs, not ext4"),
        ((replace(ROOT, root=b"/ostree/deploy"),), "is /ostree/deploy of ext4, not ext4"),
        ((ROOT, replace(BOOT, block=BlockRange("md0", 0, MIB))), "md0 cannot be followed"),
        ((ROOT, LV), "dm-0 cannot be followed"),
    ],
)
def test_unsupported(mounts: tuple[Mount, ...], what: str) -> None:
    with pytest.raises(UnsupportedGuestError, match=what):
        make_layout(view(*mounts))


# --- logical volumes ---


def test_logical_volume_over_two_disks() -> None:
    assert needs_devices((ROOT, LV))
    assert not needs_devices((ROOT, BOOT))
    table = mapped(
        linear(4 * MIB, 2 * MIB, "vdb", MIB),
        linear(0, 2 * MIB, "vda4", MIB),
        linear(2 * MIB, 2 * MIB, "vda4", 3 * MIB),
    )
    made = make_layout(view(ROOT, LV, block_devices=DEVICES, mapped_devices=(table,)))
    volume = made.volumes[1]
    assert volume.pieces == (Piece("vda", 21 * MIB, 4 * MIB), Piece("vdb", MIB, 2 * MIB))
    assert volume.size == 6 * MIB


def test_logical_volume_on_another_one() -> None:
    lower = MappedDevice("dm-1", "crypt", "", (linear(0, 7 * MIB, "vdb", 512),))
    table = mapped(linear(0, 6 * MIB, "dm-1", MIB))
    made = make_layout(view(ROOT, LV, block_devices=DEVICES, mapped_devices=(table, lower)))
    assert made.volumes[1].pieces == (Piece("vdb", MIB + 512, 6 * MIB),)


@pytest.mark.parametrize(
    ("table", "error", "what"),
    [
        (mapped(linear(0, MIB, "vdb", 0)), CorruptGuestError, "has a hole"),
        (mapped(linear(MIB, 5 * MIB, "vdb", 0)), CorruptGuestError, "has a hole"),
        (mapped(linear(0, 6 * MIB, "dm-0", 0)), CorruptGuestError, "stands on"),
        (mapped(linear(0, 6 * MIB, "vdb", 7)), CorruptGuestError, "not made of sectors"),
        (mapped(linear(0, 6 * MIB, "vdb", None)), UnsupportedGuestError, "not linear"),
        (
            mapped(MappedRange(0, 6 * MIB, "crypt", (MappedLeg("vdb", 0),))),
            UnsupportedGuestError,
            r"vg-home \(dm-0\) is of type crypt, not linear",
        ),
    ],
)
def test_table_that_is_not_followed(table: MappedDevice, error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        make_layout(view(ROOT, LV, block_devices=DEVICES, mapped_devices=(table,)))
