"""Facts out of a /proc: this machine's own, held against what its kernel answers to calls."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

import pytest

from ouassister import codec
from ouassister.errors import InternalError
from ouassister.model import Uts
from ouassister.shadow.syscalls.facts import GuestFacts
from ouassister.shadow.syscalls.proc_facts import read_facts

UTS: Final = Uts("Linux", "web1", "6.1.0", "#1", "x86_64", "(none)")
STAT: Final = b"571 (a) b (c) S 1 570 569 0 -1 4194560 " + b"0 " * 8 + b"15 -5 1 0 " + b"0 " * 18
SMALL: Final = {
    b"571/stat": STAT + b"7 2 0 0 0\n",
    b"571/status": b"Name:\tx\nUid:\t33\t34\t35\t36\n",
}


def own() -> dict[bytes, bytes]:
    """What /proc says of this process and of the machine."""
    pid = os.getpid()
    names = ["stat", "meminfo", "uptime", "loadavg", "1/mounts"]
    names += [f"{pid}/{name}" for name in ("stat", "status", "limits")]
    names.append(f"{pid}/task/{pid}/stat")  # others may end meanwhile
    return {name.encode(): Path("/proc", name).read_bytes() for name in names}


def test_own_facts_are_what_the_kernel_answers() -> None:
    pid = os.getpid()
    files = own()
    facts = read_facts(files, UTS)
    (process,) = facts.processes
    assert process.pid == pid
    assert (process.uid, process.suid) == os.getresuid()[::2]
    assert process.nice == os.getpriority(os.PRIO_PROCESS, pid)
    assert process.policy == os.sched_getscheduler(pid)
    assert process.priority == os.sched_getparam(pid).sched_priority
    assert (process.group, process.session) == (os.getpgid(pid), os.getsid(pid))
    assert process.threads == (pid,)
    infinity = resource.RLIM_INFINITY
    for number, (soft, hard) in enumerate(process.limits):
        told = tuple(
            (1 << 64) - 1 if one == infinity else one for one in resource.prlimit(pid, number)
        )
        assert (soft, hard) == told, number
    assert len(process.limits) == 16
    assert facts.cpus == os.cpu_count()
    assert facts.memory is not None
    assert facts.memory.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert abs(facts.loads[1] / 65536 - os.getloadavg()[1]) < 0.5
    assert facts.uptime_s > 0
    assert facts.threads > 1


def test_facts_travel_as_json() -> None:
    facts = read_facts(own(), UTS)
    assert codec.from_value(GuestFacts, codec.to_value(facts)) == facts


def test_a_name_may_contain_anything() -> None:
    (process,) = read_facts(SMALL, UTS).processes
    assert process.comm == b"a) b (c"
    assert (process.nice, process.priority, process.policy) == (-5, 7, 2)
    assert (process.uid, process.suid, process.group, process.session) == (33, 35, 570, 569)
    assert (process.threads, process.limits) == ((571,), ())


def test_pids_end_above_threads_and_groups() -> None:
    assert read_facts(SMALL, UTS).pids_end == 572
    assert GuestFacts(UTS).pids_end is None


def test_what_is_missing_is_not_known() -> None:
    assert read_facts({}, UTS) == GuestFacts(UTS)


def test_mounts_are_told_as_they_are_named() -> None:
    mounts = b"/dev/vda1 / ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\n/dev/vdb /a\\040b xfs rw 0 0\n"
    assert read_facts({b"1/mounts": mounts}, UTS).mounted == (b"/", b"/a b")


@pytest.mark.parametrize(
    "files",
    [
        {b"5/stat": b"nonsense"},
        {b"5/stat": b"5 (x) S 1 2"},
        {b"571/stat": SMALL[b"571/stat"]},
        SMALL | {b"571/status": b"Uid:\tx\n"},
        {b"meminfo": b"MemTotal: 1 kB\n"},
        {b"uptime": b"\n"},
        {b"uptime": b"inf 0\n"},
        {b"loadavg": b"0.1 x 0 1/2 3\n"},
        {b"loadavg": b"0.1 0.1\n"},
        {b"1/mounts": b"/dev/vda1\n"},
    ],
    ids=range(10),
)
def test_what_the_kernel_does_not_print_is_refused(files: dict[bytes, bytes]) -> None:
    with pytest.raises(InternalError, match="is not as the kernel prints it"):
        read_facts(files, UTS)
