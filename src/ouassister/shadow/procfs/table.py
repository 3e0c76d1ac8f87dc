"""The support table of /proc: what a shadow shows, in part or not at all, each with its reason.

What stands in no row is not there (ENOENT), as what this kernel does not tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Shown(StrEnum):
    """How a file is shown."""

    FULL = "full"
    PARTIAL = "partial"
    OWN = "own"  # the kernel's, of the shadow's own processes
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Row:
    """One file or folder; ``PID`` stands for a process of the guest, ``OWN`` for another one."""

    name: str
    shown: Shown
    note: str


_AT_SUSPENSION: Final = "as of the suspension"
_COUNTERS: Final = "counters of the kernel that are not read from memory"

TABLE: Final[tuple[Row, ...]] = (
    Row("PID/stat, statm, comm, limits, cgroup, loginuid, sessionid, oom_score_adj", Shown.FULL,
        "as root reads it"),
    Row("PID/uid_map, gid_map, auxv, mounts, mountinfo, cwd, root, exe, task/TID", Shown.FULL, ""),
    Row("PID/status", Shown.PARTIAL,
        "without HugetlbPages, CoreDumping, THP_enabled, Speculation_*, x86_Thread_features; "
        "NSpgid and NSsid of the first pid namespace alone"),
    Row("PID/cmdline, environ", Shown.PARTIAL, "absent or empty where a page of it is swapped out"),
    Row("PID/maps", Shown.PARTIAL, "without the page [vsyscall]"),
    Row("PID/fd", Shown.PARTIAL,
        "a path leads to that file; a socket or pipe has type and number, and cannot be opened"),
    Row("PID/fdinfo", Shown.PARTIAL, "pos, flags and ino; no mnt_id, no lines of special files"),
    Row("PID/ns", Shown.PARTIAL,
        "text and number, for readlink(2) and stat(2); they cannot be entered; a zombie has none"),
    Row("PID/attr", Shown.ABSENT, "labels of security modules are not read from memory"),
    Row("PID/mem, pagemap, smaps, io, sched, wchan, syscall, stack", Shown.ABSENT,
        "a sleeping process is not to be looked into by programs of its own guest"),
    Row("PID/net", Shown.PARTIAL, "of the first process: tcp, tcp6, udp, udp6, unix"),
    Row("OWN/*", Shown.OWN, "links into the real procfs of the shadow's pid namespace"),
    Row("OWN/exe, cwd, root", Shown.OWN,
        "as links with the same text; that of a deleted file leads to it by another name"),
    Row("OWN/mounts, mountinfo, net", Shown.PARTIAL, "those of the guest's first process"),
    Row("self, thread-self", Shown.OWN, ""),
    Row("version, cmdline, filesystems, cpuinfo, devices, misc, partitions, swaps", Shown.FULL, ""),
    Row("locks", Shown.PARTIAL, "who holds a lock, not who waits for it"),
    Row("modules", Shown.PARTIAL, "addresses are zero, as for others than root"),
    Row("uptime, loadavg", Shown.FULL, _AT_SUSPENSION),
    Row("stat", Shown.PARTIAL, f"{_AT_SUSPENSION}; of interrupts the sum alone"),
    Row("meminfo", Shown.PARTIAL, "without huge pages, zswap and DirectMap"),
    Row("net/tcp, tcp6, udp, udp6, unix", Shown.PARTIAL,
        "listening and bound sockets, up to the column of the inode"),
    Row("net/dev, route, arp, if_inet6, snmp, netstat", Shown.ABSENT, _COUNTERS),
    Row("sys/**", Shown.PARTIAL,
        "values that are stored; those that a function computes are absent. A value that is "
        "written reads back and is recorded"),
    Row("tty/drivers", Shown.ABSENT, "ps tells a terminal by its node in /dev alone"),
    Row("diskstats, interrupts, softirqs, vmstat, zoneinfo, slabinfo, schedstat", Shown.ABSENT,
        _COUNTERS),
    Row("kallsyms, kcore, kmsg, kpage*, iomem, ioports, sysrq-trigger, keys", Shown.ABSENT,
        "would tell of the host or act on it"),
)  # fmt: skip
