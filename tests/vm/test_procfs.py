"""The shadow's /proc of a sleeping guest, against the /proc of that guest when it wakes up.

A process that has not run since, by its count of context switches, shows the same bytes.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from tests.host import procfs_rig
from tests.vm import procfs_guest

from ouassister.kernel import GuestReader, look, open_guest
from ouassister.memory import open_save
from ouassister.provider import qemu, vmtoml
from ouassister.shadow.procfs import snapshot
from ouassister.shadow.procfs.collect import collect
from ouassister.shadow.procfs.snapshot import Node
from ouassister.testing import clone as make_clone
from ouassister.testing import guest_run
from ouassister.testing.view import build_view, mounted_view

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

COMMANDS = {
    "ps": "ps axf -o pid,ppid,pgid,sess,user,stat,ni,pri,cls,rtprio,vsz,rss,lstart,comm,args",
    "threads": "ps -eLo pid,lwp,nlwp,comm",
    "security": "ps axo pid,nwchan,ignored,caught,blocked,cgroup,mntns,netns",
    "pgrep": "pgrep -a nginx; pgrep -u nobody -a; pidof nginx sshd",
    "findmnt": "findmnt -rn -o TARGET,SOURCE,FSTYPE,OPTIONS,PROPAGATION,MAJ:MIN,FSROOT",
    "mount": "mount; mountpoint -q / && echo mountpoint",
    "free": "free -k | sed -n 2p",
    "swapon": "swapon --show=NAME,TYPE,SIZE,PRIO --noheadings --bytes",
    "sockets": "PROC_ROOT=/proc ss -ltn | sort; PROC_ROOT=/proc ss -lun | sort",
    "lslocks": "lslocks -n -o TYPE,MODE,START,END,PID",
    "sysctl": "sysctl kernel.hostname kernel.osrelease vm.swappiness net.ipv4.ip_forward",
    "uptime": "uptime | sed 's/.*load average: //; s/[0-9]/N/g'",
    "uname": "cat /proc/version /proc/cmdline",
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What we render of the sleeping guest, and what it says itself when it is awake."""

    ours: dict[bytes, Node]
    left_out: list[str]
    live: dict[bytes, Node]
    commands: dict[str, tuple[str, str]]  # ours, live

    def resting(self) -> list[bytes]:
        """Processes that have not run between the two."""
        found = []
        for path in self.live:
            status = path + b"/status"
            if path.isdigit() and status in self.ours and status in self.live:
                threads = [
                    name for name in self.live if name.startswith(path + b"/task/")
                    and name.endswith(b"/status")
                ]  # fmt: skip
                if all(
                    name in self.ours
                    and _switches(self.ours[name].content) == _switches(self.live[name].content)
                    for name in (status, *threads)
                ):
                    found.append(path)
        return sorted(found, key=int)


def _switches(status: bytes) -> list[bytes]:
    return re.findall(rb"ctxt_switches:\t(\d+)", status)


