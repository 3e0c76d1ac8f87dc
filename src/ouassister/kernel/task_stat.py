"""What /proc/PID/stat, status, statm and limits tell of a process beyond its name and owner.

Source: Linux v6.1 ``include/linux/sched.h`` (``struct task_struct``, ``PF_WQ_WORKER``),
``include/linux/sched/signal.h`` (``struct signal_struct``), ``kernel/sched/cputime.c``
(``cputime_adjust``), ``fs/proc/array.c`` (``proc_task_name``, ``do_task_stat``,
``get_children_pid``),
``kernel/workqueue.c`` (``wq_worker_comm``), ``drivers/tty/tty_io.c`` (``tty_devnum``). What moved:
the processor is in ``thread_info`` since bcf9033e5449 ("sched: move CPU field back into thread_info
if THREAD_INFO_IN_TASK=y", v5.16); a kthread's own structure is ``worker_private`` since
e32cf5dfbe22 ("kthread: Generalize pf_io_worker so it can point to struct kthread", v5.17),
``set_child_tid`` before; ``full_name`` since d6986ce24fc0 ("kthread: dynamically allocate memory to
store kthread's full name", v5.17); ``tty_struct.ctrl`` since 64d608db38ff ("tty: cumulate and
document tty_struct::ctrl* members", v5.14); ``ucounts.rlimit`` since d64696905554 ("Reimplement
RLIMIT_SIGPENDING on top of ucounts", v5.14).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drgn import sizeof

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import GuestPid, VirtAddr
from ouassister.kernel import walk
from ouassister.kernel.fields import (
    Fields,
    constant,
    has_member,
    offset,
    read_string,
    read_word,
)
from ouassister.kernel.memory_stat import MemoryStat, MemoryStats
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drgn import Object

    from ouassister.kernel.program import Kernel

_MAX_THREADS: Final = 1 << 17
_MAX_LEVEL: Final = 32  # MAX_PID_NS_LEVEL
_MAX_MASK: Final = 8192 // 8  # NR_CPUS; as nodes, 1024
_MAX_EXTENTS: Final = 340  # UID_GID_MAP_MAX_EXTENTS
_PGID, _SID = 2, 3  # enum pid_type
_RLIMITS: Final = 16
_SIGNALS: Final = 64
_PF_WQ_WORKER, _PF_KTHREAD = 0x20, 0x0020_0000
_TASK_REPORT: Final = 0x7F
_STATE_CHARS: Final = "RSDTtXZP"  # by the highest set bit of state & TASK_REPORT
_UNINTERRUPTIBLE, _NOLOAD = 2, 0x400


@dataclass(frozen=True, slots=True)
class ThreadStat:
    """One thread. Times in nanoseconds; signal sets as the kernel's 64 bits."""

    pid: GuestPid
    comm: bytes  # with what a kernel worker is at
    state: str  # the letter
    parent: GuestPid  # of its process
    tracer: GuestPid  # 0: none
    flags: int
    exit_signal: int
    exit_code: int
    minor_faults: int
    major_faults: int
    user_ns: int
    system_ns: int
    guest_ns: int
    run_ns: int
    start_ns: int  # since boot
    priority: int
    nice: int
    rt_priority: int
    policy: int
    cpu: int
    voluntary: int
    involuntary: int
    pending: int
    blocked: int
    uids: tuple[int, int, int, int]  # real, effective, saved, of file accesses
    gids: tuple[int, int, int, int]
    capabilities: tuple[int, int, int, int, int]  # as status lists them: inherited to ambient
    no_new_privs: bool
    seccomp: int
    seccomp_filters: int
    cpus_allowed: int
    mems_allowed: int
    loginuid: int
    sessionid: int
    adjusted_ns: tuple[int, int]  # user and system time, as the kernel would show them
    children: tuple[GuestPid, ...] = ()  # those that it has forked or taken over, in that order


@dataclass(frozen=True, slots=True)
class IdMap:
    """A line of /proc/PID/uid_map: first id inside, first id outside, count."""

    inside: int
    outside: int
    count: int


