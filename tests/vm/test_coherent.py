"""Disk and memory of a sleeping guest make the file system that the guest itself knows.

The seeded workload of `tests/view` covers the breadth; here is one of each hard case, by hand.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import CorruptGuestError
from ouassister.provider import qemu, vmtoml
from ouassister.testing import clone as make_clone
from ouassister.testing import guest_run
from ouassister.testing.view import build_view, mounted_view

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ouassister.provider.qemu import RunningVM

pytestmark = pytest.mark.vm

PLACE = "/var/tmp/coherent"  # noqa: S108 - in the guest
# Runs in the guest and here, on both sides of the comparison.
LIST = """
cd {place}
find . -printf '%P|%y|%m|%U|%G|%s|%T@|%C@|%n|%i|%l\\n' | sort
find . -type f -print0 | sort -z | xargs -0 sha256sum
"""
SETTLED = rf"""
mkdir {PLACE}; cd {PLACE}; mkdir from to large shrinks
for i in $(seq 9); do head -c $((i * 3000)) /dev/zero | tr '\0' $i >from/$i; done
head -c 400000 /dev/zero | tr '\0' h >holes
for i in $(seq 400); do echo $i >shrinks/a-rather-long-name-for-a-file-$i; done
sync; echo 3 >/proc/sys/vm/drop_caches
"""
UNFLUSHED = rf"""
cd {PLACE}
mv from/1 to/moved; mv from/2 from/renamed; rm from/3; ln from/4 to/hard; chmod 600 from/4
truncate -s 100 from/5; truncate -s 90000 from/6; echo tail >>from/7; echo head | dd of=from/8 \
    conv=notrunc status=none
touch -d 2001-02-03T04:05:06.789 from/9; chown 70000:80000 from/9
fallocate -p -o 40960 -l 81920 holes; fallocate -l 1000000 allocated
echo data | dd of=allocated bs=1 seek=500000 conv=notrunc status=none
truncate -s 60M sparse; echo end >>sparse
for i in $(seq 400); do echo $i >large/a-rather-long-name-for-a-file-$i; done
rm shrinks/*[1-9]
ln -s short symlink; ln -s $(head -c 300 /dev/zero | tr '\0' x) long-symlink
mkfifo fifo; mknod null c 1 3; mknod disk b 8 300
mkdir gone; echo gone >gone/file; rm -r gone
setsid sh -c 'exec 3>unlinked; echo data >&3; rm unlinked; : >/run/ready; exec sleep 9999' \
    >/dev/null 2>&1 &
while [ ! -e /run/ready ]; do sleep 0.1; done
"""


def _asleep(toml: Path, *scripts: str) -> None:
    """Resume a twin, run scripts in it, suspend it to a save file of its own."""
    config = vmtoml.load(toml)
    with _running(config) as vm:
        for script in scripts:
            guest_run(vm, script, timeout_s=300)
        config.save.unlink()
        vm.suspend()


def _running(config: vmtoml.VmConfig) -> RunningVM:
    vm = qemu.restore(config, links_up=False)
    vm.qga()
    vm.cont()
    return vm


def _view(toml: Path, folder: Path) -> str:
    with mounted_view(build_view(toml, folder)) as tree:
        script = LIST.format(place=f"{tree}{PLACE}")
        return subprocess.run(["sh", "-c", script], check=True, capture_output=True).stdout.decode()


def test_view_is_what_the_guest_says_after_it_wakes_up(clone: Path, tmp_path: Path) -> None:
    _asleep(clone, SETTLED, UNFLUSHED)
    twin = make_clone(clone, tmp_path / "awake")
    view = _view(clone, tmp_path / "view")
    with _running(vmtoml.load(twin)) as vm:
        guest = guest_run(vm, LIST.format(place=PLACE), timeout_s=300).stdout.decode()
        vm.kill()
    assert view.splitlines() == guest.splitlines()
    assert "unlinked" not in view
    assert "moved|f|644" in view


def test_disk_of_another_time_is_refused(clones: Callable[[], Path], tmp_path: Path) -> None:
    """All is flushed, so memory holds little; but the disk is one on which nothing happened."""
    changed, other = clones(), clones()
    _asleep(changed, SETTLED, UNFLUSHED, "sync")
    save = vmtoml.load(other).save
    save.unlink()
    save.symlink_to(vmtoml.load(changed).save)
    with pytest.raises(CorruptGuestError):
        build_view(other, tmp_path / "view")
