"""A guest whose tree is made of many file systems: updated offline, and true after resume.

The root is on one disk; /boot, the EFI system partition and half of a logical volume are on a
second one, the rest of that on a third.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need
from tests.vm import guestview_guest, tmpfs_guest
from tests.vm.repository import Package, Repository, build
from tests.vm.world import NOTHING, World, leftovers, use_mirror

from ouassister.disk import layout, matching
from ouassister.disk.matching import Image
from ouassister.errors import UnsupportedGuestError
from ouassister.provider import qemu, sockets, vmtoml
from ouassister.sleeping import open_sleeping
from ouassister.testing import clone as make_clone
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

MIB = 1 << 20
_TABLE = """label: gpt
unit: sectors
start=2048, size=81920
start=83968, size=32768, type=uefi
start=116736, size=65536, type=lvm
"""
# 24 MiB of the second disk, then 20 MiB of the third, then 4 MiB of the second again.
_VOLUME = """
table('oua-data', 'LVM-oualayout', target(0, 49152, 'linear', '{vdb3} 2048'),
      target(49152, 40960, 'linear', '{vdc} 4096'), target(90112, 8192, 'linear', '{vdb3} 53248'));
"""
_PREPARE = """set -e
mount /dev/vdb1 /mnt; cp -a /boot/. /mnt; umount /mnt; mount /dev/vdb1 /boot
mkdir -p /boot/efi; mount /dev/vdb2 /boot/efi
mkdir -p /boot/efi/EFI/debian; echo stub >/boot/efi/EFI/debian/grub.cfg
udevadm settle; mke2fs -q -t ext4 /dev/dm-0; mkdir -p /srv/data; mount /dev/dm-0 /srv/data
mkdir -p /srv/data/option; mount --bind /srv/data/option /opt
mkdir -p /srv/memory; mount -t tmpfs none /srv/memory
"""
# What systemd, udev and the agent write when the guest wakes and commands run in it.
_WAKES = re.compile(
    r"/run/(systemd/(units|timesync|transient|journal|propagate)|udev|log|qga.state|utmp)(/.*)?"
)
MANY = Package(
    "oua-many",
    "1.0",
    files={
        "/boot/oua-many": "on the boot partition\n",
        "/opt/oua-many/file": "through a bind mount, on the logical volume\n",
        "/srv/data/oua-many": "on the logical volume\n",
        "/usr/share/oua-many/file": "on the root\n",
    },
    scripts={
        "postinst": "cat /boot/efi/EFI/debian/grub.cfg >/usr/share/oua-many/esp\n"
        "echo secret >/srv/memory/secret\n"
        "head -c 30M /dev/zero >/srv/data/large"
    },
)


@pytest.fixture(scope="module")
def many(suspended: Path, repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``vm.toml`` of a suspended guest with three disks. Read only."""
    folder = tmp_path_factory.mktemp("many")
    build(MANY, repository.folder)
    repository.publish()
    toml = make_clone(suspended, folder / "vm")
    use_mirror(toml, repository.port)
    config = _with_disks(toml)
    with qemu.start(config) as vm:
        try:
            vm.qga().sync(timeout_s=120)
            numbers = {
                name: guest_run(vm, f"cat /sys/class/block/{name}/dev").stdout.decode().strip()
                for name in ("vdb3", "vdc")
            }
            mapper, _, _ = guestview_guest.MAPPER.partition("table('oua")
            vm.qga().write_file("/root/mapper.pl", (mapper + _VOLUME.format(**numbers)).encode())
            guest_run(vm, "modprobe dm_mod; perl /root/mapper.pl", timeout_s=60)
            guest_run(vm, _PREPARE, timeout_s=120)
            vm.qga().write_file("/root/make.pl", tmpfs_guest.MAKE.encode())
            vm.qga().write_file("/root/show.pl", tmpfs_guest.SHOW.encode())
            guest_run(vm, tmpfs_guest.PREPARE, timeout_s=120)
            source = f"deb [trusted=yes] http://127.0.0.1:{repository.port}/ ./\n"
            guest_run(vm, "rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*")
            vm.qga().write_file("/etc/apt/sources.list", source.encode())
            guest_run(vm, "sync; sleep 1; sync", timeout_s=60)
            vm.suspend()
        except BaseException:
            vm.kill()
            raise
    return config.source