@dataclass(frozen=True, slots=True)
class TaskStat:
    """One process. Faults and times of the group are those of all its threads, dead ones too."""

    threads: tuple[ThreadStat, ...]  # the leader first
    pids: tuple[int, ...]  # in each pid namespace, outermost first
    process_group: int
    session: int
    tty: int  # as new_encode_dev makes it; 0: none
    foreground: int  # process group; -1: none
    minor_faults: int
    major_faults: int
    child_minor_faults: int
    child_major_faults: int
    adjusted_ns: tuple[int, int]
    child_ns: tuple[int, int]
    guest_ns: int
    child_guest_ns: int
    shared_pending: int
    ignored: int
    caught: int
    queued: int | None  # signals; None: not told
    limits: tuple[tuple[int, int], ...]  # soft and hard, by number of the limit
    oom_score_adj: int
    fd_size: int
    umask: int | None  # a zombie has none
    for_children: tuple[int, int]  # numbers of the pid and time namespaces of its children; 0: none
    memory: MemoryStat | None
    uid_map: tuple[IdMap, ...]
    gid_map: tuple[IdMap, ...]

    @property
    def leader(self) -> ThreadStat:
        """The thread whose pid is the process's."""
        return self.threads[0]


class TaskStats:
    """Figures of this kernel's processes.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        with guest_reads("reading the layout of processes"):
            self._prepare()

    def _prepare(self) -> None:
        kernel = self._kernel
        cpu = "cpu" if has_member(kernel, "struct task_struct", "cpu") else "thread_info.cpu"
        own = "worker_private"
        if not has_member(kernel, "struct task_struct", own):
            own = "set_child_tid"
        self._task = Fields(
            kernel, "struct task_struct", "pid", "flags", "exit_signal", "exit_code", "min_flt",
            "maj_flt", "utime", "stime", "gtime", "se.sum_exec_runtime", "prio", "static_prio",
            "rt_priority", "policy", cpu, "nvcsw", "nivcsw", "atomic_flags", "seccomp.mode",
            "seccomp.filter_count.counter", "loginuid.val", "sessionid", "real_parent", "parent",
            "ptrace", "real_cred", own, "comm", "prev_cputime.utime", "prev_cputime.stime",
            _start_name(kernel), _state_name(kernel), "exit_state",
        )  # fmt: skip
        self._group = Fields(kernel, "struct task_struct", "signal", "sighand", "mm", "fs", "files",
                             "thread_pid", "real_cred", "flags", "nsproxy")  # fmt: skip
        self._tgid = Fields(kernel, "struct task_struct", "tgid")
        self._places = {
            name: offset(kernel, "struct task_struct", name)
            for name in (
                "pending.signal",
                "blocked",
                "cpus_mask",
                "mems_allowed",
                "thread_node",
                "children",
                "sibling",
            )
        }
        self._cpus = min(kernel.type("struct cpumask").size or 0, _MAX_MASK)
        self._nodes = min(sizeof(kernel.type("nodemask_t")), _MAX_MASK)
        self._cred = Fields(
            kernel, "struct cred", "uid.val", "euid.val", "suid.val", "fsuid.val", "gid.val",
            "egid.val", "sgid.val", "fsgid.val", "user_ns",
        )  # fmt: skip
        self._caps = [
            offset(kernel, "struct cred", f"cap_{name}")
            for name in ("inheritable", "permitted", "effective", "bset", "ambient")
        ]
        self._signal = Fields(
            kernel, "struct signal_struct", "tty", "utime", "stime", "gtime", "cutime", "cstime",
            "cgtime", "min_flt", "maj_flt", "cmin_flt", "cmaj_flt", "sum_sched_runtime",
            "oom_score_adj", "prev_cputime.utime", "prev_cputime.stime",
        )  # fmt: skip
        self._signal_places = {
            name: offset(kernel, "struct signal_struct", name)
            for name in ("pids", "rlim", "thread_head", "shared_pending.signal")
        }
        self._pid = Fields(kernel, "struct pid", "level")
        self._numbers = offset(kernel, "struct pid", "numbers")
        self._upid = Fields(kernel, "struct upid", "nr")
        self._upid_size: int = kernel.type("struct upid").size or 0
        self._action = offset(kernel, "struct sighand_struct", "action")
        self._action_size: int = kernel.type("struct k_sigaction").size or 0
        self._handler = offset(kernel, "struct k_sigaction", "sa.sa_handler")
        self._fs = Fields(kernel, "struct fs_struct", "umask")
        self._proxy = Fields(kernel, "struct nsproxy", "pid_ns_for_children",
                             "time_ns_for_children")  # fmt: skip
        self._inums = [
            Fields(kernel, f"struct {kind}_namespace", "ns.inum") for kind in ("pid", "time")
        ]
        self._fdt = Fields(kernel, "struct files_struct", "fdt")
        self._fds = Fields(kernel, "struct fdtable", "max_fds")
        self._memory = MemoryStats(kernel)
        self._prepare_tty()
        self._prepare_workers()
        self._sigpending: int | None = None
        if has_member(kernel, "struct cred", "ucounts") and has_member(
            kernel, "struct ucounts", "rlimit"
        ):
            first = constant(kernel, "rlimit_type", "UCOUNT_RLIMIT_NPROC")
            index = constant(kernel, "rlimit_type", "UCOUNT_RLIMIT_SIGPENDING") - first
            self._sigpending = offset(kernel, "struct ucounts", "rlimit") + index * 8
            self._ucounts = Fields(kernel, "struct cred", "ucounts")
        self._extents = Fields(kernel, "struct uid_gid_map", "nr_extents", "forward")
        self._maps = [offset(kernel, "struct user_namespace", f"{kind}id_map") for kind in "ug"]
        self._extent = Fields(kernel, "struct uid_gid_extent", "first", "lower_first", "count")
        self._extent_size: int = kernel.type("struct uid_gid_extent").size or 0

    def _prepare_tty(self) -> None:
        kernel = self._kernel
        group = "ctrl.pgrp" if has_member(kernel, "struct tty_struct", "ctrl") else "pgrp"
        self._tty = Fields(kernel, "struct tty_struct", "driver", "index", group)
        self._driver = Fields(kernel, "struct tty_driver", "major", "minor_start")

    def _prepare_workers(self) -> None:
        kernel = self._kernel
        long_names = has_member(kernel, "struct kthread", "full_name")
        self._kthread = Fields(kernel, "struct kthread", "data",
                               *(("full_name",) if long_names else ()))  # fmt: skip
        self._worker = Fields(kernel, "struct worker", "current_work", "desc", "pool")

    def of(self, task: Object) -> TaskStat:
        """Describe a ``struct task_struct`` that leads its thread group.

        Raises:
            CorruptGuestError: A list does not end, or a count is absurd.
        """
        with guest_reads("reading the figures of a process"):
            return self._process(task.address_)

    def _process(self, address: int) -> TaskStat:
        kernel = self._kernel
        signal, sighand, mm, fs, files, pid, cred, flags, proxy = self._group.read(address)
        (tty, user, system, guest, child_user, child_system, child_guest, minor, major, child_minor,
         child_major, run, oom, *shown) = self._signal.read(signal)  # fmt: skip
        nodes = walk.list_nodes(kernel, signal + self._signal_places["thread_head"], _MAX_THREADS)
        addresses = [node - self._places["thread_node"] for node in nodes]
        if address not in addresses:  # the leader is gone first, as a zombie
            addresses.insert(0, address)
        addresses.sort(key=lambda one: one != address)
        threads = tuple(map(self._thread, addresses))
        ignored, caught = self._handlers(sighand) if sighand else (0, 0)
        pids = kernel.virtual.read(VirtAddr(signal + self._signal_places["pids"]), 32)
        kernel_thread = flags & _PF_KTHREAD
        user_ns = self._cred.read(cred)[-1]
        return TaskStat(
            threads=threads,
            pids=self._levels(pid) if pid else (threads[0].pid,),
            process_group=self._number(struct.unpack_from("<Q", pids, _PGID * 8)[0]),
            session=self._number(struct.unpack_from("<Q", pids, _SID * 8)[0]),
            tty=self._device(tty) if tty else 0,
            foreground=self._foreground(tty),
            minor_faults=minor + sum(one.minor_faults for one in threads),
            major_faults=major + sum(one.major_faults for one in threads),
            child_minor_faults=child_minor,
            child_major_faults=child_major,
            adjusted_ns=_adjust(
                user + sum(one.user_ns for one in threads),
                system + sum(one.system_ns for one in threads),
                run + sum(one.run_ns for one in threads),
                (shown[0], shown[1]),
            ),
            child_ns=(child_user, child_system),
            guest_ns=guest + sum(one.guest_ns for one in threads),
            child_guest_ns=child_guest,
            shared_pending=read_word(kernel, signal + self._signal_places["shared_pending.signal"]),
            ignored=ignored,
            caught=caught,
            queued=self._queued(cred),
            limits=self._limits(signal),
            oom_score_adj=oom,
            fd_size=self._fds.read(self._fdt.read(files)[0])[0] if files else 0,
            umask=self._fs.read(fs)[0] if fs else None,
            for_children=self._for_children(proxy),
            memory=self._memory.read(mm) if mm and not kernel_thread else None,
            uid_map=self._id_map(user_ns + self._maps[0]),
            gid_map=self._id_map(user_ns + self._maps[1]),
        )

    def _thread(self, address: int) -> ThreadStat:
        (pid, flags, exit_signal, exit_code, minor, major, user, system, guest, run, prio,
         static, rt_priority, policy, cpu, voluntary, involuntary, atomic, seccomp, filters,
         loginuid, session, real_parent, parent, ptrace, cred, own, comm, shown_user, shown_system,
         start, state, exit_state) = self._task.read(address)  # fmt: skip
        kernel, places = self._kernel, self._places
        uids, gids = (ids := self._cred.read(cred))[:4], ids[4:8]
        return ThreadStat(
            pid=GuestPid(pid),
            comm=self._comm(comm.partition(b"\0")[0], flags, own),
            state=state_letter(state, exit_state),
            parent=GuestPid(self._tgid.read(real_parent)[0]),
            tracer=GuestPid(self._tgid.read(parent)[0] if ptrace else 0),
            flags=flags & 0xFFFF_FFFF,
            exit_signal=exit_signal,
            exit_code=exit_code,
            minor_faults=minor,
            major_faults=major,
            user_ns=user,
            system_ns=system,
            guest_ns=guest,
            run_ns=run,
            start_ns=start,
            priority=prio - 100,  # task_prio(): MAX_RT_PRIO
            nice=static - 120,  # PRIO_TO_NICE
            rt_priority=rt_priority,
            policy=policy,
            cpu=cpu,
            voluntary=voluntary,
            involuntary=involuntary,
            pending=read_word(kernel, address + places["pending.signal"]),
            blocked=read_word(kernel, address + places["blocked"]),
            uids=(uids[0], uids[1], uids[2], uids[3]),
            gids=(gids[0], gids[1], gids[2], gids[3]),
            capabilities=_five([read_word(kernel, cred + place) for place in self._caps]),
            no_new_privs=bool(atomic & 1),  # PFA_NO_NEW_PRIVS
            seccomp=seccomp,
            seccomp_filters=filters,
            cpus_allowed=self._mask(address + places["cpus_mask"], self._cpus),
            mems_allowed=self._mask(address + places["mems_allowed"], self._nodes),
            loginuid=loginuid,
            sessionid=session,
            adjusted_ns=_adjust(user, system, run, (shown_user, shown_system)),
            children=tuple(self._children(address)),
        )

    def _children(self, address: int) -> Iterator[GuestPid]:
        """Yield the processes of a thread; its list holds leaders of thread groups alone."""
        for node in walk.list_nodes(self._kernel, address + self._places["children"]):
            yield GuestPid(self._tgid.read(node - self._places["sibling"])[0])

    def _comm(self, comm: bytes, flags: int, own: int) -> bytes:
        """Return the name as proc_task_name makes it: a worker's with what it does."""
        if not flags & _PF_KTHREAD or not own:
            return comm
        data, *full = self._kthread.read(own)
        if flags & _PF_WQ_WORKER:
            if not data:
                return comm
            work, description, pool = self._worker.read(data)
            description = description.partition(b"\0")[0]
            if not pool or not description:  # a rescuer that rests is in no pool
                return comm
            return comm + (b"+" if work else b"-") + bytes(description)
        return read_string(self._kernel, full[0], 256) if full and full[0] else comm

    def _handlers(self, sighand: int) -> tuple[int, int]:
        size = self._action_size
        raw = self._kernel.virtual.read(VirtAddr(sighand + self._action), _SIGNALS * size)
        ignored = caught = 0
        for number in range(_SIGNALS):
            (handler,) = struct.unpack_from("<Q", raw, number * size + self._handler)
            if handler == 1:  # SIG_IGN
                ignored |= 1 << number
            elif handler:
                caught |= 1 << number
        return ignored, caught

    def _levels(self, pid: int) -> tuple[int, ...]:
        (level,) = self._pid.read(pid)
        if not 0 <= level <= _MAX_LEVEL:
            raise CorruptGuestError(f"a pid is {level} namespaces deep")
        at = pid + self._numbers
        return tuple(self._upid.read(at + n * self._upid_size)[0] for n in range(level + 1))

    def _number(self, pid: int) -> int:
        return int(self._upid.read(pid + self._numbers)[0]) if pid else 0

    def _device(self, tty: int) -> int:
        driver, index, _ = self._tty.read(tty)
        major, first = self._driver.read(driver)
        minor = int(first + index) & 0xF_FFFF
        return (minor & 0xFF) | int(major) << 8 | (minor & ~0xFF) << 12  # new_encode_dev

    def _foreground(self, tty: int) -> int:
        group = self._tty.read(tty)[2] if tty else 0
        return self._number(group) if group else -1

    def _queued(self, cred: int) -> int | None:
        if self._sigpending is None:
            return None
        (ucounts,) = self._ucounts.read(cred)
        return read_word(self._kernel, ucounts + self._sigpending) if ucounts else 0

    def _limits(self, signal: int) -> tuple[tuple[int, int], ...]:
        at = VirtAddr(signal + self._signal_places["rlim"])
        raw = self._kernel.virtual.read(at, _RLIMITS * 16)
        return tuple((soft, hard) for soft, hard in struct.iter_unpack("<QQ", raw))

    def _mask(self, address: int, size: int) -> int:
        return int.from_bytes(self._kernel.virtual.read(VirtAddr(address), size), "little")

    def _for_children(self, proxy: int) -> tuple[int, int]:
        if not proxy:  # a zombie
            return 0, 0
        pid, time = (
            inum.read(at)[0] if at else 0
            for inum, at in zip(self._inums, self._proxy.read(proxy), strict=True)
        )
        return pid, time

    def _id_map(self, address: int) -> tuple[IdMap, ...]:
        count, forward = self._extents.read(address)
        if not 0 <= count <= _MAX_EXTENTS:
            raise CorruptGuestError(f"a map of ids has {count} lines")
        inline = offset(self._kernel, "struct uid_gid_map", "extent")
        at = address + inline if count <= 5 else forward  # UID_GID_MAP_MAX_BASE_EXTENTS
        return tuple(
            IdMap(*self._extent.read(at + number * self._extent_size)) for number in range(count)
        )


