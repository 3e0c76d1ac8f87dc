"""System calls in a shadow: real programs under the real filter, answered by the real handlers.

Probes make them straight from the command line, as 64-bit and as 32-bit programs without a C
library. `test_syscalls_kept.py` has what is kept away from the host.
"""

from __future__ import annotations

import errno
import stat
import struct
from typing import TYPE_CHECKING

import pytest
from tests.host.syscall_rig import BOTH, FACTS, NGINX, OWN, PACKAGE, SHELL, UTS, Rig, opened, words

from ouassister.shadow.syscalls.facts import GuestFacts
from ouassister.shadow.syscalls.uts import pack_utsname

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with opened() as found:
        yield found


# --- from the guest's kernel ---


@BOTH
def test_uname_tells_the_guest(rig: Rig, bits: int) -> None:
    outcome = rig.calls("uname:b390", "uname:0", "uname:-1", bits=bits)
    assert outcome.results == [0, -errno.EFAULT, -errno.EFAULT]
    assert outcome.buffer(0) == pack_utsname(UTS)
    assert outcome.records == []


def test_uname_of_a_32_bit_personality_tells_a_32_bit_machine(rig: Rig) -> None:
    outcome = rig.calls("personality:8", "uname:b390")
    assert outcome.buffer(1)[4 * 65 :].startswith(b"i686\0")


@BOTH
def test_names_that_are_set_are_recorded_and_told(rig: Rig, bits: int) -> None:
    outcome = rig.calls(
        "sethostname:sweb2,4",
        "setdomainname:sexample,7",
        "sethostname:sweb2,65",
        "sethostname:0,4",
        "uname:b390",
        bits=bits,
        environment=PACKAGE,
    )
    assert outcome.results == [0, 0, -errno.EINVAL, -errno.EFAULT, 0]
    fields = [outcome.buffer(4)[at : at + 65].rstrip(b"\0") for at in range(0, 390, 65)]
    assert (fields[1], fields[5]) == (b"web2", b"example")
    assert outcome.told("kind", "name", "args", "package", "program") == [
        ("syscall", "sethostname", ["web2"], "postfix", f"probe{bits}"),
        ("syscall", "setdomainname", ["example"], "postfix", f"probe{bits}"),
    ]


def test_sysinfo_tells_the_guest(rig: Rig) -> None:
    outcome = rig.calls("sysinfo:b112")
    assert outcome.results == [0]
    found = struct.unpack("<q9QHxx4x2QI4x", outcome.buffer(0))
    memory = FACTS.memory
    assert memory is not None
    assert found[:4] == (123456, 65536, 32768, 16384)
    assert found[4:8] == (memory.total, memory.free, memory.shared, memory.buffers)
    assert found[8:] == (memory.swap_total, memory.swap_free, 99, 0, 0, 1)


def test_sysinfo_of_32_bits_counts_pages_where_bytes_do_not_fit(rig: Rig) -> None:
    outcome = rig.calls("sysinfo:b64", bits=32)
    found = struct.unpack("<i9IHxx3I8x", outcome.buffer(0))
    assert found[:4] == (123456, 65536, 32768, 16384)
    assert (found[4], found[5], found[13]) == (8 << 18, 5 << 18, 4096)


@BOTH
def test_the_guest_s_processors_are_told(rig: Rig, bits: int) -> None:
    outcome = rig.calls(
        "sched_getaffinity:0,16,b16",
        "sched_getaffinity:571,8,b8",
        f"sched_getaffinity:{OWN},8,b8",
        "sched_getaffinity:572,8,b8",
        "sched_getaffinity:0,3,b8",
        bits=bits,
    )
    assert outcome.results == [8, 8, 8, -errno.ESRCH, -errno.EINVAL]
    assert outcome.buffer(0) == (7).to_bytes(16, "little")


