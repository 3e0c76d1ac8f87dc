"""System calls in a shadow that must not do what they say: devices, mounts, ways out, and races.

Probes make them straight from the command line, as 64-bit and as 32-bit programs; none of them
has a C library but the one for threads.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

import pytest
from tests.host.syscall_rig import BOTH, DISK, FILE, NODES, OWN, PACKAGE, Rig, opened

from ouassister.shadow.syscalls.filter import bounds
from ouassister.shadow.syscalls.table import TABLE, Answer, Bits, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with opened() as found:
        yield found


# --- device nodes ---

_CHARACTER = stat.S_IFCHR | 0o666


@BOTH
def test_a_device_node_is_a_marked_file(rig: Rig, bits: int) -> None:
    outcome = rig.calls(
        "umask:18",
        f"mknod:s/tmp/file,{_CHARACTER},259",
        f"mknodat:-100,stmp/disk,{stat.S_IFBLK | 0o660},{0x12345678}",
        f"mknod:s/tmp/file,{_CHARACTER},259",
        f"mknod:s/tmp/fifo,{stat.S_IFIFO | 0o600},0",
        f"mknod:s/none/null,{_CHARACTER},259",
        f"mknod:s,{_CHARACTER},259",
        f"mknod:s/tmp/,{_CHARACTER},259",
        f"mknod:s/tmp/x/,{_CHARACTER},259",
        f"mknod:s/bin/probe64/x,{_CHARACTER},259",
        f"mknod:0,{_CHARACTER},259",
        "open:s/tmp/file,1",
        bits=bits,
    )
    missing, there = -errno.ENOENT, -errno.EEXIST
    assert outcome.results[:6] == [0o22, 0, 0, there, 0, missing]
    assert outcome.results[6:] == [missing, there, missing, -errno.ENOTDIR, -errno.EFAULT, 3]
    null, disk = outcome.files["tmp/file"], outcome.files["tmp/disk"]
    assert null["mode"] == stat.S_IFREG | 0o644
    assert disk["mode"] == stat.S_IFREG | 0o640
    assert stat.S_ISFIFO(outcome.files["tmp/fifo"]["mode"])
    block = f"b {(0x12345678 >> 8) & 0xFFF} {0x78 | (0x12345678 >> 12) & 0xFFF00}"
    assert outcome.told("name", "args", "inode", "marked") == [
        ("mknod", [FILE, "644", "c 1 3"], null["inode"], bool(null["mark"])),
        ("mknodat", [DISK, "640", block], disk["inode"], bool(disk["mark"])),
    ]
    assert {null["mark"], disk["mark"]} <= {"c 1 3", block, ""}


def test_device_nodes_follow_links_inside_of_the_root_alone(rig: Rig) -> None:
    links = {
        "tmp/absolute": "/var/lib",
        "tmp/relative": "../var/../var/./lib",
        "tmp/up": "../../../../../var/lib",
        "tmp/loop": "loop",
        "tmp/magic": "/proc/1/root/var",
        "tmp/root": "/",
    }
    names = [*links][:3]
    outcome = rig.calls(
        *(f"mknod:s/{name}/{at},{_CHARACTER},259" for at, name in enumerate(names)),
        f"mknod:s/tmp/loop/x,{_CHARACTER},259",
        f"mknod:s/tmp/root/tmp/root/var/lib/3,{_CHARACTER},259",
        "mkdir:s/tmp/jail,493",
        "mkdir:s/tmp/jail/etc,493",
        "open:s/tmp/jail/etc,0x10000",
        "chroot:s/tmp/jail",
        f"mknod:s/etc/inside,{_CHARACTER},259",
        f"mknod:s/../../../etc/inside2,{_CHARACTER},259",
        f"mknodat:3,s../inside3,{_CHARACTER},259",
        f"mknodat:3,s../../../inside4,{_CHARACTER},259",
        f"mknodat:9,sx,{_CHARACTER},259",
        f"mknodat:1,sx,{_CHARACTER},259",
        links=links,
    )
    assert outcome.results[:5] == [0, 0, 0, -errno.ELOOP, 0]
    assert outcome.results[5:] == [0, 0, 3, 0, 0, 0, 0, 0, -errno.EBADF, -errno.ENOTDIR]
    made = {name for name, status in outcome.files.items() if stat.S_ISREG(status["mode"])}
    assert made == {
        *(f"var/lib/{at}" for at in range(4)),
        "tmp/jail/etc/inside",
        "tmp/jail/etc/inside2",
        "tmp/jail/inside3",
        "tmp/jail/inside4",
    }


def test_a_program_cannot_mark_a_file(rig: Rig) -> None:
    outcome = rig.calls(
        "creat:s/tmp/file,384",
        "setxattr:s/tmp/file,suser.ouassister.device,sc 1 3,5,0",
        "fsetxattr:3,suser.other,sx,1,0",
    )
    assert outcome.results[:2] == [3, -errno.EPERM]
    assert outcome.results[2] in (0, -errno.EOPNOTSUPP)
    assert outcome.files["tmp/file"]["mark"] == ""


@BOTH
def test_attributes_that_a_user_namespace_is_refused_are_told(rig: Rig, bits: int) -> None:
    outcome = rig.calls(
        "creat:s/tmp/file,384",
        "setxattr:s/tmp/file,strusted.x,svalue,5,0",
        "lsetxattr:s/tmp/file,ssecurity.selinux,slabel,5,0",
        "fsetxattr:3,strusted.y,sv,1,0",
        "setxattr:s/tmp/file,ssecurity.capability,x0100000200040000000000000000000000000000,20,0",
        bits=bits,
    )
    assert outcome.results == [3, *[-errno.EPERM] * 3, 0]
    assert outcome.told("name", "outcome", "args") == [
        ("setxattr", "denied", [FILE, "trusted.x", "value"]),
        ("lsetxattr", "denied", [FILE, "security.selinux", "label"]),
        ("fsetxattr", "denied", [FILE, "trusted.y", "v"]),
    ]


# --- mounts ---


@BOTH
def test_mounts_of_the_shadow_are_done_and_told(rig: Rig, bits: int) -> None:
    outcome = rig.calls(
        "mount:0,s/,0,0x44000,0",  # private, recursive
        "mount:stmpfs,s/mnt,stmpfs,0,ssize=1m",
        "mkdir:s/mnt/here,493",
        "mount:s/mnt,s/tmp,0,0x1000,0",
        "access:s/tmp/here,0",
        "mount:0,s/tmp,0,0x1021,0",
        "mkdir:s/tmp/there,493",
        "umount2:s/tmp,0",
        "access:s/tmp/here,0",
        "mount:sproc,s/mnt/here,sproc,0,0",
        bits=bits,
    )
    missing = -errno.ENOENT
    assert outcome.results == [0, 0, 0, 0, 0, 0, -errno.EROFS, 0, missing, 0]
    assert outcome.told("name", "outcome") == [
        *[("mount", "passed")] * 3,
        ("umount2", "passed"),
        ("mount", "passed"),
    ]


@BOTH
def test_other_file_systems_are_recorded_or_denied(rig: Rig, bits: int) -> None:
    outcome = rig.calls(
        "mount:ssysfs,s/sys,ssysfs,0,0",
        "mount:scgroup2,s/mnt,scgroup2,0,0",
        "mount:s/dev/vda2,s/mnt,sext4,0xc0ed0000,0",
        "mount:s/dev/vda2,s/mnt,0,0,0",
        "umount2:s/boot,0",
        "umount2:sboot/../boot,0",
        "umount2:s/proc/,2",
        "umount2:s/run/ouassister/bin,2",
        "umount2:s/run/ouassister,2",
        "umount2:s/mnt,0",
        bits=bits,
    )
    eperm, busy = -errno.EPERM, -errno.EBUSY
    assert outcome.results == [0, 0, eperm, eperm, *[busy] * 5, -errno.EINVAL]
    assert outcome.told("name", "outcome") == [
        *[("mount", "recorded")] * 2,
        *[("mount", "denied")] * 2,
        *[("umount2", "denied")] * 5,
        ("umount2", "passed"),
    ]


# --- kept away ---


def fulfilling(row: Row) -> str:
    """Arguments for which a row that looks at them holds."""
    condition = row.when[0]
    low = bounds(condition, OWN)[0][0]
    if isinstance(condition, Bits) and low == 1:
        low = condition.mask
    return ",".join(["0"] * condition.arg + [str(low)])


@BOTH
def test_every_denied_call_fails_and_is_reported_once(rig: Rig, bits: int) -> None:
    rows = [
        row
        for row in TABLE
        if row.answer is Answer.DENIED and (row.x86_64 if bits == 64 else row.i386) is not None
    ]
    assert len(rows) > 25
    # A uretprobe is no call of a program: the kernel ends who makes it, or lets it by the filter.
    rows = [row for row in rows if row.name not in ("uretprobe", "uprobe")]
    calls = [f"{row.name}:{fulfilling(row)}" if row.when else row.name for row in rows]
    outcome = rig.calls(*calls, *calls, bits=bits, environment=PACKAGE)
    assert outcome.results == [-row.errno for row in rows] * 2
    assert outcome.told("name", "outcome", "package") == [
        (row.name, "denied", "postfix") for row in rows
    ]


@BOTH
def test_every_absent_and_elided_call_is_so(rig: Rig, bits: int) -> None:
    rows = [
        row
        for row in TABLE
        if row.answer in (Answer.ABSENT, Answer.ELIDED)
        and (row.x86_64 if bits == 64 else row.i386) is not None
    ]
    outcome = rig.calls(*(row.name for row in rows), bits=bits)
    assert outcome.results == [-row.errno for row in rows]
    assert outcome.records == []


@BOTH
def test_an_unknown_call_is_not_there_and_reported_once(rig: Rig, bits: int) -> None:
    outcome = rig.calls("1000", "1000:1,2", "1001", bits=bits)
    assert outcome.results == [-errno.ENOSYS] * 3
    abi = "x86_64" if bits == 64 else "i386"
    assert outcome.told("name", "outcome") == [
        (f"{abi} 1000", "unknown"),
        (f"{abi} 1001", "unknown"),
    ]


def test_a_64_bit_program_cannot_use_the_x32_abi(rig: Rig) -> None:
    assert rig.run(["probe64", f"{0x40000000 + 63}:b390"]).status == 128 + 31  # SIGSYS


def test_the_first_process_of_the_shadow_cannot_be_taken_over(rig: Rig) -> None:
    """It has no filter: who could write into it would be rid of it."""
    outcome = rig.calls(
        "open:s/proc/1/mem,2",
        "open:s/proc/1/environ,0",
        "ptrace:16,1,0,0",
        "process_vm_writev:1,0,0,0,0,0",
        "open:s/proc/1/ns/mnt,0",
        "kcmp:1,1,0,0,0",
    )
    assert outcome.results == [
        -errno.EACCES,
        -errno.EACCES,
        *[-errno.EPERM] * 1,
        -errno.EPERM,
        -errno.EACCES,
        -errno.EPERM,
    ]


def test_namespaces_of_the_shadow_are_not_left(rig: Rig) -> None:
    outcome = rig.calls(
        "open:s/proc/self/ns/mnt,0",
        "setns:$,0",
        "pidfd_open:571,0",
        "setns:$,0x20000",
        "unshare:0x10000000",
        "unshare:0x20000",
        "clone:0x10000011,0,0,0,0",
        "pivot_root:s/,s/",
        "open_by_handle_at:-100,b64,0",
    )
    eperm = -errno.EPERM
    assert outcome.results == [3, eperm, 4, eperm, eperm, 0, eperm, eperm, eperm]


@BOTH
def test_own_processes_may_be_traced(rig: Rig, bits: int) -> None:
    """PTRACE_TRACEME; and an attempt at a process that is not there."""
    outcome = rig.calls(f"ptrace:16,{OWN + 5},0,0", "ptrace:0,0,0,0", bits=bits)
    assert outcome.results == [-errno.ESRCH, 0]
    assert outcome.records == []


def test_sockets_without_a_namespace_are_denied(rig: Rig) -> None:
    af_vsock, af_alg = 40, 38
    native = rig.calls(
        f"socket:{af_vsock},1,0",
        f"socket:{af_alg},5,0",
        "socket:1,1,0",
        "socket:16,3,4",  # NETLINK_SOCK_DIAG
        "socket:16,3,0",
        "socket:2,3,4",  # a raw socket, IPPROTO_IPIP
    )
    assert native.results[:3] == [-errno.EAFNOSUPPORT, -errno.EAFNOSUPPORT, 3]
    assert native.results[3:] == [-errno.EPROTONOSUPPORT, 4, 5]
    compat = rig.calls(
        f"socket:{af_vsock},1,0",
        f"socketcall:1,&{af_vsock}.1.0",
        "socketcall:1,&1.1.0",
        "socketcall:1,&2.524289.0",  # SOCK_STREAM | SOCK_CLOEXEC
        "fcntl:3,1",
        "fcntl:4,1",
        "socketcall:1,&16.3.0",
        "socketcall:1,&16.3.4",
        "socketcall:1,&77.1.0",
        "socketcall:1,0",
        "socketcall:99,0",
        bits=32,
    )
    assert compat.results[:7] == [*[-errno.EAFNOSUPPORT] * 2, 3, 4, 0, 1, 5]
    assert compat.results[7] == -errno.EPROTONOSUPPORT
    assert compat.results[8:] == [-errno.EAFNOSUPPORT, -errno.EFAULT, -errno.EINVAL]
    assert [record["name"] for record in compat.records] == ["socket"]
    raw = rig.calls("socketcall:1,&2.3.1", bits=32, uid=1000)
    assert raw.results == [-errno.EPERM]


def test_a_socket_by_socketcall_is_of_the_caller_s_network(rig: Rig) -> None:
    """Its namespace has a loopback that is down, and nothing else: there is no way anywhere."""
    address = "x0200" + "0016" + "7f000001" + "00" * 8
    outcome = rig.calls("socketcall:1,&2.1.0", f"socketcall:3,&3.{address}.16", bits=32)
    assert outcome.results == [3, -errno.ENETUNREACH]


# --- a C library: threads, vfork, races ---


def test_threads_children_and_races(rig: Rig) -> None:
    outcome = rig.run(["threads"])
    assert outcome.status == 0, outcome.lines
    *steps, race, last = outcome.lines
    assert [*steps, last] == ["threads", "vfork", "fork", "killed", "nested"]
    nodes = [record for record in outcome.records if record["name"] == "mknodat"]
    assert f"race {len(nodes)}" == race
    assert {record["args"][0] for record in nodes} <= {NODES % "good", NODES % "evil"}
    signals = [record for record in outcome.records if record["name"] == "kill"]
    assert [record["args"] for record in signals] == [[571, "SIGHUP"]]