@pytest.fixture(scope="module")
def seen(suspended: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("procfs")
    toml = make_clone(suspended, folder / "vm")
    config = vmtoml.load(toml)
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            vm.qga().write_file("/root/procfs.pl", procfs_guest.PROGRAM.encode())
            vm.qga().write_file("/root/live.pl", procfs_guest.LIVE.encode())
            guest_run(vm, procfs_guest.PREPARE, timeout_s=120)
            (folder / "vm" / "save.img").unlink()  # a link to the other guest's
            vm.suspend()
        except BaseException:
            vm.kill()
            raise
    made = folder / "snapshot"
    with open_save(config.save) as save:
        guest = open_guest(save)
        tree = collect(GuestReader(guest), look(guest, save))
    snapshot.write(made, tree)
    ours = {}
    with mounted_view(build_view(toml, folder / "view")) as root:
        for name, command in COMMANDS.items():
            printed, _ = procfs_rig.run(made, f"{{ {command}; }} 2>&1", root)
            ours[name] = printed.stdout
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            live = guest_run(vm, ["/usr/bin/perl", "/root/live.pl"], timeout_s=120).stdout
            commands = {}
            for name, command in COMMANDS.items():
                done = guest_run(vm, f"{{ {command}; }} 2>&1", check=False)
                commands[name] = (ours[name], done.stdout.decode())
        finally:
            vm.kill()
    return Seen(snapshot.read(made), tree.left_out, _nodes(live), commands)


def _nodes(text: bytes) -> dict[bytes, Node]:
    found = {}
    for line in text.splitlines():
        path, mode, uid, gid, *content = line.split(b" ")
        raw = bytes.fromhex((content or [b""])[0].decode())
        found[bytes.fromhex(path.decode())] = Node(int(mode), int(uid), int(gid), raw)
    return found


# --- processes ---

# Lines of status that are left out; see ouassister.shadow.procfs.table.
_LEFT_OUT = re.compile(
    rb"^(?:CoreDumping|THP_enabled|HugetlbPages|Speculation\w*|SpeculationIndirectBranch"
    rb"|untag_mask|x86_Thread_features\w*):.*\n", re.MULTILINE
)  # fmt: skip
_VSYSCALL = re.compile(rb"^.*\[vsyscall\]\n", re.MULTILINE)
_FDINFO = re.compile(rb"^(?!pos:|flags:|ino:).*\n", re.MULTILINE)


def _told(path: bytes, content: bytes) -> bytes:
    """Leave out of a live file what memory does not tell."""
    if path.endswith(b"/status"):
        return _LEFT_OUT.sub(b"", content)
    if path.endswith(b"/maps"):
        return _VSYSCALL.sub(b"", content)
    return _FDINFO.sub(b"", content) if b"/fdinfo/" in path else content


def test_resting_processes_show_the_same_bytes(seen: Seen) -> None:
    resting = set(seen.resting())
    names = {seen.ours[pid + b"/comm"].content for pid in resting}
    assert len(resting) >= 40
    assert {b"sleep\n", b"odd) name\n\n", b"nginx\n", b"sshd\n", b"kthreadd\n"} <= names
    zombies = {pid for pid in resting if b") Z " in seen.ours[pid + b"/stat"].content}
    wrong = {}
    for path in sorted(seen.live.keys() | seen.ours.keys()):
        pid = path.partition(b"/")[0]
        if pid not in resting or path.endswith(b"/task") or path.startswith(b"1/net"):
            continue
        if pid in zombies and b"/ns" in path:  # it has no namespaces but those of its pid
            continue
        ours, live = seen.ours.get(path), seen.live.get(path)
        if live is not None:
            live = dataclasses.replace(live, content=_told(path, live.content))
        if ours != live:
            wrong[path] = (ours, live)
    assert wrong == {}, sorted(wrong)


def test_children_stand_in_the_order_in_which_they_came(seen: Seen) -> None:
    (ours,) = (node.content for path, node in seen.ours.items()
               if path.endswith(b"/children") and b" 30000 " in node.content)  # fmt: skip
    assert ours.endswith(b" 30000 20000 ")


def test_prepared_processes_are_told_apart(seen: Seen) -> None:
    """The comparison is worth something: what was prepared is there in our own files."""
    limits = b"".join(n.content for path, n in seen.ours.items() if path.endswith(b"/limits"))
    assert b"Max open files            321                  654" in limits
    status = b"".join(n.content for path, n in seen.ours.items() if path.endswith(b"/status"))
    for line in (b"NoNewPrivs:\t1", b"Seccomp:\t2", b"Uid:\t65534\t65534\t65534\t65534",
                 b"Umask:\t0027", b"CapBnd:\t0000000000000001", b"State:\tZ (zombie)"):  # fmt: skip
        assert line in status
    values = {n.content for path, n in seen.ours.items() if path.endswith(b"/oom_score_adj")}
    assert {b"-321\n", b"0\n"} <= values
    tables = {n.content for path, n in seen.ours.items() if path.endswith(b"/mountinfo")}
    assert len(tables) > 1  # a private /tmp
    maps = {n.content for path, n in seen.ours.items() if path.endswith(b"/uid_map")}
    assert len(maps) > 1


# --- the system ---


@pytest.mark.parametrize(
    "name", ["version", "cmdline", "filesystems", "devices", "misc", "cpuinfo", "partitions",
             "swaps", "locks", "mounts", "net"],
)  # fmt: skip
def test_file_of_the_system(seen: Seen, name: str) -> None:
    assert seen.ours[name.encode()] == seen.live[name.encode()]


def test_modules(seen: Seen) -> None:
    live = re.sub(rb"0x[0-9a-f]{16}", b"0x0000000000000000", seen.live[b"modules"].content)
    assert seen.ours[b"modules"].content == live


def test_figures_that_move_are_close(seen: Seen) -> None:
    """The guest has run for some seconds since, and asking takes memory."""
    ours, live = _figures(seen.ours[b"meminfo"].content), _figures(seen.live[b"meminfo"].content)
    assert ours.keys() <= live.keys()
    assert [name for name in live if name in ours] == [*ours]
    far = {name: (ours[name], live[name]) for name in ours
           if abs(ours[name] - live[name]) > max(live["MemTotal"] // 50, 64)}  # fmt: skip
    assert far == {}
    for name in ("MemTotal", "SwapTotal", "CommitLimit", "VmallocTotal"):
        assert ours[name] == live[name]
    stat_ours, stat_live = _stat(seen.ours[b"stat"].content), _stat(seen.live[b"stat"].content)
    assert stat_ours.keys() == stat_live.keys()
    assert stat_ours["btime"] == stat_live["btime"]
    for name in ("cpu", "cpu0", "ctxt", "processes", "softirq", "intr"):
        before, after = stat_ours[name], stat_live[name]
        assert before <= after <= before + max(before // 4, 2000), name
    up = [float(seen_at[b"uptime"].content.split()[0]) for seen_at in (seen.ours, seen.live)]
    assert up[0] <= up[1] <= up[0] + 120


def _figures(text: bytes) -> dict[str, int]:
    lines = (line.split() for line in text.decode().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


def _stat(text: bytes) -> dict[str, int]:
    lines = (line.split() for line in text.decode().splitlines())
    return {
        words[0]: sum(map(int, words[1:])) if words[0].startswith("cpu") else int(words[1])
        for words in lines
    }


@pytest.mark.parametrize("name", ["tcp", "tcp6", "udp", "udp6"])
def test_sockets(seen: Seen, name: str) -> None:
    ours, live = (_sockets(nodes[f"1/net/{name}".encode()].content)
                  for nodes in (seen.ours, seen.live))  # fmt: skip
    assert ours == live


def _sockets(text: bytes) -> set[tuple[bytes, ...]]:
    """Address, state, owner and inode of those that listen or are bound."""
    rows = (line.split() for line in text.splitlines()[1:])
    return {(row[1], row[3], row[7], row[9]) for row in rows if row[3] in (b"0A", b"07")}


# --- programs ---

_ALIKE = ("pgrep", "findmnt", "mount", "swapon", "sockets", "lslocks", "sysctl", "uptime", "uname")


@pytest.mark.parametrize("name", _ALIKE)
def test_program_prints_what_it_prints_in_the_guest(seen: Seen, name: str) -> None:
    ours, live = seen.commands[name]
    assert ours == live
    assert ours.strip()


def test_free(seen: Seen) -> None:
    ours, live = (
        [int(word) for word in re.findall(r"\d+", text)] for text in seen.commands["free"]
    )
    assert ours[0] == live[0]
    assert abs(ours[1] - live[1]) < live[0] // 50


@pytest.mark.parametrize("name", ["ps", "threads", "security"])
def test_ps_lists_the_same_processes(seen: Seen, name: str) -> None:
    """Kernel workers change their names, the agent forks, and systemd-journald wakes up."""
    resting = {int(pid) for pid in seen.resting()}
    ours, live = ({int(line.split()[0]): line for line in text.splitlines()[1:]}
                  for text in seen.commands[name])  # fmt: skip
    still = {pid for pid in resting if pid in live and "kworker" not in live[pid]
             and "writeback" not in live[pid]}  # fmt: skip
    assert len(still) >= 30
    assert {pid: ours.get(pid) for pid in still} == {pid: live[pid] for pid in still}
    extra = [line for pid, line in ours.items() if pid not in live and pid < 4_000_000]
    assert all("kworker" in line for line in extra)
    assert any(pid >= 4_000_000 for pid in ours)


def test_only_values_of_sysctl_are_not_told(seen: Seen) -> None:
    assert {line for line in seen.left_out if not line.startswith("/proc/sys/")} == set()
