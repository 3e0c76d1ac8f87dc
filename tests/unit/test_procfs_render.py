"""Files of /proc from records: the bytes that Linux 6.1 wrote for the same values."""

from __future__ import annotations

import dataclasses

import pytest

from ouassister.guest_model import (
    BlockDevice,
    Cgroup,
    GuestPid,
    HeldLock,
    Module,
    OpenFile,
    Socket,
    SwapArea,
    VirtAddr,
    Vma,
)
from ouassister.kernel.memory_stat import MemoryStat
from ouassister.kernel.mount_lines import MountLine
from ouassister.kernel.system_stat import Activity, CpuTime
from ouassister.kernel.task_stat import IdMap, TaskStat, ThreadStat
from ouassister.model import Mount
from ouassister.shadow.procfs import network, process, system

EVER = (1 << 64) - 1
THREAD = ThreadStat(
    pid=GuestPid(355), comm=b"odd) na\\me", state="S", parent=GuestPid(354), tracer=GuestPid(0),
    flags=0x400140, exit_signal=17, exit_code=0, minor_faults=61, major_faults=2, user_ns=0,
    system_ns=0, guest_ns=0, run_ns=0, start_ns=36_470_000_000, priority=20, nice=0, rt_priority=0,
    policy=0, cpu=1, voluntary=3, involuntary=4, pending=0, blocked=1 << 33, uids=(33, 33, 33, 33),
    gids=(33, 33, 33, 33), capabilities=(0, 0, 0, 0x1FFFFFFFFFF, 0), no_new_privs=True, seccomp=2,
    seccomp_filters=5, cpus_allowed=(1 << 8192) - 1, mems_allowed=1, loginuid=0xFFFFFFFF,
    sessionid=0xFFFFFFFF, adjusted_ns=(20_000_000, 30_000_000),
)  # fmt: skip
MEMORY = MemoryStat(
    total=2799, peak=2800, locked=0, pinned=0, resident_peak=900, anonymous=500, file=580, shared=3,
    swapped=1, data=400, stack=33, executable=1100, page_tables=57344,
    code=(0x5585A6E44000, 0x5585A6F2A1D5), data_range=(1, 2), start_brk=3, start_stack=4,
    arguments=(5, 6), environment=(7, 8), auxv=b"", dumpable=True,
)  # fmt: skip
TASK = TaskStat(
    threads=(THREAD,), pids=(355,), process_group=354, session=354, tty=34816, foreground=355,
    minor_faults=61, major_faults=2, child_minor_faults=7, child_major_faults=8,
    adjusted_ns=(20_000_000, 30_000_000), child_ns=(10_000_000, 0), guest_ns=0, child_guest_ns=0,
    shared_pending=0, ignored=0x40001000, caught=0x98016A07, queued=1,
    limits=((EVER, EVER),) * 11 + ((1784, 1784), (819200, 819200), (0, 0), (0, 0), (EVER, EVER)),
    oom_score_adj=0, fd_size=64, umask=0o22, for_children=(0, 0), memory=MEMORY,
    uid_map=(), gid_map=(),
)  # fmt: skip


def test_stat() -> None:
    assert process.stat(TASK) == (
        b"355 (odd) na\\me) S 354 354 354 34816 355 4194624 61 7 2 8 2 3 1 0 20 0 1 0 3647 "
        b"11464704 1083 18446744073709551615 94032518987776 94032519930325 4 0 0 0 0 1073745920 "
        b"402745863 1 0 0 17 1 0 0 0 0 0 1 2 3 5 6 7 8 0\n"
    )


def test_stat_of_one_thread_has_its_own_figures() -> None:
    other = dataclasses.replace(THREAD, pid=GuestPid(356), minor_faults=1, adjusted_ns=(0, 0))
    task = dataclasses.replace(TASK, threads=(THREAD, other), minor_faults=99)
    words = process.stat(task, other).rpartition(b") ")[2].split()
    assert process.stat(task, other).startswith(b"356 (")
    assert words[7:15] == [b"1", b"7", b"2", b"8", b"0", b"0", b"1", b"0"]
    assert words[17] == b"2"  # threads
    assert process.stat(task).rpartition(b") ")[2].split()[32] == b"0"  # wchan of a group: untold


