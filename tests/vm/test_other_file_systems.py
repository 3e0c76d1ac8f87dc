"""A guest with XFS, btrfs, ext3 and ext2 on disks with and without an MBR.

The host's kernel mounts XFS and btrfs from private copies where the user says so, and only once
the guest's memory has proven that nothing of them is in memory alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need
from tests.vm.repository import Package, Repository, build
from tests.vm.world import NOTHING, World, leftovers, use_mirror

from ouassister import kernel
from ouassister.kernel.flushed import unflushed_part
from ouassister.memory import open_save
from ouassister.provider import qemu, sockets, vmtoml
from ouassister.sleeping import open_sleeping
from ouassister.testing import clone as make_clone
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

MIB = 1 << 20
# An MBR: two primary partitions, and a logical one in an extended one.
_TABLE = """label: dos
unit: sectors
start=2048, size=49152, type=83
start=51200, size=16384, type=83
start=67584, size=264192, type=5
start=69632, size=262144, type=83
"""
_PREPARE = r"""set -e
modprobe xfs; modprobe btrfs; udevadm settle
mkdir -p /srv/ext3 /srv/ext2 /srv/xfs /srv/sub /srv/other /var/www /mnt/b
mount /dev/vdb1 /srv/ext3; mount -t ext2 /dev/vdb2 /srv/ext2; mount /dev/vdc /srv/xfs
mount /dev/vdb5 /mnt/b
perl -e 'for (@ARGV) { opendir my $d, "/mnt/b" or die; open my $f, "<", "/mnt/b" or die;
  ioctl($f, 0x5000940e, pack("q a4088", 0, $_)) or die "$_: $!" }' @data @other
umount /mnt/b
mount -o subvol=@data /dev/vdb5 /srv/sub; mount -o subvol=@other /dev/vdb5 /srv/other
mkdir -p /srv/xfs/www; mount --bind /srv/xfs/www /var/www
for d in ext3 ext2 xfs sub other; do cd /srv/$d
  mkdir -p a/b c; seq 1 20000 >a/b/numbers; ln a/b/numbers c/linked; ln -s ../a/b/numbers c/link
  echo secret >c/secret; chmod 600 c/secret; chown 33:1000 c/secret; mkfifo c/fifo
  truncate -s 3M c/sparse; echo end >>c/sparse; : >empty; echo go >away; echo $d >name
  chown 0:1000 .; chmod 2751 .
  perl -e '($f, $n, $v) = @ARGV; syscall(188, $f, $n, $v, 4, 0) == 0 or die $!' name user.oua told
done
"""
# Directories are left out where overlayfs tells their size and links otherwise.
_MANIFEST = r"""cd /srv; for d in xfs sub other; do
  find $d ! -type d -printf '%p %y %m %U %G %s %n %T@ %l\n'
  find $d -type d -printf '%p %m %U %G %T@\n'
done | sort
find ext3 ext2 ! -type d -printf '%p %y %m %U %G %s %n %l\n' | sort
find ext3 ext2 xfs sub other /var/www -type f | sort | xargs sha256sum
for d in xfs sub; do perl -e '($f, $n) = @ARGV; $v = " " x 8; $size = syscall(191, $f, $n, $v, 8);
  print substr($v, 0, $size), "\n"' $d/name user.oua; done