@BOTH
def test_scheduling_of_a_guest_s_process_is_told(rig: Rig, bits: int) -> None:
    outcome = rig.calls(
        "getpriority:0,571",
        "getpriority:0,572",
        "getpriority:0,0",
        "getpriority:2,571",
        "ioprio_get:1,571",
        "sched_getscheduler:571",
        "sched_getscheduler:0",
        "sched_getparam:571,b4",
        "sched_getattr:571,b48,48,0",
        "sched_getattr:571,b48,40,0",
        "getpgid:571",
        "getsid:571",
        "getsid:801",
        "getsid:572",
        bits=bits,
    )
    esrch, eperm = -errno.ESRCH, -errno.EPERM
    assert outcome.results[:4] == [25, esrch, 20, esrch]
    assert outcome.results[4:10] == [1 << 13 | 3, 2, 0, 0, 0, -errno.EINVAL]
    assert outcome.results[10:] == [570, 569, eperm, esrch]
    assert outcome.buffer(7) == (7).to_bytes(4, "little")
    assert struct.unpack("<IIQiIQQQ", outcome.buffer(8)) == (48, 2, 0, -5, 7, 0, 0, 0)
    assert outcome.records == []


@BOTH
def test_scheduling_of_a_guest_s_process_is_recorded(rig: Rig, bits: int) -> None:
    attributes = "x" + struct.pack("<IIQiIQQQ", 48, 3, 0, 5, 0, 0, 0, 0).hex()
    outcome = rig.calls(
        "setpriority:0,571,30",
        "setpriority:0,572,3",
        "setpriority:0,0,3",
        "ioprio_set:1,571,24576",
        "sched_setscheduler:571,1,x05000000",
        "sched_setparam:571,x06000000",
        f"sched_setattr:571,{attributes},0",
        "sched_setaffinity:571,8,x0500000000000000",
        bits=bits,
    )
    assert outcome.results == [0, -errno.ESRCH, 0, 0, 0, 0, 0, 0]
    assert outcome.told("name", "args", "target") == [
        ("setpriority", [571, 19], "nginx"),
        ("ioprio_set", [571, 24576], "nginx"),
        ("sched_setscheduler", [571, 1, 5], "nginx"),
        ("sched_setparam", [571, 6], "nginx"),
        ("sched_setattr", [571, 3, 5, 0], "nginx"),
        ("sched_setaffinity", [571, "0x5"], "nginx"),
    ]


@BOTH
def test_limits_of_a_guest_s_process_are_told_and_recorded(rig: Rig, bits: int) -> None:
    new = "x" + struct.pack("<QQ", 10, 20).hex()
    outcome = rig.calls(
        "prlimit64:571,7,0,b16",
        f"prlimit64:571,7,{new},0",
        f"prlimit64:571,16,{new},0",
        "prlimit64:801,7,0,b16",
        "prlimit64:0,7,0,b16",
        f"prlimit64:{OWN},7,0,b16",
        bits=bits,
    )
    assert outcome.results == [0, 0, -errno.EINVAL, -errno.EPERM, 0, 0]
    assert struct.unpack("<QQ", outcome.buffer(0)) == NGINX.limits[7]
    assert outcome.buffer(4) == outcome.buffer(5) != outcome.buffer(0)
    assert outcome.told("name", "args") == [("prlimit64", [571, 7, 10, 20])]


# --- signals ---


@BOTH
def test_signals_to_the_guest_are_recorded(rig: Rig, bits: int) -> None:
    queued = "x" + bytes(128).hex()
    outcome = rig.calls(
        "kill:571,0",
        "kill:573,0",  # a thread
        "kill:571,1",
        "kill:-570,15",
        "kill:-1,40",
        "kill:1,10",
        "tkill:573,12",
        "tgkill:571,573,2",
        "tgkill:1,573,2",
        f"rt_sigqueueinfo:571,3,{queued}",
        f"rt_tgsigqueueinfo:571,571,6,{queued}",
        "kill:571,65",
        "kill:572,9",
        "kill:-572,9",
        bits=bits,
    )
    esrch = -errno.ESRCH
    assert outcome.results == [0, 0, 0, 0, 0, 0, 0, 0, esrch, 0, 0, -errno.EINVAL, esrch, esrch]
    assert outcome.told("name", "args", "target") == [
        ("kill", [571, "SIGHUP"], "nginx"),
        ("kill", [-570, "SIGTERM"], "nginx"),
        ("kill", [-1, "40"], "systemd nginx bash"),
        ("kill", [1, "SIGUSR1"], "systemd"),
        ("tkill", [573, "SIGUSR2"], "nginx"),
        ("tgkill", [571, 573, "SIGINT"], "nginx"),
        ("rt_sigqueueinfo", [571, "SIGQUIT"], "nginx"),
        ("rt_tgsigqueueinfo", [571, 571, "SIGABRT"], "nginx"),
    ]