def _with_disks(toml: Path) -> vmtoml.VmConfig:
    """Add two disks to a clone; its save file no longer fits, so that it has to boot."""
    config = vmtoml.load(toml)
    folder = config.folder
    second, third = folder / "second.raw", folder / "third.qcow2"
    with second.open("wb") as file:
        file.truncate(96 * MIB)
    sfdisk = [need("sfdisk"), "-q", str(second)]
    subprocess.run(sfdisk, input=_TABLE, text=True, check=True)
    make = [need("mke2fs"), "-q", "-F", "-t", "ext4", "-E", f"offset={2048 * 512}", str(second)]
    subprocess.run([*make, "40M"], check=True)
    fat = [need("mkfs.vfat"), "--offset", "83968", "-F", "16", str(second), str(32768 // 2)]
    subprocess.run(fat, check=True, capture_output=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(third), "48M"], check=True)
    command = list(config.command)
    bus = next(word.split("bus=")[1].split(",")[0] for word in command if "bus=" in word)
    for node, kind, path, slot in (("disk2", "raw", second, 10), ("disk3", "qcow2", third, 11)):
        file_part = f"file.driver=file,file.filename={path.name}"
        command += ["-blockdev", f"driver={kind},node-name={node},{file_part}"]
        command += ["-device", f"virtio-blk-pci,drive={node},bus={bus},addr={slot:x}"]
    config.save.unlink()
    disks = (
        vmtoml.Disk("disk3", third, "qcow2"),  # in another order than in the guest
        vmtoml.Disk("disk2", second, "raw"),
        *config.disks,
    )
    changed = replace(config, command=tuple(command), disks=disks)
    config.source.write_text(vmtoml.dump(changed))
    return vmtoml.load(config.source)


@pytest.fixture
def world_of_many(many: Path, tmp_path: Path) -> Iterator[World]:
    world = World(make_clone(many, tmp_path / "sleeper"), tmp_path / "home")
    yield world
    try:
        with sockets.connect(world.config.qmp) as sock:
            os.kill(sockets.peer_pid(sock), signal.SIGKILL)
    except (FileNotFoundError, ConnectionRefusedError):
        return


def test_disks_are_told_apart_and_volumes_followed(world_of_many: World) -> None:
    with open_sleeping(world_of_many.config) as sleeping:
        disks = {name: image.path.name for name, image in sleeping.disks.items()}
        told = sleeping.layout
    config = world_of_many.config
    by_node = {disk.node: disk.path.name for disk in config.disks}
    assert disks == {"vda": by_node["disk0"], "vdb": by_node["disk2"], "vdc": by_node["disk3"]}
    places = {place.target: told.volumes[place.volume].device for place in told.places}
    data = told.volumes[told.locate(b"/opt/x")[0]]
    assert places[b"/boot"] == "vdb1"
    assert places[b"/boot/efi"] == "vdb2"
    assert places[b"/opt"] == places[b"/srv/data"] == data.device
    assert [(piece.disk, piece.size) for piece in data.pieces] == [
        ("vdb", 24 * MIB),
        ("vdc", 20 * MIB),
        ("vdb", 4 * MIB),
    ]
    assert set(told.memory) == {b"/srv/memory", b"/tmp"}


def test_guest_whose_tree_cannot_be_laid_out_can_be_looked_at(
    world_of_many: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "READABLE", frozenset(("xfs",)))
    with pytest.raises(UnsupportedGuestError, match="is ext4, not"):
        open_sleeping(world_of_many.config).__enter__()
    with open_sleeping(world_of_many.config, tree=False) as sleeping:
        assert any(mount.target == b"/boot/efi" for mount in sleeping.view.mounts)


def test_update_reaches_every_file_system(world_of_many: World) -> None:
    world = world_of_many
    before = world.hashes()
    seen = world.run("run", "--", "cat", "/boot/efi/EFI/debian/grub.cfg")
    assert seen.status == 0, seen
    update = world.run("update", "--install", "oua-many")
    assert update.status == 0, update
    assert world.hashes() == before
    assert leftovers(world.home) == NOTHING
    notes = [note for note in update.result["notes"] if tmpfs_guest.TOPS[2] in note]
    assert any(note.startswith(f"{tmpfs_guest.LARGE} is not in") for note in notes), notes
    assert any("pages are swapped out" in note for note in notes), notes
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    with qemu.attach(world.config) as vm:

        def out(script: str) -> str:
            return guest_run(vm, script, timeout_s=60).stdout.decode().strip()

        devices = json.loads(out("findmnt -J -o TARGET,MAJ:MIN -T /boot -T /opt || findmnt -J"))
        assert devices
        assert out("cat /boot/oua-many") == "on the boot partition"
        assert out("cat /srv/data/option/oua-many/file").startswith("through a bind mount")
        assert out("cat /srv/data/oua-many") == "on the logical volume"
        assert out("cat /usr/share/oua-many/esp") == "stub"
        assert out("stat -c %s /srv/data/large") == str(30 * MIB)
        assert out("stat -c %m /boot/oua-many /opt/oua-many/file /srv/data/oua-many") == (
            "/boot\n/opt\n/srv/data"
        )
        assert out("ls /srv/memory") == "oua"  # a file system in memory is not updated
        assert out("dpkg --verify oua-many; dpkg --audit") == ""
        assert (
            out("find / -path /proc -prune -o -name '.ouassister-*' ! -name '*-undo' -print") == ""
        )


def test_programs_find_in_tmpfs_what_the_guest_has(world_of_many: World) -> None:
    world = world_of_many
    script = f"perl /root/show.pl {' '.join(tmpfs_guest.TOPS)}; ls -A /run/ouassister"
    seen = world.run("run", "--", "sh", "-c", script)
    assert seen.status == 0, seen
    shown, _, ours = seen.result["output"].rpartition("bin\n")
    assert ours.split() == ["blkid.tab", "log", "record"]
    view = tmpfs_guest.parse(shown)
    script = "systemctl is-system-running; systemctl start x; modprobe loop; echo $?"
    asked = world.run("run", "--", "sh", "-c", f"{script}; grep ' /tmp ' /proc/self/mounts")
    told = asked.result["output"].splitlines()
    assert told[0] == "running"  # by who answers at /run/systemd/private
    assert told[1] == "Failed to start x.service: Unit x.service not found."
    assert told[2] == "0"
    assert "noexec" in told[3]
    with qemu.restore(world.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        told = guest_run(vm, f"perl /root/show.pl {' '.join(tmpfs_guest.TOPS)}", timeout_s=120)
    live = tmpfs_guest.parse(told.stdout.decode())
    differing = {
        path: (view.get(path), row)
        for path, row in live.items()
        if view.get(path) != tmpfs_guest.expected(path, row) and not _WAKES.fullmatch(path)
    }
    assert differing.keys() == tmpfs_guest.LEFT_OUT, differing
    assert not view.keys() & tmpfs_guest.LEFT_OUT
    more = {path for path in view.keys() - live.keys() if not _WAKES.fullmatch(path)}
    assert all(path.startswith("/run/ouassister") for path in more), more
    assert {row.kind for row in view.values()} >= set("fdlpsc")
    for top in tmpfs_guest.MADE:
        assert view[f"{top}/hole"].size == str(1 << 33)
        assert view[f"{top}/sticky/hard"].links == "3"


def test_unflushed_esp_is_refused(world_of_many: World) -> None:
    config = world_of_many.config
    with qemu.restore(config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        late = "sync; echo 0 >/proc/sys/vm/dirty_writeback_centisecs; echo x >/boot/efi/late"
        guest_run(vm, late, timeout_s=60)
        config.save.unlink()
        vm.suspend()
    done = world_of_many.run("update", "--install", "oua-many")
    assert (done.status, done.code) == (23, "unsupported-guest"), done
    assert "vdb2 (vfat) has writes that are in memory alone" in done.value["error"]["message"]


def test_script_that_writes_to_the_esp_fails_loudly(world_of_many: World) -> None:
    done = world_of_many.run("run", "--", "touch", "/boot/efi/new")
    assert done.status != 0


def test_place_past_the_end_of_an_image_is_no_match(tmp_path: Path) -> None:
    short = tmp_path / "a.raw"
    short.write_bytes(bytes(512))
    assert matching._read(Image(short, "raw"), MIB, 16) == b""