"""
_FROZEN = ("/srv/xfs", "/srv/sub", "/srv/ext3")
OTHER = Package(
    "oua-other",
    "1.0",
    files={
        "/srv/ext3/package": "on ext3\n",
        "/srv/ext2/package": "on ext2\n",
        "/srv/xfs/package": "on XFS\n",
        "/srv/sub/package": "on a subvolume\n",
        "/srv/other/package": "on another subvolume\n",
        "/var/www/package": "through a bind mount, on XFS\n",
    },
    scripts={
        "postinst": "for d in ext3 ext2 xfs sub other; do cd /srv/$d\n"
        "echo more >>a/b/numbers; rm away; chmod 640 c/secret; mv c/sparse a/moved; done\n"
    },
)


@dataclass(frozen=True)
class Nights:
    """The same guest, suspended three times, and what it said of its files before."""

    dirty: Path
    frozen: Path
    synced: Path
    manifest: str


@pytest.fixture(scope="module")
def nights(
    suspended: Path, repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> Nights:
    """Read only."""
    folder = tmp_path_factory.mktemp("other")
    build(OTHER, repository.folder)
    repository.publish()
    toml = make_clone(suspended, folder / "dirty")
    use_mirror(toml, repository.port)
    plain = vmtoml.load(toml)
    config = _with_disks(plain)
    with qemu.restore(plain, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            for device, name in zip(_devices(config), ("vdb5", "vdc"), strict=True):
                path = next(disk.path for disk in config.disks if disk.node == device["drive"])
                file = {"driver": "file", "filename": path.name}
                node = {"driver": "raw", "node-name": device["drive"], "file": file}
                vm.qmp.execute_with("blockdev-add", {**node})
                vm.qmp.execute_with("device_add", {**device})
                guest_run(vm, f"until [ -b /dev/{name} ]; do sleep 0.1; done", timeout_s=60)
            guest_run(vm, _PREPARE, timeout_s=300)
            source = f"deb [trusted=yes] http://127.0.0.1:{repository.port}/ ./\n"
            guest_run(vm, "rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*")
            vm.qga().write_file("/etc/apt/sources.list", source.encode())
            guest_run(vm, "sync; echo 0 >/proc/sys/vm/dirty_writeback_centisecs; sync")
            guest_run(vm, "echo late >/srv/xfs/late; echo late >/srv/sub/late")
            plain.save.unlink()  # a link to the other guest's
            vm.suspend()
        except BaseException:
            vm.kill()
            raise
    manifest = ""

    def again(before: Path, name: str, script: str) -> Path:
        nonlocal manifest
        after = vmtoml.load(make_clone(before, folder / name))
        with qemu.restore(after, links_up=False) as vm:
            try:
                vm.qga()
                vm.cont()
                manifest = manifest or guest_run(vm, _MANIFEST).stdout.decode()
                guest_run(vm, script)
                after.save.unlink()  # a link to the other one's
                vm.suspend()
            except BaseException:
                vm.kill()
                raise
        return after.source

    freeze = "; ".join(f"fsfreeze -f {target}" for target in _FROZEN)
    thaw = "; ".join(f"fsfreeze -u {target}" for target in _FROZEN)
    frozen = again(config.source, "frozen", f"set -e; {freeze}")
    synced = again(frozen, "synced", f"set -e; {thaw}; sync; sync")
    return Nights(config.source, frozen, synced, manifest)


def _devices(config: vmtoml.VmConfig) -> list[dict[str, str]]:
    """The hardware of the two disks, in the order in which the guest finds them."""
    bus = next(word.split("bus=")[1].split(",")[0] for word in config.command if "bus=" in word)
    device = {"driver": "virtio-blk-pci", "bus": bus}
    return [{**device, "drive": "disk2", "addr": "a"}, {**device, "drive": "disk3", "addr": "b"}]


def _with_disks(config: vmtoml.VmConfig) -> vmtoml.VmConfig:
    """Make two disks and describe the VM as it is once they are plugged in."""
    folder = config.folder
    second, third, small = folder / "second.raw", folder / "third.raw", folder / "small.raw"
    for image, mib in ((second, 164), (third, 320), (small, 128)):
        with image.open("wb") as file:
            file.truncate(mib * MIB)
    sfdisk = [need("sfdisk"), "-q", str(second)]
    subprocess.run(sfdisk, input=_TABLE, text=True, check=True)
    for kind, start, size in (("ext3", 2048, "24M"), ("ext2", 51200, "8M")):
        make = [need("mke2fs"), "-q", "-F", "-t", kind, "-E", f"offset={start * 512}"]
        subprocess.run([*make, str(second), size], check=True)
    subprocess.run([need("mkfs.xfs"), "-q", str(third)], check=True)
    subprocess.run([need("mkfs.btrfs"), "-q", str(small)], check=True, capture_output=True)
    with small.open("rb") as source, second.open("r+b") as target:
        target.seek(69632 * 512)
        while piece := source.read(MIB):
            if piece.strip(b"\0"):
                target.write(piece)
            else:
                target.seek(len(piece), os.SEEK_CUR)
    small.unlink()
    command = list(config.command)
    for path, device in zip((second, third), _devices(config), strict=True):
        file_part = f"file.driver=file,file.filename={path.name}"
        command += ["-blockdev", f"driver=raw,node-name={device['drive']},{file_part}"]
        kind, *options = (f"{name}={value}" for name, value in device.items())
        command += ["-device", ",".join((kind.removeprefix("driver="), *options))]
    disks = (
        vmtoml.Disk("disk3", third, "raw"),  # in another order than in the guest
        vmtoml.Disk("disk2", second, "raw"),
        *config.disks,
    )
    changed = replace(config, command=tuple(command), disks=disks, host_kernel_mounts=True)
    config.source.write_text(vmtoml.dump(changed))
    return vmtoml.load(config.source)


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[_Worlds]:
    made = _Worlds(tmp_path)
    yield made
    for world in made.all:
        try:
            with sockets.connect(world.config.qmp) as sock:
                os.kill(sockets.peer_pid(sock), signal.SIGKILL)
        except (FileNotFoundError, ConnectionRefusedError):
            continue


class _Worlds:
    """Twins of a sleeping guest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.all: list[World] = []

    def of(self, toml: Path, *, option: bool = True) -> World:
        number = len(self.all)
        source = make_clone(toml, self._folder / f"sleeper{number}")
        if not option:
            source.write_text(source.read_text().replace("host_kernel_mounts = true\n", ""))
        self.all.append(World(source, self._folder / f"home{number}"))
        return self.all[-1]


