"""The shadow's /sys and /dev of a sleeping guest, against those of that guest when it wakes up.

The same program lists both from inside, with everything that lstat(2) tells and what can be read.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from tests.vm import sysfs_guest
from tests.vm.sysfs_guest import JUMPS, LEFT_OUT, LENT, MOUNTED, MOVES, STANDS_ON, File, parse
from tests.vm.world import NOTHING, World, leftovers

from ouassister.provider import qemu
from ouassister.testing import clone as make_clone
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

COMMANDS = {
    "lsblk": "lsblk; lsblk -o NAME,ALIGNMENT,MIN-IO,OPT-IO,PHY-SEC,LOG-SEC,ROTA,RQ-SIZE,RA,WSAME;"
             " lsblk -D; lsblk -n -o NAME,ROTA,RO,SIZE,PTTYPE,PARTUUID,UUID,SUBSYSTEMS,MODE,GROUP",
    "findmnt": "findmnt -rn -o TARGET,SOURCE,FSTYPE,OPTIONS,MAJ:MIN",
    "udevadm": "udevadm info --query=all --name=/dev/vda1 | LC_ALL=C sort | grep -v DEVLINKS",
    "blkid": "blkid -s TYPE -o value /dev/vda1; blkid -s UUID -o value /dev/vda1; blkid -L root;"
             " findfs LABEL=root; blkid -l -t TYPE=ext4 -o device",
    "links": "udevadm info --query=symlink --name=/dev/vda1 | tr ' ' '\\n' | LC_ALL=C sort",
    "property": "udevadm info --query=property --path=/sys/class/net/eth0 | LC_ALL=C sort",
    "lscpu": "lscpu | grep -v 'Vulnerab\\|Hypervisor\\|Virtualization type\\|^CPU.*MHz'"
             " | tr -s ' '",
    "online": "getconf _NPROCESSORS_CONF; cat /sys/devices/system/cpu/online",
    "lsmod": "lsmod | cut -d' ' -f1 | LC_ALL=C sort",
    "initstate": "cat /sys/module/virtio_blk/initstate; modinfo -F srcversion virtio_blk;"
                 " cat /sys/module/virtio_blk/srcversion",
    "aliases": "for d in /sys/bus/pci/devices/* /sys/bus/virtio/devices/*; do"
               " modprobe --resolve-alias $(cat $d/modalias); done",
    "walk": "d=$(readlink -f /sys/class/block/vda1); while [ $d != /sys/devices ]; do"
            " d=${d%/*}; [ -e $d/driver ] && readlink $d/driver; done",
    "tests": "test -b /dev/vda && test -c /dev/kmsg && test -L /dev/disk/by-label/root"
             " && test ! -d /sys/firmware/efi && test -w /sys/block/vda/uevent && echo all",
    "resolve": "readlink -f /dev/disk/by-label/root /dev/block/254:0 /sys/dev/block/254:1",
}  # fmt: skip

# What only the shadow does; each prints one line.
REFUSALS = r"""
for d in vda vda1 kmsg mem loop0 loop-control mapper/control console net/tun kvm fuse; do
  cat /dev/$d >/dev/null 2>/tmp/why; echo "$? $(sed 's/.*: //' /tmp/why)"
done
dd if=/dev/zero of=/dev/vda bs=512 count=1 2>/dev/null; echo $?
mknod /dev/mine b 254 0 && cat /dev/mine; echo $?
echo 1 >/sys/block/vda/size; mkdir /sys/mine; echo x >/sys/mine; rm /sys/block; echo tried
cat /sys/block/vda/stat; cat /sys/kernel/slab/x; echo read
chmod 600 /dev/vda && stat -c %a /dev/vda
mkdir /dev/folder && echo text >/dev/folder/file && ln -s ../vda /dev/folder/link &&
  ln /dev/folder/file /dev/folder/twin && cat /dev/folder/twin && stat -Lc %t:%T /dev/folder/link