@BOTH
def test_own_processes_get_their_signals(rig: Rig, bits: int) -> None:
    outcome = rig.calls("kill:0,0", f"kill:{OWN},0", f"kill:{OWN + 1},0", bits=bits)
    assert outcome.results == [0, 0, -errno.ESRCH]
    ended = rig.run(["probe64", f"62:{OWN},15"])
    assert (ended.status, ended.records) == (128 + 15, [])


def test_an_owner_may_signal_its_own_alone(rig: Rig) -> None:
    outcome = rig.calls("kill:801,1", "kill:571,1", "kill:-1,1", "pidfd_open:571,0", uid=1000)
    assert outcome.results == [0, -errno.EPERM, 0, 3]
    assert outcome.told("args", "target") == [([801, "SIGHUP"], "bash"), ([-1, "SIGHUP"], "bash")]


@BOTH
def test_descriptors_of_a_guest_s_process_are_of_a_stand_in(rig: Rig, bits: int) -> None:
    outcome = rig.calls(
        "pidfd_open:571,0",
        "pidfd_send_signal:$,15,0,0",
        "pidfd_send_signal:3,0,0,0",
        "poll:x0300000001000000,1,0",
        "pidfd_getfd:3,0,0",
        "pidfd_open:573,0",
        "pidfd_open:572,0",
        "pidfd_open:571,1",
        f"pidfd_open:{OWN},0",
        "pidfd_send_signal:$,0,0,0",
        "pidfd_send_signal:99,0,0,0",
        bits=bits,
    )
    einval, ebadf = -errno.EINVAL, -errno.EBADF
    assert outcome.results[:5] == [3, 0, 0, 0, -errno.EPERM]
    assert outcome.results[5:] == [einval, -errno.ESRCH, einval, 4, 0, ebadf]
    assert outcome.told("name", "args", "target") == [
        ("pidfd_send_signal", [571, "SIGTERM"], "nginx")
    ]


def test_stand_ins_are_few(rig: Rig) -> None:
    processes = tuple(type(SHELL)(type(SHELL.pid)(pid), b"x", 0, 0) for pid in range(100, 200))
    facts = GuestFacts(UTS, processes)
    outcome = rig.calls(*(f"pidfd_open:{pid},0" for pid in range(100, 170)), facts=facts)
    assert outcome.results == [*range(3, 67), *[-errno.EMFILE] * 6]


def test_without_high_pids_the_guest_s_processes_are_not_there(rig: Rig) -> None:
    outcome = rig.calls("getpid", "kill:571,0", "uname:b390", high_pids=False)
    assert outcome.results == [2, -errno.ESRCH, 0]


# --- recorded ---


@BOTH
def test_what_changes_the_machine_is_recorded(rig: Rig, bits: int) -> None:
    long = 8 if bits == 64 else 4
    image = "x" + (b"\x7fELF\0license=GPL\0name=dummy\0vermagic=6\0").hex()
    parts = {
        "reboot:0xfee1dead,672274793,0x1234567,0": ["restart"],
        "reboot:0xfee1dead,672274793,0xa1b2c3d4,sfw": ["restart2", "fw"],
        f"init_module:{image},36,snumdummies=2": ["dummy", "numdummies=2"],
        "delete_module:sdummy,0": ["dummy"],
        "swapon:s/swapfile,0": ["/swapfile"],
        "swapoff:s/swapfile": ["/swapfile"],
        "acct:s/var/log/account": ["/var/log/account"],
        "acct:0": [],
        f"settimeofday:{words(5, 6, bits=bits)},0": [5, 6],
        f"clock_settime:0,{words(7, 8, bits=bits)}": [7, 8],
        "adjtimex:x01000000" + "00" * 26 * long: ["0x1"],
        "clock_adjtime:0,x02000000" + "00" * 26 * long: ["0x2"],
        "quotactl:0x80000200,s/dev/vda1,0,0": ["quotaon", "/dev/vda1"],
        "syslog:8,0,1": ["console-level"],
    }
    if bits == 32:
        parts["stime:x09000000"] = [9]
        parts["clock_settime64:0," + words(10, 11)] = [10, 11]
        parts["clock_adjtime64:0,x04000000" + "00" * 26 * 8] = ["0x4"]
    outcome = rig.calls(*parts, bits=bits)
    assert outcome.results == [0] * len(parts)
    assert outcome.told("name", "outcome", "args") == [
        (call.partition(":")[0], "recorded", args) for call, args in parts.items()
    ]


