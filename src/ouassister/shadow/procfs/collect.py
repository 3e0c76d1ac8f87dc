"""Makes the snapshot of /proc from a guest's memory: what is asked, and where it is shown."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, TypeVar

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.kernel import cpuinfo, loaded_modules, swap, sysctls, system_stat
from ouassister.kernel.fields import read_word, variable
from ouassister.kernel.mount_lines import MountTables
from ouassister.kernel.process_memory import NotHereError
from ouassister.kernel.program import guest_reads
from ouassister.kernel.sockets import SocketTables
from ouassister.kernel.task_stat import TaskStats
from ouassister.kernel.time import read_clocks
from ouassister.shadow.procfs import network, process, system
from ouassister.shadow.procfs.snapshot import Tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.guest_model import TaskDetail
    from ouassister.kernel import GuestReader
    from ouassister.kernel.task_stat import TaskStat
    from ouassister.kernel.time import Clocks
    from ouassister.model import GuestView, Task

T = TypeVar("T")

_SECOND_NS: Final = 1_000_000_000
_NAMESPACES: Final = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_MAX_CPUS: Final = 8192
_MAX_READS: Final = 16 << 20  # a guest with 70 processes takes 32 thousand
# Links of the real procfs that lead to the reader's own processes; see `filesystem`.
LINKS: Final = ((b"mounts", b"self/mounts"), (b"net", b"self/net"))


def collect(
    reader: GuestReader, view: GuestView, *, system: bool = True, processes: bool = True
) -> Tree:
    """Render everything that the shadow's /proc shows of a guest, or one of two parts of it.

    Args:
        reader: The guest's kernel.
        view: What was learnt already; only its processes, names and clocks are used.
        system: With what is no process's.
        processes: With its processes.
    """
    with reader.kernel.virtual.bounded(_MAX_READS), guest_reads("rendering /proc"):
        collector = _Collector(reader, view)
        if system:
            collector.add_system()
        if processes:
            collector.add_processes()
        return collector.tree


class _Collector:
    def __init__(self, reader: GuestReader, view: GuestView) -> None:
        self.tree = Tree()
        self._reader = reader
        self._kernel = reader.kernel
        self._view = view
        self._tables = MountTables(reader.kernel)
        self._mount_files: dict[int, tuple[bytes, bytes]] = {}  # by identity of the lines
        self._cpus = self._ask("nr_cpu_ids", self._cpu_ids) or _MAX_CPUS

    def _ask(self, what: str, question: Callable[[], T]) -> T | None:
        try:
            with guest_reads(f"rendering {what}"):
                return question()
        except (UnsupportedGuestError, CorruptGuestError, PageAbsentError) as error:
            self.tree.left_out.append(f"/proc/{what}: {error.message}")
            return None

    def _cpu_ids(self) -> int:
        count = read_word(self._kernel, variable(self._kernel, "nr_cpu_ids")) & 0xFFFF_FFFF
        if not 0 < count <= _MAX_CPUS:
            raise CorruptGuestError(f"the guest may have {count} processors")
        return count

    # --- the system ---

    def _file(self, name: str, question: Callable[[], bytes | None], mode: int = 0o444) -> None:
        content = self._ask(name, question)
        if content is not None:
            self.tree.file(name.encode(), content, mode)

    def add_system(self) -> None:
        """Add what is no process's."""
        # In one pass over the table of symbols; each alone would take one.
        names = (*system_stat.SYMBOLS, *cpuinfo.SYMBOLS, *sysctls.SYMBOLS, "cgrp_dfl_root")
        self._kernel.symbols.learn(names)
        self._system()
        self._sysctls()

    def _system(self) -> None:
        reader, kernel = self._reader, self._kernel
        for name, target in LINKS:
            self.tree.link(name, target)
        figures = system_stat.read_system_stat(kernel)
        self.tree.left_out += figures.untold
        activity, cpus = figures.activity, figures.cpus
        clocks = self._ask("uptime", lambda: read_clocks(kernel))
        self._file("version", lambda: figures.banner)
        self._file("cmdline", lambda: figures.cmdline and figures.cmdline + b"\n")
        self._file("filesystems", lambda: _given(system.filesystems, figures.filesystems))
        if figures.char_devices is not None and figures.block_majors is not None:
            self.tree.file(b"devices", system.devices(figures.char_devices, figures.block_majors))
        self._file("misc", lambda: _given(system.misc, figures.misc))
        if activity is not None:
            self.tree.file(b"loadavg", system.loadavg(activity))
        if activity is not None and cpus and clocks is not None:
            self.tree.file(b"stat", system.stat(cpus, activity, _boot_time(clocks)))
        if figures.idle_ns is not None and clocks is not None:
            self.tree.file(b"uptime", system.uptime(clocks.boottime_ns, figures.idle_ns))
        self._file("meminfo", lambda: _given(system.meminfo, figures.memory))
        self._file("cpuinfo", lambda: system.cpuinfo(cpuinfo.read_processors(kernel)))
        self._file("partitions", lambda: system.partitions(reader.block_devices.all))
        self._file("swaps", lambda: system.swaps(swap.read_swaps(kernel, reader.names)))
        self._file("modules", lambda: system.modules(loaded_modules.read_modules(kernel)))
        self._file("locks", lambda: system.locks(reader.held_locks()))

    def _sysctls(self) -> None:
        self.tree.folder(b"sys")
        for one in self._ask("sys", self._reader.sysctls) or ():
            parts = [part.replace("/", ".").encode() for part in one.name.split(".")]
            if any(part in (b"", b".", b"..") for part in parts):
                continue
            if one.value is None:
                self.tree.left_out.append(f"/proc/sys/{one.name}: {one.why}")
                continue
            for depth in range(1, len(parts)):
                above = b"sys/" + b"/".join(parts[:depth])
                if above not in self.tree.nodes:
                    self.tree.folder(above)
            path = b"sys/" + b"/".join(parts)
            if path not in self.tree.nodes:
                self.tree.file(path, one.value + b"\n", 0o644)

    # --- processes ---

    def add_processes(self) -> None:
        """Add a folder for each process."""
        stats = self._ask("PID/stat", lambda: TaskStats(self._kernel))
        if stats is None:
            return
        for task in self._view.tasks:
            known = self._reader.processes.get(task.pid)
            if known is None:
                continue
            figures = self._ask(f"{task.pid}/stat", functools.partial(stats.of, known))
            if figures is not None:
                self._process(task, figures)

    def _process(self, task: Task, figures: TaskStat) -> None:
        leader = figures.leader
        euid = (leader.uids[1], leader.gids[1])
        # task_dump_owner: the folders that all may enter are the exception
        owner = euid if figures.memory is None or figures.memory.dumpable else (0, 0)
        base = b"%d" % task.pid
        detail = self._ask(f"{task.pid}/status", lambda: self._reader.detail(task.pid))
        groups = detail.groups if detail is not None else ()
        self.tree.folder(base, owner=euid)

        def add(name: bytes, content: bytes, mode: int = 0o444) -> None:
            self.tree.file(base + b"/" + name, content, mode, owner)

        add(b"stat", process.stat(figures))
        add(b"status", process.status(figures, groups, self._cpus))
        add(b"statm", process.statm(figures.memory))
        add(b"comm", leader.comm + b"\n", 0o644)
        add(b"cmdline", b"".join(word + b"\0" for word in task.cmdline))
        add(b"limits", process.limits(figures.limits))
        add(b"oom_score_adj", b"%d\n" % figures.oom_score_adj, 0o644)
        add(b"loginuid", b"%d" % leader.loginuid, 0o644)
        add(b"sessionid", b"%d" % leader.sessionid)
        add(b"uid_map", process.id_map(figures.uid_map), 0o644)
        add(b"gid_map", process.id_map(figures.gid_map), 0o644)
        add(b"auxv", figures.memory.auxv if figures.memory else b"", 0o400)
        if task.exe is not None:
            self.tree.link(base + b"/exe", task.exe, owner=owner)
        if detail is not None:
            self._detail(base, detail, figures, owner)
        self._memory(base, task, owner)
        self._files(base, task, owner, euid)
        self._mounts(base, task, detail, owner)
        self._threads(base, task, figures, groups, owner, euid)
        if task.pid == 1:
            self._network(base)

    def _detail(
        self, base: bytes, detail: TaskDetail, figures: TaskStat, owner: tuple[int, int]
    ) -> None:
        for name, target in ((b"cwd", detail.cwd), (b"root", detail.root)):
            if target is not None:
                self.tree.link(base + b"/" + name, target, owner=owner)
        self.tree.file(base + b"/cgroup", process.cgroup(detail.cgroups), owner=owner)
        if detail.namespaces is None:
            return
        self.tree.folder(base + b"/ns", 0o511, owner)
        pid, time = figures.for_children
        numbers = {kind: getattr(detail.namespaces, kind) for kind in _NAMESPACES}
        numbers |= {"pid_for_children": pid, "time_for_children": time}
        for kind, number in numbers.items():
            if number:
                target = f"{kind.partition('_')[0]}:[{number}]".encode()
                self.tree.link(base + b"/ns/" + kind.encode(), target, owner=owner)

    def _memory(self, base: bytes, task: Task, owner: tuple[int, int]) -> None:
        vmas = self._ask(f"{task.pid}/maps", lambda: self._reader.maps(task.pid))
        if vmas is None:
            return
        self.tree.file(base + b"/maps", process.maps(vmas), owner=owner)
        memory = self._ask(f"{task.pid}/environ", lambda: self._reader.memory(task.pid))
        if memory is None:
            self.tree.file(base + b"/environ", b"", 0o400, owner)
            return
        try:
            words = self._ask(f"{task.pid}/environ", memory.environment)
        except NotHereError as error:
            self.tree.left_out.append(f"/proc/{task.pid}/environ: {error}")
            return
        if words is not None:
            content = b"".join(word + b"\0" for word in words)
            self.tree.file(base + b"/environ", content, 0o400, owner)

    def _files(
        self, base: bytes, task: Task, owner: tuple[int, int], euid: tuple[int, int]
    ) -> None:
        files = self._ask(f"{task.pid}/fd", lambda: self._reader.files(task.pid))
        if files is None:
            return
        self.tree.folder(base + b"/fd", 0o500, owner)
        self.tree.folder(base + b"/fdinfo", 0o555, euid)
        for file in files:
            mode = (0o500 if file.readable else 0) | (0o300 if file.writable else 0)
            self.tree.link(base + b"/fd/%d" % file.fd, file.path, mode, owner)
            self.tree.file(base + b"/fdinfo/%d" % file.fd, process.fdinfo(file), 0o444, owner)

    def _mounts(
        self, base: bytes, task: Task, detail: TaskDetail | None, owner: tuple[int, int]
    ) -> None:
        if detail is None or detail.namespaces is None:
            return
        known = self._reader.processes[task.pid]
        lines = self._ask(f"{task.pid}/mountinfo", lambda: self._tables.of(known))
        if lines is None:
            return
        files = self._mount_files.get(
            id(lines)
        )  # most processes share them, and the tables keep them
        if files is None:
            files = self._mount_files[id(lines)] = process.mounts(lines), process.mountinfo(lines)
        self.tree.file(base + b"/mounts", files[0], owner=owner)
        self.tree.file(base + b"/mountinfo", files[1], owner=owner)

    def _threads(
        self,
        base: bytes,
        task: Task,
        figures: TaskStat,
        groups: tuple[int, ...],
        owner: tuple[int, int],
        euid: tuple[int, int],
    ) -> None:
        self.tree.folder(base + b"/task", owner=euid)
        for thread in figures.threads:
            own = base + b"/task/%d" % thread.pid
            self.tree.folder(own, owner=euid)
            content = process.stat(figures, thread)
            self.tree.file(own + b"/stat", content, owner=owner)
            content = process.status(figures, groups, self._cpus, thread)
            self.tree.file(own + b"/status", content, owner=owner)
            self.tree.file(own + b"/comm", thread.comm + b"\n", 0o644, owner)
            text = b"".join(b"%d " % child for child in thread.children)
            self.tree.file(own + b"/children", text, owner=owner)

    def _network(self, base: bytes) -> None:
        """Show init's network namespace, which /proc/net leads to."""
        sockets = self._ask("net", lambda: SocketTables(self._kernel).read().bound)
        self.tree.folder(base + b"/net")
        if sockets is None:
            return
        for protocol in ("tcp", "tcp6", "udp", "udp6"):
            name = f"/net/{protocol}".encode()
            self.tree.file(base + name, network.inet(protocol, sockets))
        self.tree.file(base + b"/net/unix", network.unix(sockets))


def _boot_time(clocks: Clocks) -> int:
    """Return getboottime64() in seconds."""
    boot_s = clocks.realtime_s - clocks.boottime_ns // _SECOND_NS
    if clocks.realtime_offset_ns is not None:
        exact = clocks.realtime_offset_ns // _SECOND_NS
        if abs(exact - boot_s) <= 1:  # otherwise the guest has slept by itself
            return exact
    return boot_s


def _given(render: Callable[[T], bytes], value: T | None) -> bytes | None:
    return None if value is None else render(value)
