"""Each Debian kernel, read from a save file, against what the live guest said just before.

CI runs the releases that differ most. ``OUASSISTER_KERNELS`` names others, comma-separated, or
``all``.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

import pytest
from tests.conftest import GUESTS
from tests.vm import sysfs_guest

from ouassister.guest_model import Subject
from ouassister.kernel import GuestReader, introspect, kallsyms_scan
from ouassister.kernel.introspect import open_guest
from ouassister.memory import open_save
from ouassister.provider import qemu, vmtoml
from ouassister.shadow.served.snapshot import Node, decode
from ouassister.shadow.trees.collect import collect_devices, collect_system, collect_system_first
from ouassister.testing import Recipe, build_image, guest_run, make_suspended
from ouassister.testing import clone as make_clone
from ouassister.testing.view import build_view, mounted_view

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.model import GuestView
    from ouassister.provider.qemu import RunningVM

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]

_PACKAGES = ("systemd", "systemd-sysv", "dbus", "udev", "qemu-guest-agent", "apt")
_KERNELS = {
    "bullseye": Recipe("bullseye", "cloud-amd64", "bullseye", packages=_PACKAGES),
    "bullseye-generic": Recipe("bullseye", "amd64", "bullseye", packages=_PACKAGES),
    "bookworm": Recipe("bookworm", packages=_PACKAGES),
    "bookworm-generic": Recipe("bookworm", "amd64", packages=_PACKAGES),
    "bookworm-backports": Recipe(
        "bookworm", "cloud-amd64", "bookworm-backports", packages=_PACKAGES
    ),
    "trixie": Recipe("trixie", packages=_PACKAGES),
    "trixie-generic": Recipe("trixie", "amd64", packages=_PACKAGES),
    "newest": Recipe("trixie", "cloud-amd64", "trixie-backports", packages=_PACKAGES),
    "newest-generic": Recipe("trixie", "amd64", "trixie-backports", packages=_PACKAGES),
}
_ALWAYS = "bullseye"  # the oldest; bookworm is the guest of all other tests
_ASKED = os.environ.get("OUASSISTER_KERNELS", _ALWAYS)

# From names to token index as in v5.10, and unlike it VMCOREINFO says where they are.
_SAME_ORDER = ("bookworm-backports", "trixie", "trixie-generic")
# Written back and committed first, and then nothing any more: what follows stays in memory. What
# is merely read is as old as the image.
_WORK = """set -e
echo 0 >/proc/sys/vm/dirty_writeback_centisecs
mount -o remount,commit=600 /
cd /var/lib/dpkg
echo a >renamed; echo a >mode; echo a >appended; sync
cat status info/* >/dev/null; ls -lR . >/dev/null
echo more >>appended
mkdir new.d
mv renamed new.d/here
chmod 600 mode
setsid perl -e 'open L, ">>", "lock"; my $lock = pack "ssx4qqix4", 1, 0, 0, 0, 0;
  fcntl L, 6, $lock or die; open P, ">", "/run/held"; close P; sleep' >/dev/null 2>&1 </dev/null &
for i in $(seq 600); do [ -e /run/held ] && exit 0; sleep 0.05; done; exit 1
"""
_TASKS = """for p in /proc/[0-9]*; do
  exe=$(readlink $p/exe) || continue
  read -r _ _ _ ppid _ <$p/stat; echo "${p#/proc/} $ppid $exe"
done"""


def _asked() -> list[str]:
    names = list(_KERNELS) if _ASKED == "all" else _ASKED.split(",")
    unknown = set(names) - set(_KERNELS)
    if unknown:
        raise pytest.UsageError(f"OUASSISTER_KERNELS: {sorted(unknown)} is none of {[*_KERNELS]}")
    return names


class Told:
    """What a live guest says of itself."""

    def __init__(self, vm: RunningVM) -> None:
        def say(script: str, *, check: bool = True) -> str:
            return guest_run(vm, script, check=check).stdout.decode().strip()

        self.uts = say("uname -snrvm")
        self.boot_id = say("cat /proc/sys/kernel/random/boot_id")
        self.cpus = int(say("nproc"))
        self.mounts = {
            tuple(line.split(" ")[:4]) for line in say("cat /proc/1/mounts").splitlines()
        }
        self.holder = int(
            say("cat /proc/locks | sed -n 's/.*POSIX  *ADVISORY *WRITE *//p' | head -1").split()[0]
        )
        self.inode = int(say("stat -c %i /var/lib/dpkg/lock"))
        self.mtime = say("stat -c %.Y /var/lib/dpkg/appended")
        self.tasks = {}
        for line in say(_TASKS, check=False).splitlines():
            pid, parent, exe = line.split(" ", 2)
            self.tasks[int(pid)] = (int(parent), exe.encode())
        listed = guest_run(vm, ["/usr/bin/perl", "-e", sysfs_guest.LIVE], timeout_s=300)
        self.files = sysfs_guest.parse(listed.stdout.decode())
        self.uptime_s = float(say("cat /proc/uptime").split()[0])
        self.now_s = int(say("date +%s"))


@pytest.fixture(scope="module", params=_asked())
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """One kernel's guest, at work and then suspended: what it said, and what its memory says."""
    image = build_image(GUESTS, _KERNELS[request.param], progress=print)
    asleep = make_suspended(image, image.disk.parent / "suspended", web=False, progress=print)
    folder = tmp_path_factory.mktemp(request.param)
    config = vmtoml.load(make_clone(asleep, folder / "vm"))
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            guest_run(vm, _WORK)
            told = Told(vm)
            config.save.unlink()  # a link to the other guest's
            vm.suspend()
        except BaseException:
            vm.kill()
            raise
    with open_save(config.save) as save:
        return Seen(
            request.param, config.source, told, introspect(save, frozenset((Subject.LOCKS,)))
        )


