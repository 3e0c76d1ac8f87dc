"""A guest that works, falls asleep with everything unflushed, and is asked afterwards."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.view import manifest

from ouassister.disk import ext4_view
from ouassister.provider import qemu, vmtoml
from ouassister.testing import clone, guest_run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ouassister.provider.qemu import RunningVM

PROGRAMS: Final = Path(__file__).parents[2] / "build" / "view"
# In memory, so that they are no part of what is compared; /run forbids execution.
_PLACE: Final = "/dev/shm"  # noqa: S108 - of the guest
_MIB: Final = 1 << 20
# The root partition of `ouassister.testing.build_image`.
_ROOT_START: Final = _MIB
_QUIET: Final = (
    "mkdir -p /run/systemd/journald.conf.d;"
    " printf '[Journal]\nStorage=volatile\n' >/run/systemd/journald.conf.d/view.conf;"
    " systemctl restart systemd-journald; systemctl stop '*.timer'"
)
ROOT_TREES: Final = ("/var/tmp/view", "/usr/share/doc")  # noqa: S108 - of the guest
# Where something may have changed lately. Elsewhere a sum does (manifest.c), but for one seed.
LIVELY: Final = ("./etc/", "./tree/", "./var/", "./root/", "./home/", "./usr/share/doc/")


@dataclass(frozen=True)
class Extra:
    """A second disk: how its file system is made and mounted."""

    name: str
    mkfs: tuple[str, ...]
    options: str = "defaults"

    @property
    def target(self) -> str:
        return f"/mnt/{self.name}"


EXTRAS: Final = (
    Extra("small-blocks", ("-b", "1024")),
    Extra("no-checksums", ("-b", "4096", "-O", "^metadata_csum,^64bit")),
    Extra("data-journal", ("-b", "4096"), "data=journal"),
    Extra("inline-data", ("-b", "4096", "-I", "256", "-O", "inline_data")),
    Extra("old-layout", ("-b", "1024", "-O", "^extent,^64bit,^metadata_csum,^flex_bg")),
)


@dataclass(frozen=True)
class Run:
    """One seed: what the guest said after it woke up, and what was found asleep."""

    toml: Path
    operations: dict[str, tuple[int, int]]
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(suspended: Path, folder: Path, extras: Sequence[Extra] = ()) -> Path:
    """A suspended twin that holds the programs, and mounts an ext4 of each kind."""
    toml = clone(suspended, folder)
    config = vmtoml.load(toml)
    command, disks = list(config.command), list(config.disks)
    with running(config) as vm:
        for name in ("manifest", "workload"):
            vm.qga().write_file(f"{_PLACE}/{name}", (PROGRAMS / name).read_bytes())
            guest_run(vm, f"chmod 755 {_PLACE}/{name}")
        # Nothing but the workload shall write: the journal of systemd goes to memory.
        guest_run(vm, _QUIET)
        for number, extra in enumerate(extras):
            disk = config.folder / f"{extra.name}.raw"
            with disk.open("wb") as file:
                file.truncate(192 * _MIB)
            make = ["mke2fs", "-q", "-t", "ext4", *extra.mkfs, str(disk)]
            subprocess.run(make, check=True)
            node, address = f"extra{number}", f"{number + 9:x}"
            vm.qmp.execute_with(
                "blockdev-add",
                {
                    "driver": "raw",
                    "node-name": node,
                    "file": {"driver": "file", "filename": disk.name},
                },
            )
            device = {"driver": "virtio-blk-pci", "id": f"x{node}", "drive": node}
            device |= {"bus": "pci.0", "addr": address, "serial": extra.name}
            vm.qmp.execute_with("device_add", dict(device))
            spelled = f"driver=raw,node-name={node},file.driver=file,file.filename={disk.name}"
            command += ["-blockdev", spelled, "-device"]
            command.append(",".join([device.pop("driver"), *map("=".join, device.items())]))
            path = f"/dev/disk/by-id/virtio-{extra.name}"
            script = f"until [ -e {path} ]; do sleep 0.1; done; mkdir -p {extra.target};"
            guest_run(vm, f"{script} mount -o {extra.options} {path} {extra.target}")
            name = guest_run(vm, f"basename $(readlink -f {path})").stdout.decode().strip()
            disks.append(vmtoml.Disk(node, disk, "raw", extra.name, name))
        if extras:
            root = guest_run(vm, "lsblk -no PKNAME $(findmnt -no SOURCE /)").stdout.decode()
            disks[0] = replace(disks[0], guest=root.strip())
        guest_run(vm, "sync")
        suspend(vm)
    toml.write_text(vmtoml.dump(replace(config, command=tuple(command), disks=tuple(disks))))
    return toml


@contextlib.contextmanager
def running(config: vmtoml.VmConfig) -> Iterator[RunningVM]:
    """Resume a guest with its link closed; it does not outlive the block."""
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            yield vm
        finally:
            if qemu.is_running(config):
                vm.kill()


def suspend(vm: RunningVM) -> None:
    """Put a clone to sleep: its own save file takes the place of the link to the other's."""
    vm.config.save.unlink()
    vm.suspend()


