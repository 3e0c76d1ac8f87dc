"""The shadow's /proc, mounted: own processes are the real ones, the guest's what was rendered."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from tests.host import procfs_rig

from ouassister.shadow.procfs import snapshot
from ouassister.shadow.procfs.snapshot import Tree

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.host, pytest.mark.timeout(120)]

GUEST_STAT = (
    b"7 (guest) S 1 7 7 0 -1 4194560 0 0 0 0 1 2 0 0 20 0 1 0 100 4096 1 18446744073709551615 "
)
GUEST_STAT += b" ".join([b"0"] * 27) + b"\n"
GUEST_STATUS = (
    b"Name:\tguest\nState:\tS (sleeping)\nTgid:\t7\nPid:\t7\nPPid:\t1\nUid:\t33\t33\t33\t33\n"
)
GUEST_STATUS += b"Gid:\t33\t33\t33\t33\nThreads:\t1\n"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    tree = Tree()
    tree.link(b"net", b"self/net")
    tree.link(b"mounts", b"self/mounts")
    tree.file(b"version", b"Linux version guest\n")
    tree.file(b"filesystems", b"nodev\tproc\n")
    tree.file(b"stat", b"cpu  1 2 3 4 5 6 7 8 9 10\nbtime 1795377217\n")
    tree.file(b"uptime", b"47.50 1.97\n")
    tree.file(b"meminfo", b"MemTotal:         480272 kB\nMemFree:          373828 kB\n")
    tree.folder(b"sys")
    tree.folder(b"sys/kernel")
    tree.file(b"sys/kernel/odd", b"1\n", 0o644)
    for pid in (b"1", b"7"):
        owner = (0, 0) if pid == b"1" else (33, 33)
        tree.folder(pid, owner=owner)
        tree.file(pid + b"/stat", GUEST_STAT.replace(b"7 (", pid + b" ("), owner=owner)
        tree.file(pid + b"/status", GUEST_STATUS, owner=owner)
        tree.file(pid + b"/cmdline", b"/usr/bin/guest\0-x\0", owner=owner)
        tree.file(pid + b"/environ", b"A=b\0", 0o400, owner)
        tree.link(pid + b"/exe", b"/usr/bin/env", owner=owner)
        tree.file(pid + b"/mounts", b"/dev/vda1 / ext4 rw 0 0\n", owner=owner)
        tree.file(pid + b"/mountinfo", b"27 1 254:1 / / rw - ext4 /dev/vda1 rw\n", owner=owner)
        tree.folder(pid + b"/net")
        tree.file(pid + b"/net/tcp", b"the guest's\n")
    path = tmp_path / "snapshot"
    snapshot.write(path, tree)
    return path


def told(made: Path, script: str) -> str:
    done, _ = procfs_rig.run(made, script)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_guest_and_own_processes_stand_side_by_side(made: Path) -> None:
    names = told(made, "ls /proc").split()
    assert {"1", "7", "self", "thread-self", "version", "sys"} <= set(names)
    pids = sorted(int(name) for name in names if name.isdecimal())
    assert pids[:2] == [1, 7]
    assert len(pids) >= 3
    assert all(pid >= 4_000_000 for pid in pids[2:])
    assert ".own" not in names


def test_ps_shows_both(made: Path) -> None:
    rows = told(made, "ps -eo pid,ppid,uid,comm,args --no-headers").splitlines()
    assert [row.split() for row in rows][1] == ["7", "1", "33", "guest", "/usr/bin/guest", "-x"]
    assert any(re.match(r"40000\d\d +\d+ +0 ps +ps -eo", row) for row in rows)


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("readlink /proc/self | grep -c '^40000[0-9]*$'", "1\n"),
        ("basename $(readlink /proc/self/exe)", "readlink\n"),
        ("cd /usr/share && readlink /proc/self/cwd", "/usr/share\n"),
        ("echo piped | cat /dev/stdin /proc/self/fd/0 -", "piped\n"),
        ("exec 9<<.\nhere\n.\ncat /proc/self/fd/9", "here\n"),
        ("exec 8>&1; echo reopened >/proc/self/fd/8", "reopened\n"),
        ("cat /proc/thread-self/comm", "cat\n"),
        ("echo 321 >/proc/self/oom_score_adj && cat /proc/self/oom_score_adj", "321\n"),
        ("unshare -Ur cat /proc/self/uid_map | tr -s ' '", " 0 0 1\n"),
        ("cp /bin/true /tmp/oua-gone; sh -c 'exec 7</tmp/oua-gone; rm /tmp/oua-gone; "
         "head -c 4 /proc/self/fd/7 | tail -c 3'", "ELF"),
        ("exec 2>&-; sleep 5 & pid=$!; kill $pid; wait $pid; test -e /proc/$pid/stat || echo gone",
         "gone\n"),
        ("grep -c . /proc/self/status >/dev/null && stat -c %u /proc/7 /proc/self/", "33\n0\n"),
    ],
)  # fmt: skip
def test_own_process_behaves_as_ever(made: Path, script: str, answer: str) -> None:
    assert told(made, script) == answer


def test_mounts_and_network_are_the_guests(made: Path) -> None:
    assert told(made, "cat /proc/mounts /proc/self/mounts") == "/dev/vda1 / ext4 rw 0 0\n" * 2
    assert told(made, "findmnt -n -o SOURCE,FSTYPE /") == "/dev/vda1 ext4\n"
    assert told(made, "cat /proc/net/tcp /proc/self/net/tcp") == "the guest's\n" * 2


def test_values_are_taken_in_order_and_told(made: Path) -> None:
    script = "echo 3 >/proc/sys/kernel/odd; sysctl -qw kernel.odd=5; cat /proc/sys/kernel/odd"
    before = (
        os.stat("/proc/sys/kernel/odd") if os.path.exists("/proc/sys/kernel/odd") else None  # noqa: PTH110, PTH116
    )
    done, writes = procfs_rig.run(made, script)
    assert (done.stdout, done.stderr) == ("5\n", "")
    assert writes == ["kernel/odd=3", "kernel/odd=5"]
    assert before is None  # no such value on the host: nothing could have reached it


@pytest.mark.parametrize(
    "script",
    [
        "echo x >/proc/meminfo",
        "echo x >/proc/7/stat",
        "mkdir /proc/new",
        "rm /proc/version",
        "cat /proc/kcore",
        "cat /proc/kallsyms",
        "echo b >/proc/sysrq-trigger",
        "cat /proc/.own/kallsyms",
        "echo 1 >/proc/.own/sysrq-trigger",
        "cat /proc/.own/sys/kernel/hostname",
        "cat /proc/1/mem",
        "ls /proc/7/root/",
    ],
)
def test_host_is_out_of_reach(made: Path, script: str) -> None:
    done, _ = procfs_rig.run(made, script)
    assert done.returncode != 0
    assert done.stdout == ""


def test_environment_of_guest_is_roots_alone(made: Path) -> None:
    done, _ = procfs_rig.run(made, "setpriv --reuid=65534 --clear-groups cat /proc/7/environ")
    assert "Permission denied" in done.stderr


def test_many_programs_at_once(made: Path) -> None:
    script = """
    for round in $(seq 40); do
        (ps -e >/dev/null; cat /proc/self/stat /proc/version /proc/filesystems | tail -1) &
    done; wait"""
    assert told(made, script) == "nodev\tproc\n" * 40


def test_user_namespace_is_enough(made: Path) -> None:
    """Root of a user namespace may mount it; that is what a shadow is."""
    script = "cat /proc/version; cat /proc/self/uid_map | tr -s ' '; readlink /proc/self/exe"
    done, _ = procfs_rig.run(made, script, before=("unshare", "--user", "--map-root-user"))
    assert done.stderr == ""
    assert done.stdout.splitlines()[:2] == ["Linux version guest", " 0 0 1"]


def test_damaged_snapshot_starts_nothing(made: Path) -> None:
    made.write_bytes(made.read_bytes()[:-1])
    done, _ = procfs_rig.run(made, "echo started", timeout_s=30)
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert "the snapshot of /proc is cut short" in done.stderr