rm -r /dev/folder && ls -d /dev/folder
echo text >/dev/null && head -c 4 /dev/zero | od -An -tx1 && head -c 4 /dev/urandom | wc -c
perl -e 'open my $p, "+<", "/dev/ptmx" or die; print -t $p ? "terminal\n" : "none\n"'
echo shared >/dev/shm/x && cat /dev/shm/x
echo change >/sys/block/vda/uevent && echo 1 >/proc/sys/vm/swappiness && echo recorded
"""


@dataclass(frozen=True)
class Seen:
    """What the sleeping guest's shadow says, and the guest itself when it is awake."""

    ours: dict[bytes, File]
    live: dict[bytes, File]
    commands: dict[str, tuple[str, str]]  # ours, live
    refusals: str
    hashes: tuple[dict[str, str], dict[str, str]]
    left: dict[str, list[str]]

    def below(self, top: bytes) -> tuple[dict[bytes, File], dict[bytes, File]]:
        ours, live = (
            {path: file for path, file in seen.items() if path.startswith(top)}
            for seen in (self.ours, self.live)
        )
        return ours, live


@pytest.fixture(scope="module")
def seen(suspended: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("sysfs")
    world = World(make_clone(suspended, folder / "vm"), folder / "home")
    before = world.hashes()
    listed = world.run("run", "--", "perl", "-e", sysfs_guest.LIVE).result["output"]
    script = "".join(f"echo =={name}; {{ {one}; }} 2>&1;\n" for name, one in COMMANDS.items())
    printed = world.run("run", "--", "sh", "-c", script).result["output"]
    refusals = world.run("run", "--", "sh", "-c", f"{{ {REFUSALS} }} 2>&1").result["output"]
    after, left = world.hashes(), leftovers(world.home)
    with qemu.restore(world.config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            live = guest_run(vm, ["/usr/bin/perl", "-e", sysfs_guest.LIVE], timeout_s=300)
            answers = guest_run(vm, script, timeout_s=120).stdout.decode()
        finally:
            vm.kill()
    ours, theirs = _sections(printed), _sections(answers)
    commands = {name: (ours[name], theirs[name]) for name in COMMANDS}
    return Seen(parse(listed), parse(live.stdout.decode()), commands, refusals, (before, after),
                left)  # fmt: skip


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"^==(\w+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# --- /sys ---

# What programs cannot do without is told, not merely there.
NEEDED = (
    b"block/vda/size", b"block/vda/ro", b"block/vda/removable", b"block/vda/dev",
    b"block/vda/queue/rotational", b"block/vda/queue/logical_block_size", b"block/vda/uevent",
    b"block/vda/vda1/start", b"block/vda/vda1/partition", b"block/vda/vda1/uevent",
)  # fmt: skip


def test_tree_is_the_live_guests(seen: Seen) -> None:
    ours, live = seen.below(b"/sys")
    assert {path for path in live if not LEFT_OUT.fullmatch(path)} == ours.keys()
    assert len(ours) > 7000
    wrong = {
        path: (file.attributes, live[path].attributes)
        for path, file in ours.items()
        if file.attributes != live[path].attributes and not MOUNTED.fullmatch(path)
    }
    assert wrong == {}
    assert {path for path in ours if MOUNTED.fullmatch(path)} <= live.keys()


def test_links_lead_where_they_lead_in_the_guest(seen: Seen) -> None:
    ours, live = seen.below(b"/sys")
    links = {path: file.content for path, file in ours.items() if stat.S_ISLNK(file.mode)}
    assert len(links) > 800
    assert links.pop(JUMPS) is not None
    assert links == {path: live[path].content for path in links}


def test_what_is_told_is_what_the_guest_says(seen: Seen) -> None:
    ours, live = seen.below(b"/sys")
    told = {path: file.content for path, file in ours.items()
            if stat.S_ISREG(file.mode) and file.content is not None}  # fmt: skip
    wrong = {path: (content, live[path].content) for path, content in told.items()
             if content != live[path].content and not MOVES.fullmatch(path)}  # fmt: skip
    assert wrong == {}
    assert len(told) > 1500
    disk = next(path for path in ours if path.endswith(b"virtio1/block/vda"))
    top = disk.removesuffix(b"block/vda")
    assert {top + name for name in NEEDED} <= told.keys()
    for name in (b"class/dmi/id", b"firmware/dmi/tables/DMI"):
        assert b"/sys/" + name in ours
    assert b"/sys/firmware/dmi/tables/DMI" in told
    assert told[b"/sys/module/apparmor/parameters/enabled"] == b"Y\n"
    security = [path for path in told if path.startswith(b"/sys/kernel/security/apparmor/")]
    assert len(security) > 30
    assert b"/sys/kernel/security/apparmor/profiles" in security
    assert b"apparmor" in told[b"/sys/kernel/security/lsm"]


def test_what_is_not_told_is_in_the_table(seen: Seen) -> None:
    """By where it is; a file that is told for some devices is not told for others."""
    ours, live = seen.below(b"/sys")
    untold = {path for path, file in ours.items()
              if stat.S_ISREG(file.mode) and file.content is None
              and live[path].content is not None}  # fmt: skip
    queues = {path.rpartition(b"/")[2] for path in untold if b"/queue/" in path}
    assert queues == {b"scheduler", b"io_poll", b"io_poll_delay", b"wbt_lat_usec"}
    pci = {path.rpartition(b"/")[2] for path in untold
           if re.fullmatch(rb"/sys/devices/pci0000:00/0[^/]+/\w+", path)}  # fmt: skip
    assert pci <= {b"config", b"power_state", b"broken_parity_status", b"local_cpus", b"msi_bus",
                   b"local_cpulist", b"d3cold_allowed", b"ari_enabled", b"irq", b"resource1",
                   b"resource3", b"waiting_for_supplier"}  # fmt: skip
    modules = {path for path in untold if re.fullmatch(rb"/sys/module/\w+/\w+", path)}
    assert modules == set()


# --- /dev ---


def test_nodes_are_the_live_guests(seen: Seen) -> None:
    ours, live = seen.below(b"/dev")
    assert ours.keys() == live.keys()
    assert len(ours) > 200
    wrong = {path: (file, live[path]) for path, file in ours.items()
             if file != live[path] and path not in STANDS_ON | LENT}  # fmt: skip
    assert wrong == {}
    for path in LENT:
        assert ours[path].device == live[path].device
        assert stat.S_IFMT(ours[path].mode) == stat.S_IFCHR
    assert stat.S_ISBLK(ours[b"/dev/vda"].mode)
    assert ours[b"/dev/vda"].device == os.makedev(254, 0)


def test_no_device_of_the_guest_or_the_host_is_opened(seen: Seen) -> None:
    lines = seen.refusals.splitlines()
    assert lines[:11] == ["1 Permission denied"] * 11
    assert lines[11] == "1"  # nothing is written
    assert lines[12] == "0"  # a node that is made is an empty file
    assert seen.hashes[0] == seen.hashes[1]
    assert seen.left == NOTHING


def test_what_programs_do_to_them(seen: Seen) -> None:
    _, _, text = seen.refusals.partition("1\n0\n")
    errors, _, text = text.partition("tried\n")
    assert errors.count("Permission denied") == 2  # no attribute to be written, no file to be made
    assert errors.count("Operation not permitted") + errors.count("Is a directory") == 2
    errors, _, text = text.partition("read\n")
    assert "/sys/block/vda/stat: Input/output error" in errors
    assert "/sys/kernel/slab/x: No such file or directory" in errors
    assert text.splitlines() == [
        "600",
        "text", "fe:0",
        "ls: cannot access '/dev/folder': No such file or directory",
        " 00 00 00 00", "4",
        "terminal",
        "shared",
        "recorded",
    ]  # fmt: skip


# --- programs ---


@pytest.mark.parametrize("name", COMMANDS)
def test_program_prints_what_it_prints_in_the_guest(seen: Seen, name: str) -> None:
    ours, live = seen.commands[name]
    assert ours == live
    assert ours.strip()