def test_status() -> None:
    lines = process.status(TASK, (4, 33), 2).decode().splitlines()
    assert lines[:12] == [
        "Name:\todd) na\\\\me", "Umask:\t0022", "State:\tS (sleeping)", "Tgid:\t355", "Ngid:\t0",
        "Pid:\t355", "PPid:\t354", "TracerPid:\t0", "Uid:\t33\t33\t33\t33",
        "Gid:\t33\t33\t33\t33", "FDSize:\t64", "Groups:\t4 33 ",
    ]  # fmt: skip
    for line in ("VmPeak:\t   11200 kB", "VmRSS:\t    4332 kB", "VmHWM:\t    4332 kB",
                 "VmExe:\t     924 kB", "VmLib:\t    3476 kB", "VmPTE:\t      56 kB",
                 "SigQ:\t1/1784", "SigIgn:\t0000000040001000", "CapBnd:\t000001ffffffffff",
                 "NoNewPrivs:\t1", "Seccomp_filters:\t5", "Cpus_allowed:\t3",
                 "Cpus_allowed_list:\t0-1", "Mems_allowed_list:\t0",
                 "nonvoluntary_ctxt_switches:\t4"):  # fmt: skip
        assert line in lines


def test_status_of_kernel_thread_has_no_memory() -> None:
    text = process.status(dataclasses.replace(TASK, memory=None, queued=None), (), 2)
    assert b"Vm" not in text
    assert b"SigQ" not in text
    assert b"\nGroups:\t \n" in text
    assert process.statm(None) == b"0 0 0 0 0 0 0\n"


def test_statm() -> None:
    assert process.statm(MEMORY) == b"2799 1083 583 231 0 433 0\n"


def test_limits() -> None:
    lines = process.limits(TASK.limits).decode().splitlines()
    assert (
        lines[0] == "Limit                     Soft Limit           Hard Limit           Units     "
    )
    assert (
        lines[1] == "Max cpu time              unlimited            unlimited            seconds   "
    )
    assert lines[14] == "Max nice priority         0                    0                    "
    assert len(lines) == 17


def test_maps() -> None:
    named = Vma(VirtAddr(0x5585A6E22000), VirtAddr(0x5585A6E44000), "r--p", 0, 254, 1, 1234,
                b"/usr/sbin/odd\nname")  # fmt: skip
    plain = Vma(VirtAddr(0x7F0000000000), VirtAddr(0x7F0000001000), "rw-p", 0, 0, 0, 0, b"")
    assert process.maps((named, plain)) == (
        b"5585a6e22000-5585a6e44000 r--p 00000000 fe:01 1234                       "
        b"/usr/sbin/odd\\012name\n"
        b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n"
    )


def mount(**changes: object) -> MountLine:
    values: dict[str, object] = {
        "source": b"/dev/vda1", "target": b"/", "fstype": "ext4", "major": 254, "minor": 1,
        "read_only": False, "number": 27, "parent": 1, **changes,
    }  # fmt: skip
    return MountLine(Mount(**values), ("rw", "relatime"), ("shared:1",),  # type: ignore[arg-type]
                     ("rw", "errors=remount-ro"), 1, told=True)  # fmt: skip


def test_mountinfo() -> None:
    assert process.mountinfo([mount()]) == (
        b"27 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro\n"
    )
    assert b" /a\\040b\\134c " in process.mountinfo([mount(target=b"/a b\\c")])


def test_mounts_is_read_only_where_mount_or_file_system_is() -> None:
    assert process.mounts([mount()]) == b"/dev/vda1 / ext4 rw,relatime,errors=remount-ro 0 0\n"
    of_super = dataclasses.replace(mount(), super_options=("ro", "sync", "x=1"), flags=2)
    assert process.mounts([of_super]) == b"/dev/vda1 / ext4 ro,sync,relatime,x=1 0 0\n"


def test_small_files_of_a_process() -> None:
    file = OpenFile(3, b"/x", 0o2100002, readable=True, writable=True, position=12, major=0,
                    minor=1, inode=7, mode=0, deleted=False)  # fmt: skip
    assert process.fdinfo(file) == b"pos:\t12\nflags:\t02100002\nino:\t7\n"
    assert process.cgroup((Cgroup(0, "", b"/init.scope"),)) == b"0::/init.scope\n"
    assert process.id_map((IdMap(0, 0, EVER >> 32),)) == b"         0          0 4294967295\n"


@pytest.mark.parametrize(("bits", "width", "text"), [
    (1, 1, "1"), (3, 2, "3"), (0xF, 4, "f"), (1, 64, "00000000,00000001"),
    (1 << 33, 40, "02,00000000"), ((1 << 100) - 1, 5, "1f"),
])  # fmt: skip
def test_mask(bits: int, width: int, text: str) -> None:
    assert process.mask(bits, width) == text


def test_ranges() -> None:
    assert process.ranges(0) == ""
    assert process.ranges(0b1_0000_0111) == "0-2,8"