def state_letter(state: int, exit_state: int) -> str:
    """Return the letter of a task's state, as task_state_to_char() does."""
    report = (state | exit_state) & _TASK_REPORT
    if report == _UNINTERRUPTIBLE and state & _NOLOAD:
        return "I"
    return _STATE_CHARS[report.bit_length()]


def _state_name(kernel: Kernel) -> str:
    """Name the state; see `ouassister.kernel.tasks`."""
    return "__state" if has_member(kernel, "struct task_struct", "__state") else "state"


def _start_name(kernel: Kernel) -> str:
    """Name the time of start; see `ouassister.kernel.tasks`."""
    found = has_member(kernel, "struct task_struct", "start_boottime")
    return "start_boottime" if found else "real_start_time"


def _five(values: list[int]) -> tuple[int, int, int, int, int]:
    first, second, third, fourth, fifth = values
    return first, second, third, fourth, fifth


def _adjust(user: int, system: int, run: int, shown: tuple[int, int]) -> tuple[int, int]:
    """Split the exact run time as the ticks of user and system time are; see cputime_adjust().

    Args:
        user: Ticks of user time, in nanoseconds.
        system: The same of system time.
        run: What the scheduler measured.
        shown: What was shown before: times never go back.
    """
    if sum(shown) >= run:
        return shown
    if system == 0:
        new_system = 0
    elif user == 0:
        new_system = run
    else:
        new_system = min(system * run // (system + user), run)
    new_system = max(new_system, shown[1])
    new_user = run - new_system
    if new_user < shown[0]:
        new_user = shown[0]
        new_system = run - new_user
    return new_user, new_system