def test_unflushed_ones_are_refused_by_name(nights: Nights, worlds: _Worlds) -> None:
    world = worlds.of(nights.dirty)
    with open_save(world.config.save) as save:
        guest = kernel.open_guest(save)
        mounts = {mount.target: mount for mount in kernel.look(guest, save).mounts}
        told = {
            target: unflushed_part(guest.kernel, mounts[target].major, mounts[target].minor)
            for target in (b"/srv/xfs", b"/srv/sub")
        }
    assert mounts[b"/srv/sub"].block == mounts[b"/srv/other"].block
    assert told[b"/srv/xfs"].startswith(("pages of inode ", "transactions that are not in its log"))
    assert told[b"/srv/sub"].startswith(("pages of inode ", "blocks of its trees"))
    done = world.run("run", "--", "true")
    assert (done.status, done.code) == (23, "unsupported-guest"), done
    message = done.value["error"]["message"]
    assert "(xfs) has writes that are in memory alone" in message or "(btrfs) has" in message
    assert "freeze" in done.value["error"]["hint"]


def test_without_the_option_they_are_covered(nights: Nights, worlds: _Worlds) -> None:
    world = worlds.of(nights.dirty, option=False)
    with open_sleeping(world.config) as sleeping:
        told = sleeping.layout
    assert told.covers == (b"/srv/xfs", b"/srv/sub", b"/srv/other", b"/var/www")
    assert all("host_kernel_mounts" in note for note in told.notes)
    assert told.notes[0].startswith("/srv/xfs (xfs on /dev/vdc) is not read")
    done = world.run("run", "--", "sh", "-c", "ls /srv/xfs /srv/sub; cat /srv/ext3/name")
    assert (done.status, done.result["output"]) == (0, "/srv/sub:\n\n/srv/xfs:\next3\n"), done
    refused = world.run("run", "--", "touch", "/srv/xfs/new")
    assert refused.status != 0


@pytest.mark.parametrize("night", ["frozen", "synced"])
def test_what_programs_see_is_what_the_guest_has(
    nights: Nights, worlds: _Worlds, night: str
) -> None:
    world = worlds.of(getattr(nights, night))
    before = world.hashes()
    seen = world.run("run", "--", "sh", "-c", _MANIFEST)
    assert seen.status == 0, seen
    assert seen.result["output"].splitlines() == nights.manifest.splitlines()
    assert world.hashes() == before
    assert leftovers(world.home) == NOTHING


def test_frozen_guest_is_not_updated(nights: Nights, worlds: _Worlds) -> None:
    done = worlds.of(nights.frozen).run("update", "--install", "oua-other")
    assert (done.status, done.code) == (23, "unsupported-guest"), done
    assert "is frozen: an update could not be written" in done.value["error"]["message"]


def test_update_reaches_them(nights: Nights, worlds: _Worlds) -> None:
    world = worlds.of(nights.synced)
    before = world.hashes()
    update = world.run("update", "--install", "oua-other")
    assert update.status == 0, update
    assert world.hashes() == before
    assert leftovers(world.home) == NOTHING
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    with qemu.attach(world.config) as vm:

        def out(script: str) -> str:
            return guest_run(vm, script).stdout.decode().strip()

        assert out("cat /srv/*/package /srv/xfs/www/package").splitlines() == [
            "on ext2",
            "on ext3",
            "on another subvolume",
            "on a subvolume",
            "on XFS",
            "through a bind mount, on XFS",
        ]
        assert out("tail -qn1 /srv/*/a/b/numbers") == "\n".join(["more"] * 5)
        assert out("stat -c '%a %u %g' /srv/*/c/secret") == "\n".join(["640 33 1000"] * 5)
        assert out("tail -qc4 /srv/*/a/moved; ls /srv/*/away 2>/dev/null; true") == "\n".join(
            ["end"] * 5
        )
        assert out("dpkg --verify oua-other; dpkg --audit") == ""
        assert out("find /srv -name '.ouassister-*' ! -name '*-undo' -print") == ""