def trees(extras: Sequence[Extra] = ()) -> tuple[str, ...]:
    """Where the workload works: on the root file system and on every extra one."""
    return (*ROOT_TREES, *(f"{extra.target}/tree" for extra in extras))


def work(
    base: Path,
    folder: Path,
    seed: int,
    count: int,
    places: Sequence[str],
    before: str = "",
    after: str = "",
) -> Run:
    """Run the workload in a twin of ``base`` and suspend that at once, nothing synced.

    ``before`` and ``after`` are shell commands that the guest runs around it.
    """
    toml = clone(base, folder)
    start = time.monotonic()
    with running(vmtoml.load(toml)) as vm:
        if before:
            guest_run(vm, before)
        command = [f"{_PLACE}/workload", str(seed), str(count), *places]
        told = guest_run(vm, command, timeout_s=300).stdout.decode()
        if after:
            guest_run(vm, after)
        worked = time.monotonic()
        suspend(vm)
    operations = {}
    for line in told.splitlines():
        name, succeeded, failed, _ = line.split(" ", 3)
        operations[name] = (int(succeeded), int(failed))
    assert operations, f"the workload of seed {seed} failed in the guest"
    seconds = {"work": worked - start, "suspend": time.monotonic() - worked}
    return Run(toml, operations, seconds)


def ask(
    run: Run, targets: Sequence[str] = ("/",), prefixes: Sequence[str] = ()
) -> dict[str, dict[str, manifest.Node]]:
    """Resume the guest and let it tell what it has, by mount point; see manifest.c.

    It syncs first. Of a file that outgrew its inode the journal can have a copy of the first block
    that is not what lies on the disk, and until it is there, the guest itself reads now the one
    and now the other (docs/design/0007).
    """
    start = time.monotonic()
    told = {}
    with running(vmtoml.load(run.toml)) as vm:
        guest_run(vm, "sync")
        for target in targets:
            # A bind mount shows what other mounts cover.
            script = f"d=$(mktemp -d -p {_PLACE}); mount --bind {target} $d && "
            script += " ".join([f"{_PLACE}/manifest $d", *prefixes])
            result = guest_run(vm, ["unshare", "-m", "sh", "-c", script], timeout_s=300)
            assert not result.truncated
            told[target] = manifest.parse(result.stdout)
    run.seconds["ask"] = time.monotonic() - start
    return told


def look(tree: Path, prefixes: Sequence[str] = ()) -> dict[str, manifest.Node]:
    """The same of a tree that is mounted here."""
    command = [str(PROGRAMS / "manifest"), str(tree), *prefixes]
    return manifest.parse(subprocess.run(command, capture_output=True, check=True).stdout)


@contextlib.contextmanager
def mounted_by_ext4_view(image: Path, folder: Path) -> Iterator[Path]:
    """Mount an image as the updater sees it."""
    folder.mkdir()
    assert ext4_view.mount(image, folder) == ""
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def as_it_lies(toml: Path, folder: Path) -> Path:
    """The root partition of the disk alone, with its journal replayed: no word from memory."""
    folder.mkdir(parents=True)
    disk = vmtoml.load(toml).disks[0]
    whole, image = folder / "disk.raw", folder / "root.raw"
    convert = ["qemu-img", "convert", "-O", "raw", "-f", disk.format, str(disk.path), str(whole)]
    subprocess.run(convert, check=True)
    table = subprocess.run(["sfdisk", "-J", str(whole)], capture_output=True, check=True)
    (partition,) = json.loads(table.stdout)["partitiontable"]["partitions"]
    source = f"driver=raw,offset={partition['start'] * 512},size={partition['size'] * 512}"
    source += f",file.driver=file,file.filename={whole}"
    command = ["qemu-img", "convert", "-O", "raw", "--image-opts", source, str(image)]
    subprocess.run(command, check=True)
    whole.unlink()
    replayed = subprocess.run(
        ["e2fsck", "-E", "journal_only", "-y", str(image)], capture_output=True, check=False
    )
    assert replayed.returncode in (0, 1), replayed.stdout
    return image


@contextlib.contextmanager
def timed(run: Run, name: str) -> Iterator[None]:
    """Note how long the block took."""
    start = time.monotonic()
    yield
    run.seconds[name] = time.monotonic() - start