# --- the system ---

ACTIVITY = Activity(interrupts=1511, context_switches=27367, forks=365, running=2, blocked=0,
                    softirqs=(0, 6385, 1, 14, 0, 0, 1, 0, 0, 12554), load=(5911, 1566, 531),
                    threads=70, last_pid=365)  # fmt: skip


def test_stat_of_system() -> None:
    times = tuple(number * 10_000_000 for number in range(1, 11))
    text = system.stat((CpuTime(0, times), CpuTime(2, times)), ACTIVITY, 1795377217).decode()
    assert text == (
        "cpu  2 4 6 8 10 12 14 16 18 20\ncpu0 1 2 3 4 5 6 7 8 9 10\ncpu2 1 2 3 4 5 6 7 8 9 10\n"
        "intr 1511\nctxt 27367\nbtime 1795377217\nprocesses 365\nprocs_running 2\n"
        "procs_blocked 0\nsoftirq 18955 0 6385 1 14 0 0 1 0 0 12554\n"
    )


def test_stat_without_what_is_not_told() -> None:
    quiet = dataclasses.replace(ACTIVITY, interrupts=None)
    assert b"intr" not in system.stat((CpuTime(0, (0,) * 10),), quiet, 0)


def test_loadavg_and_uptime() -> None:
    assert system.loadavg(ACTIVITY) == b"2.89 0.76 0.26 2/70 365\n"
    assert system.uptime(47_509_999_999, 1_970_000_000) == b"47.50 1.97\n"


def test_meminfo() -> None:
    text = system.meminfo({"MemTotal": 480272, "VmallocTotal": 34359738367})
    assert text == b"MemTotal:         480272 kB\nVmallocTotal:   34359738367 kB\n"


def test_lists_of_the_system() -> None:
    assert system.filesystems(((b"proc", False), (b"ext4", True))) == b"nodev\tproc\n\text4\n"
    assert system.devices(((1, b"mem"), (136, b"pts")), ((254, b"virtblk"),)) == (
        b"Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n254 virtblk\n"
    )
    assert system.misc(((229, b"fuse"),)) == b"229 fuse\n"
    disk = BlockDevice("vda", 254, 0, "vda", 0, 0, 4 << 30, False, "", "", b"")
    assert system.partitions((disk, dataclasses.replace(disk, size=0, name="loop0"))) == (
        b"major minor  #blocks  name\n\n 254        0    4194304 vda\n"
    )


def test_swaps() -> None:
    area = SwapArea(b"/swap file", partition=False, size=16777216 - 4096, used=0, priority=3)
    assert system.swaps((area,)) == (
        b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        b"/swap\\040file" + b" " * 27 + b"file\t\t16380\t\t0\t\t3\n"
    )


def test_modules() -> None:
    live = Module("kvm", 1146880, 1, ("kvm_amd",), "live", 1 << 12 | 1 << 13)
    unformed = dataclasses.replace(live, state="unformed")
    assert system.modules((live, unformed)) == (
        b"kvm 1146880 1 kvm_amd, Live 0x0000000000000000 (OE)\n"
    )


def test_locks() -> None:
    lock = HeldLock("flock", write=True, pid=GuestPid(707), path=b"/x", major=254, minor=1,
                    inode=12, start=0, end=None)  # fmt: skip
    part = dataclasses.replace(lock, kind="posix", write=False, start=5, end=9)
    assert system.locks((lock, part)) == (
        b"1: FLOCK  ADVISORY  WRITE 707 fe:01:12 0 EOF\n2: POSIX  ADVISORY  READ 707 fe:01:12 5 9\n"
    )


def test_sockets() -> None:
    ssh = Socket("tcp", b"127.0.0.1", 22, listening=True, uid=0, inode=13102)
    rows = network.inet("tcp", (ssh, Socket("udp", b"0.0.0.0", 68, False, 0, 1))).splitlines()
    assert len(rows) == 2
    assert {len(row) for row in rows} == {149}
    assert rows[1].split()[1:4] == [b"0100007F:0016", b"00000000:0000", b"0A"]
    assert rows[1].split()[9] == b"13102"
    six = network.inet("tcp6", (Socket("tcp6", b"::1", 80, True, 5, 9),)).splitlines()[1]
    assert six.split()[1] == b"00000000000000000000000001000000:0050"
    unix = network.unix((Socket("unix-stream", b"@a\0b", 0, True, 0, 7),)).splitlines()[1]
    assert unix == b"0000000000000000: 00000000 00000000 00010000 0001 01     7 @a@b"
