"""Files of /proc/PID as Linux writes them; pure functions from records to bytes.

Source: Linux v6.1 ``fs/proc/array.c`` (``proc_pid_status``, ``do_task_stat``, ``proc_pid_statm``),
``fs/proc/task_mmu.c`` (``task_mem``, ``show_map_vma``), ``fs/proc/base.c``
(``proc_pid_limits``, ``proc_oom_score_adj``), ``fs/proc/fd.c`` (``seq_show``),
``fs/proc_namespace.c`` (``show_vfsmnt``, ``show_mountinfo``), ``kernel/user_namespace.c``
(``uid_m_show``), ``kernel/cgroup/cgroup.c`` (``proc_cgroup_show``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.guest_model import Cgroup, OpenFile, Vma
    from ouassister.kernel.memory_stat import MemoryStat
    from ouassister.kernel.mount_lines import MountLine
    from ouassister.kernel.task_stat import IdMap, TaskStat, ThreadStat

_TICK_NS: Final = 10_000_000  # USER_HZ is 100
_PAGE: Final = 4096
_PAGE_KB: Final = 4
_NEVER: Final = (1 << 64) - 1  # RLIM_INFINITY
_STATES: Final = {
    "R": "running",
    "S": "sleeping",
    "D": "disk sleep",
    "T": "stopped",
    "t": "tracing stop",
    "X": "dead",
    "Z": "zombie",
    "P": "parked",
    "I": "idle",
}
_RLIMIT_RSS, _RLIMIT_SIGPENDING = 5, 11
_LIMITS: Final = (
    ("Max cpu time", "seconds"),
    ("Max file size", "bytes"),
    ("Max data size", "bytes"),
    ("Max stack size", "bytes"),
    ("Max core file size", "bytes"),
    ("Max resident set", "bytes"),
    ("Max processes", "processes"),
    ("Max open files", "files"),
    ("Max locked memory", "bytes"),
    ("Max address space", "bytes"),
    ("Max file locks", "locks"),
    ("Max pending signals", "signals"),
    ("Max msgqueue size", "bytes"),
    ("Max nice priority", ""),
    ("Max realtime priority", ""),
    ("Max realtime timeout", "us"),
)
_MAP_WIDTH: Final = 72  # show_map_vma: 25 + 6 * 8 - 1


# --- stat, statm, status ---------------------------------------------------------------------


def stat(task: TaskStat, thread: ThreadStat | None = None) -> bytes:
    """Render /proc/PID/stat, or task/TID/stat when a thread is given, as root reads it."""
    one = thread or task.leader
    memory = task.memory
    minor, major = one.minor_faults, one.major_faults
    user, system = one.adjusted_ns
    guest = one.guest_ns
    exit_code = one.exit_code
    if thread is None:
        minor, major = task.minor_faults, task.major_faults
        user, system = task.adjusted_ns
        guest = task.guest_ns
    child_user, child_system = task.child_ns  # of the group, for a thread as well
    mark = memory or _NO_MEMORY
    alone = thread is not None or len(task.threads) < 2
    fields = [
        one.state, one.parent, task.process_group, task.session, task.tty, task.foreground,
        one.flags, minor, task.child_minor_faults, major, task.child_major_faults,
        user // _TICK_NS, system // _TICK_NS,
        child_user // _TICK_NS, child_system // _TICK_NS, one.priority, one.nice,
        len(task.threads), 0, one.start_ns // _TICK_NS, memory.total * _PAGE if memory else 0,
        memory.resident if memory else 0, task.limits[_RLIMIT_RSS][0], *mark.code,
        mark.start_stack, 0, 0, one.pending & 0x7FFFFFFF, one.blocked & 0x7FFFFFFF,
        task.ignored & 0x7FFFFFFF, task.caught & 0x7FFFFFFF, int(alone and one.state != "R"), 0, 0,
        one.exit_signal, one.cpu, one.rt_priority, one.policy, 0, guest // _TICK_NS,
        task.child_guest_ns // _TICK_NS, *mark.data_range, mark.start_brk, *mark.arguments,
        *mark.environment, exit_code,
    ]  # fmt: skip
    return b"%d (%s) %s\n" % (one.pid, one.comm, " ".join(map(str, fields)).encode())


def statm(memory: MemoryStat | None) -> bytes:
    """Render /proc/PID/statm."""
    if memory is None:
        return b"0 0 0 0 0 0 0\n"
    shared = memory.file + memory.shared
    data = memory.data + memory.stack
    return b"%d %d %d %d 0 %d 0\n" % (
        memory.total,
        memory.resident,
        shared,
        _text_pages(memory),
        data,
    )


def status(
    task: TaskStat, groups: Iterable[int], cpus: int, thread: ThreadStat | None = None
) -> bytes:
    """Render /proc/PID/status; what memory does not tell is left out, line by line.

    Args:
        task: The process.
        groups: Its supplementary groups.
        cpus: How many processors this kernel can have (``nr_cpu_ids``).
        thread: Render that one's own.
    """
    one = thread or task.leader
    name = one.comm.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")  # seq_escape_str()
    lines = [b"Name:\t" + name]
    text = [f"Umask:\t{task.umask:04o}"] if task.umask is not None else []
    pids = task.pids if thread is None else (thread.pid,)
    text += [
        f"State:\t{one.state} ({_STATES[one.state]})",
        f"Tgid:\t{task.leader.pid}",
        "Ngid:\t0",
        f"Pid:\t{one.pid}",
        f"PPid:\t{one.parent}",
        f"TracerPid:\t{one.tracer}",
        "Uid:\t" + "\t".join(map(str, one.uids)),
        "Gid:\t" + "\t".join(map(str, one.gids)),
        f"FDSize:\t{task.fd_size}",
        "Groups:\t" + " ".join(map(str, groups)) + " ",
        "NStgid:\t" + "\t".join(map(str, task.pids)),
        "NSpid:\t" + "\t".join(map(str, pids)),
    ]
    if len(task.pids) == 1:  # groups are known by their outermost number alone
        text += [f"NSpgid:\t{task.process_group}", f"NSsid:\t{task.session}"]
    if task.memory is not None:
        text += _memory_lines(task.memory)
    text.append(f"Threads:\t{len(task.threads)}")
    if task.queued is not None:
        text.append(f"SigQ:\t{task.queued}/{task.limits[_RLIMIT_SIGPENDING][0]}")
    text += [
        f"{name}:\t{value:016x}"
        for name, value in (
            ("SigPnd", one.pending),
            ("ShdPnd", task.shared_pending),
            ("SigBlk", one.blocked),
            ("SigIgn", task.ignored),
            ("SigCgt", task.caught),
            *zip(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), one.capabilities, strict=True),
        )
    ]
    text += [
        f"NoNewPrivs:\t{int(one.no_new_privs)}",
        f"Seccomp:\t{one.seccomp}",
        f"Seccomp_filters:\t{one.seccomp_filters}",
        f"Cpus_allowed:\t{mask(one.cpus_allowed, cpus)}",
        f"Cpus_allowed_list:\t{ranges(one.cpus_allowed & ((1 << cpus) - 1))}",
        f"Mems_allowed:\t{mask(one.mems_allowed, 1024)}",
        f"Mems_allowed_list:\t{ranges(one.mems_allowed)}",
        f"voluntary_ctxt_switches:\t{one.voluntary}",
        f"nonvoluntary_ctxt_switches:\t{one.involuntary}",
    ]
    return b"\n".join([*lines, "\n".join(text).encode(), b""])


def _memory_lines(memory: MemoryStat) -> list[str]:
    text = _text_pages(memory)
    kilobytes = (
        ("VmPeak", memory.peak * _PAGE_KB),
        ("VmSize", memory.total * _PAGE_KB),
        ("VmLck", memory.locked * _PAGE_KB),
        ("VmPin", memory.pinned * _PAGE_KB),
        ("VmHWM", max(memory.resident_peak, memory.resident) * _PAGE_KB),
        ("VmRSS", memory.resident * _PAGE_KB),
        ("RssAnon", memory.anonymous * _PAGE_KB),
        ("RssFile", memory.file * _PAGE_KB),
        ("RssShmem", memory.shared * _PAGE_KB),
        ("VmData", memory.data * _PAGE_KB),
        ("VmStk", memory.stack * _PAGE_KB),
        ("VmExe", min(text, memory.executable) * _PAGE_KB),
        ("VmLib", max(memory.executable - text, 0) * _PAGE_KB),
        ("VmPTE", memory.page_tables >> 10),
        ("VmSwap", memory.swapped * _PAGE_KB),
    )
    return [f"{name}:\t{value:8d} kB" for name, value in kilobytes]


def _text_pages(memory: MemoryStat) -> int:
    start, end = memory.code
    return (-(-end // _PAGE)) - start // _PAGE


# --- other files -----------------------------------------------------------------------------


def limits(values: Iterable[tuple[int, int]]) -> bytes:
    """Render /proc/PID/limits."""
    lines = [f"{'Limit':<25s} {'Soft Limit':<20s} {'Hard Limit':<20s} {'Units':<10s}"]
    for (name, unit), (soft, hard) in zip(_LIMITS, values, strict=True):
        words = ["unlimited" if value == _NEVER else str(value) for value in (soft, hard)]
        tail = f"{unit:<10s}" if unit else ""
        lines.append(f"{name:<25s} {words[0]:<20s} {words[1]:<20s} {tail}")
    return "\n".join([*lines, ""]).encode()


def maps(vmas: Iterable[Vma]) -> bytes:
    """Render /proc/PID/maps, without the page of vsyscall that belongs to no process."""
    lines = []
    for vma in vmas:
        head = (
            f"{vma.start:08x}-{vma.end:08x} {vma.permissions} {vma.offset:08x} "
            f"{vma.major:02x}:{vma.minor:02x} {vma.inode} "
        )
        name = escape(vma.path, b"\n")
        lines.append(f"{head:<{_MAP_WIDTH}s} ".encode() + name if name else head.encode())
    return b"".join(line + b"\n" for line in lines)


def fdinfo(file: OpenFile) -> bytes:
    """Render /proc/PID/fdinfo/FD."""
    return f"pos:\t{file.position}\nflags:\t0{file.flags:o}\nino:\t{file.inode}\n".encode()


def cgroup(cgroups: Iterable[Cgroup]) -> bytes:
    """Render /proc/PID/cgroup."""
    return b"".join(
        b"%d:%s:%s\n" % (one.hierarchy, one.controllers.encode(), one.path) for one in cgroups
    )


def id_map(lines: Iterable[IdMap]) -> bytes:
    """Render /proc/PID/uid_map or gid_map."""
    return "".join(
        f"{one.inside:10d} {one.outside:10d} {one.count:10d}\n" for one in lines
    ).encode()


def mounts(lines: Iterable[MountLine]) -> bytes:
    """Render /proc/PID/mounts."""
    out = []
    for line in lines:
        mount = line.mount
        own, of_super = line.options, line.super_options
        read_only = "ro" if "ro" in (own[0], of_super[0]) else "rw"
        head, rest = of_super[1 : line.flags], of_super[line.flags :]
        options = ",".join((read_only, *head, *own[1:], *rest))
        words = (
            _mangle(mount.source),
            _mangle(mount.target),
            _mangle(mount.fstype.encode()),
            options.encode(),
        )
        out.append(b" ".join(words) + b" 0 0\n")
    return b"".join(out)


def mountinfo(lines: Iterable[MountLine]) -> bytes:
    """Render /proc/PID/mountinfo."""
    out = []
    for line in lines:
        mount = line.mount
        words = [
            f"{mount.number} {mount.parent} {mount.major}:{mount.minor}".encode(),
            _mangle(mount.root),
            _mangle(mount.target),
            ",".join(line.options).encode(),
            *(word.encode() for word in line.propagation),
            b"-",
            _mangle(mount.fstype.encode()),
            _mangle(mount.source),
            ",".join(line.super_options).encode(),
        ]
        out.append(b" ".join(words) + b"\n")
    return b"".join(out)


# --- words -----------------------------------------------------------------------------------


def escape(text: bytes, special: bytes) -> bytes:
    """Write special bytes in octal, as mangle_path() and seq_escape() do."""
    if text.isalnum() or not any(byte in text for byte in special):
        return text
    return b"".join(b"\\%03o" % byte if byte in special else bytes((byte,)) for byte in text)


def _mangle(text: bytes) -> bytes:
    return escape(text, b" \t\n\\#")


def mask(bits: int, width: int) -> str:
    """Write a set as ``%*pb`` does: groups of 32 bits."""
    groups = -(-width // 32)
    first = (width - 1) % 32 // 4 + 1
    words = [(bits >> 32 * (groups - 1 - n)) & 0xFFFF_FFFF for n in range(groups)]
    keep = width % 32
    if keep:
        words[0] &= (1 << keep) - 1
    return ",".join(f"{word:0{first if n == 0 else 8}x}" for n, word in enumerate(words))


def ranges(bits: int) -> str:
    """Write a set as ``%*pbl`` does: ``0-3,8``."""
    found = []
    number = 0
    while bits >> number:
        if not bits >> number & 1:
            number += 1
            continue
        last = number
        while bits >> (last + 1) & 1:
            last += 1
        found.append(str(number) if last == number else f"{number}-{last}")
        number = last + 1
    return ",".join(found)


class _NoMemory:
    """What a process without memory shows for its addresses."""

    code = data_range = arguments = environment = (0, 0)
    start_stack = start_brk = 0


_NO_MEMORY: Final = _NoMemory()