class Seen:
    """A live guest's words and its view from the save file."""

    def __init__(self, name: str, toml: Path, told: Told, view: GuestView) -> None:
        self.name = name
        self.toml = toml
        self.told = told
        self.view = view


def test_kernel_names_and_clocks_are_the_live_guests(seen: Seen) -> None:
    told, view = seen.told, seen.view
    ours = view.uts
    assert (
        " ".join((ours.sysname, ours.nodename, ours.release, ours.version, ours.machine))
        == told.uts
    )
    assert str(uuid.UUID(view.boot_id)) == view.boot_id == told.boot_id
    assert view.cpus == told.cpus == 2
    assert view.memory_bytes == 512 << 20
    assert -1 <= view.uptime_s - told.uptime_s < 60
    assert -1 <= view.suspended_at_s - told.now_s < 60


def test_kernel_mounts_are_the_live_guests(seen: Seen) -> None:
    ours = {(m.source.decode(), m.target.decode(), m.fstype, m.read_only) for m in seen.view.mounts}
    assert ours == {(s, t, f, "ro" in o.split(",")) for s, t, f, o in seen.told.mounts}
    root = next(mount for mount in seen.view.mounts if mount.target == b"/")
    assert root.block is not None
    assert (root.block.disk, root.block.start) == ("vda", 1 << 20)


def test_kernel_tasks_are_the_live_guests(seen: Seen) -> None:
    ours = {task.pid: (task.parent, task.exe) for task in seen.view.tasks if task.exe}
    both = ours.keys() & seen.told.tasks.keys()
    assert len(both) >= 6
    assert {pid: ours[pid] for pid in both} == {pid: seen.told.tasks[pid] for pid in both}
    comm = {task.comm for task in seen.view.tasks if task.pid in ours.keys() - both}
    assert comm <= {b"(udev-worker)", b"systemd-udevd"}  # its workers come and go


def test_kernel_locks_are_the_live_guests(seen: Seen) -> None:
    held = {lock.path: lock for lock in seen.view.held_locks or ()}
    lock = held[b"/var/lib/dpkg/lock"]
    assert (lock.kind, lock.write, lock.pid) == ("posix", True, seen.told.holder)
    assert lock.inode == seen.told.inode
    assert seen.view.degraded == ()


def test_kernel_sysfs_and_devices_are_the_live_guests(seen: Seen) -> None:
    with open_save(vmtoml.load(seen.toml).save) as save:
        reader = GuestReader(open_guest(save))
        devices, system = collect_devices(reader), collect_system(reader)
        first = collect_system_first(reader).raw
    assert (devices.notes, system.notes) == ((), ())
    assert system.raw is not None
    assert first is not None
    whole = decode(system.raw)
    fs = next(index for index, node in enumerate(whole) if (node.parent, node.name) == (0, b"fs"))
    assert {node.name for node in decode(first)} == {
        node.name for node in whole if node.parent in (0, fs)
    }
    # All that is there is a folder, and each is told as it is with the rest.
    assert {node._replace(parent=0) for node in decode(first)} <= {
        node._replace(parent=0) for node in whole
    }
    assert devices.raw is not None
    live = seen.told.files
    ours: dict[bytes, Node] = {}
    for top, raw in ((b"/sys", system.raw), (b"/dev", devices.raw)):
        paths: list[bytes] = []
        for node in decode(raw):
            paths.append(paths[node.parent] + b"/" + node.name if paths else top)
            ours[paths[-1]] = node
    skipped = {path for path in live if sysfs_guest.LEFT_OUT.fullmatch(path)}
    assert live.keys() - skipped == ours.keys()
    wrong: dict[object, object] = {}
    for path, node in ours.items():
        file = live[path]
        stands = path in sysfs_guest.STANDS_ON or sysfs_guest.MOUNTED.fullmatch(path)
        found = (node.mode, node.uid, node.gid, node.links, node.number, node.size, node.device)
        if not stands and found != file.attributes:
            wrong[path] = (found, file.attributes)
        moves = path == sysfs_guest.JUMPS or sysfs_guest.MOVES.fullmatch(path)
        if node.content is not None and not moves and file.content != node.content:
            wrong[path, "content"] = (node.content, file.content)
    assert wrong == {}
    assert sum(node.content is not None for node in ours.values()) > 2000


def test_view_of_unflushed_files_is_the_live_guests(seen: Seen, tmp_path: Path) -> None:
    """What was changed last is in memory alone: nothing is written back there any more."""
    image = build_view(seen.toml, tmp_path)
    with mounted_view(image) as tree:
        folder = tree / "var/lib/dpkg"
        assert (folder / "appended").read_text() == "a\nmore\n"
        assert (folder / "new.d/here").read_text() == "a\n"
        assert not (folder / "renamed").exists()
        assert (folder / "mode").stat().st_mode & 0o777 == 0o600
        seconds, _, nanoseconds = seen.told.mtime.partition(".")
        mtime = int(seconds) * 10**9 + int(nanoseconds)
        assert (folder / "appended").stat().st_mtime_ns == mtime


def test_tables_are_found_by_scanning_where_the_kernel_says_they_are(seen: Seen) -> None:
    if seen.name not in _SAME_ORDER:
        pytest.skip("this kernel does not tell, or has its tables in another order")
    with open_save(vmtoml.load(seen.toml).save) as save:
        kernel = open_guest(save).kernel
        found = kallsyms_scan.find_tables(kernel.virtual, kernel.note)
    for table in ("num_syms", "names", "token_table", "token_index"):
        name = f"kallsyms_{table}"
        assert found[name] == kernel.note.symbol(name)