def test_a_module_by_descriptor_is_recorded_with_its_path(rig: Rig) -> None:
    outcome = rig.calls(
        "open:s/bin/probe64,0",
        "finit_module:$,sdebug=1,0",
        "finit_module:9,s,0",
        "quotactl_fd:3,0x80000800,0,0",
    )
    assert outcome.results == [3, 0, -errno.EBADF, 0]
    assert outcome.told("name", "args") == [
        ("finit_module", ["/bin/probe64", "debug=1"]),
        ("quotactl_fd", ["setquota", "/bin/probe64"]),
    ]


@BOTH
def test_what_only_asks_is_not_recorded(rig: Rig, bits: int) -> None:
    outcome = rig.calls(
        "adjtimex:b208",
        "quotactl:0x80000700,s/dev/vda1,0,b72",
        "quotactl:0x80000100,s/dev/vda1,0,0",
        "syslog:1,0,0",
        "reboot:1,2,0x1234567,0",
        "clock_settime:1," + words(7, 8, bits=bits),
        bits=bits,
    )
    assert outcome.results[0] >= 0
    assert outcome.results[1:] == [-errno.ESRCH, 0, 0, -errno.EINVAL, -errno.EINVAL]
    assert outcome.records == []


@BOTH
def test_reading_the_kernel_log_is_denied(rig: Rig, bits: int) -> None:
    outcome = rig.calls("syslog:3,b64,64", "syslog:10,0,0", bits=bits)
    assert outcome.results == [-errno.EPERM] * 2
    assert outcome.told("name", "outcome", "args") == [
        ("syslog", "denied", [3])
    ]  # once for each program


def test_a_user_without_privilege_records_nothing(rig: Rig) -> None:
    calls = (
        "sethostname:sx,1",
        "reboot:0xfee1dead,672274793,0x1234567,0",
        "init_module:x00,1,s",
        "finit_module:1,s,0",
        "delete_module:sdummy,0",
        "swapon:s/swapfile,0",
        "swapoff:s/swapfile",
        "acct:0",
        f"settimeofday:{words(5, 6)},0",
        f"clock_settime:0,{words(7, 8)}",
        "adjtimex:x01000000" + "00" * 204,
        "quotactl:0x80000200,s/dev/vda1,0,0",
        "syslog:8,0,1",
        f"mknod:s/tmp/n,{stat.S_IFCHR | 0o600},0",
        "mount:ssysfs,s/sys,ssysfs,0,0",
        "umount2:s/boot,0",
        "setpriority:0,571,3",
        "prlimit64:571,7,0,b16",
    )
    outcome = rig.calls(*calls, uid=1000)
    assert outcome.results == [-errno.EPERM] * len(calls)
    assert outcome.records == []


@BOTH
def test_proc_is_procfs_whatever_serves_it(rig: Rig, bits: int) -> None:
    proc, native = 0x9FA0, "statfs:s{},b120" if bits == 64 else "statfs64:s{},84,b84"
    descriptor = "fstatfs:$,b120" if bits == 64 else "fstatfs64:$,84,b84"
    told = rig.calls(
        native.format("/proc"),
        native.format("//proc/./"),
        "open:s/proc/self/status,0",
        descriptor,
        native.format("/"),
        native.format("/nothing"),
        bits=bits,
    )
    fields = [struct.unpack_from("<2q" if bits == 64 else "<2I", told.buffer(line)) for line in
              (0, 1, 3)]  # fmt: skip
    assert fields == [(proc, 4096)] * 3
    assert struct.unpack_from("<q" if bits == 64 else "<I", told.buffer(4)) != (proc,)
    assert told.results[-1] == -errno.ENOENT
    name_length = struct.unpack_from("<q" if bits == 64 else "<I", told.buffer(0), 64 if bits == 64
                                     else 56)  # fmt: skip
    assert name_length == (255,)


def test_old_structure_of_32_bits_is_filled_and_another_size_is_refused(rig: Rig) -> None:
    told = rig.calls("statfs:s/proc,b64", "statfs64:s/proc,80,b84", bits=32)
    assert struct.unpack_from("<2I", told.buffer(0)) == (0x9FA0, 4096)
    assert struct.unpack_from("<I", told.buffer(0), 36) == (255,)
    assert told.results == [0, -errno.EINVAL]
