"""Everything a sleeping kernel can be asked, one method for each subject; nothing is read before.

Source: the modules it calls; each cites its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.guest_model import (
    GuestPid,
    MappedDevice,
    ProcessFiles,
    ProcessMaps,
    Subject,
    TaskDetail,
    Tmpfs,
    TmpfsContent,
)
from ouassister.kernel import (
    held_locks,
    loaded_modules,
    mounts,
    superblocks,
    swap,
    tasks,
)
from ouassister.kernel.blockdevs import BlockDevices
from ouassister.kernel.devicemapper import DeviceMapper
from ouassister.kernel.fields import read_string
from ouassister.kernel.file_names import FileNames
from ouassister.kernel.files import Files
from ouassister.kernel.netdevs import NetworkDevices
from ouassister.kernel.process_memory import ProcessMemory
from ouassister.kernel.program import guest_reads
from ouassister.kernel.sockets import SocketTables
from ouassister.kernel.sysctls import Sysctls
from ouassister.kernel.task_details import TaskDetails
from ouassister.kernel.tmpfs import TmpfsReader
from ouassister.kernel.tmpfs_content import Mounted, TmpfsContents
from ouassister.kernel.vmas import Vmas

if TYPE_CHECKING:
    from collections.abc import Callable

    from drgn import Object

    from ouassister.guest_model import HeldLock, OpenFile, Sysctl, Vma
    from ouassister.kernel.introspect import Guest
    from ouassister.model import GuestView

T = TypeVar("T")

_PF_KTHREAD: Final = 0x0020_0000
_MAX_ITEMS: Final = 1 << 21  # mappings, or open files, or threads of all processes
_SECURITY: Final = frozenset((b"securityfs",))
_IN_MEMORY: Final = frozenset((b"tmpfs", b"devtmpfs", b"ramfs"))
# Looked up in one pass over the table of symbols; each alone would take one.
_SYMBOLS: Final = (
    "__cpu_possible_mask", "__per_cpu_offset", "block_class", "cgroup_subsys", "class_kset",
    "file_lock_list", "init_net", "init_pid_ns", "jiffies_64", "modules", "nr_swapfiles",
    "special_mapping_vmops", "super_blocks", "swap_info", "sysctl_table_root", "tcp_hashinfo",
    "udp_table", "unix_socket_table", "vmemmap_base",
)  # fmt: skip


class GuestReader:
    """One guest's kernel, to be asked.

    Methods raise `UnsupportedGuestError` when this kernel does not tell,
    `CorruptGuestError` when it contradicts itself, and `PageAbsentError` when a page that is
    needed was never saved.

    Args:
        guest: The guest.

    Attributes:
        kernel: Its kernel.
        guest: The guest.
    """

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.kernel = guest.kernel
        self.kernel.symbols.learn(_SYMBOLS)

    # --- processes -------------------------------------------------------------------------

    @functools.cached_property
    def processes(self) -> dict[int, Object]:
        """``struct task_struct`` of every thread group leader, by pid."""
        return tasks.leaders(self.kernel)

    @functools.cached_property
    def names(self) -> FileNames:
        """Names of files."""
        with guest_reads("reading the layout of files"):
            return FileNames(self.kernel)

    def detail(self, pid: int) -> TaskDetail:
        """Describe one process."""
        return self._details.of(self.processes[pid])

    def maps(self, pid: int) -> tuple[Vma, ...]:
        """Describe the mappings of one process; a kernel thread or zombie has none."""
        mm = self._mm(pid)
        return self._vmas.read(mm) if mm else ()

    def files(self, pid: int) -> tuple[OpenFile, ...]:
        """Describe the open files of one process."""
        with guest_reads("reading the open files of a process"):
            files = self.processes[pid].files.value_()
        return self._files.read(files) if files else ()

    def memory(self, pid: int) -> ProcessMemory | None:
        """Open the memory of one process; None for a kernel thread or a zombie."""
        mm = self._mm(pid)
        return ProcessMemory(self.kernel, mm, self.maps(pid)) if mm else None

    def _mm(self, pid: int) -> int:
        with guest_reads("reading the memory of a process"):
            task = self.processes[pid]
            borrowed = task.flags.value_() & _PF_KTHREAD
            return 0 if borrowed else int(task.mm.value_())

    @functools.cached_property
    def _details(self) -> TaskDetails:
        with guest_reads("reading the layout of processes"):
            return TaskDetails(self.kernel, self.names)

    @functools.cached_property
    def _vmas(self) -> Vmas:
        with guest_reads("reading the layout of mappings"):
            return Vmas(self.kernel, self.names)

    @functools.cached_property
    def _files(self) -> Files:
        with guest_reads("reading the layout of open files"):
            return Files(self.kernel, self.names)

    # --- files and devices -----------------------------------------------------------------

    @functools.cached_property
    def namespace(self) -> mounts.Namespace:
        """The mounts of pid 1."""
        init = self.processes.get(1)
        if init is None:
            raise CorruptGuestError("the guest has no process 1")
        return mounts.read_namespace(self.kernel, init)

    def held_locks(self) -> tuple[HeldLock, ...]:
        """Describe every lock on a file."""
        return held_locks.read_held_locks(self.kernel, self.names)

    @functools.cached_property
    def block_devices(self) -> BlockDevices:
        """Disks and partitions."""
        return BlockDevices(self.kernel)

    def mapped_devices(self) -> tuple[MappedDevice, ...]:
        """Describe the device-mapper's tables."""
        devices = self.block_devices
        if not any(name.startswith("dm-") for name in devices.disks):
            return ()
        return DeviceMapper(self.kernel, devices).read()

    def sysctls(self) -> tuple[Sysctl, ...]:
        """Describe the values below /proc/sys."""
        return Sysctls(self.kernel).read()

    # --- tmpfs -----------------------------------------------------------------------------

    def tmpfs_mounts(self) -> list[tuple[bytes, Object]]:
        """Targets and ``struct super_block *`` of what pid 1 sees and is in memory alone."""
        return [(one.target, one.sb) for one in self._mounted(_IN_MEMORY)]

    def security_mounts(self) -> list[tuple[bytes, Object]]:
        """Likewise of what security modules show."""
        return [(one.target, one.sb) for one in self._mounted(_SECURITY)]

    def _mounted(self, kinds: frozenset[bytes]) -> list[Mounted]:
        """File systems of some kinds that pid 1 sees, each with all places where it is."""
        found: dict[int, tuple[bytes, Object, list[Object]]] = {}
        with guest_reads("looking for mounts of tmpfs"):
            for target, mount in self.namespace.mounts:
                sb = mount.mnt.mnt_sb.read_()
                if read_string(self.kernel, sb.s_type.name.value_(), 64) in kinds:
                    found.setdefault(sb.value_(), (target, sb, []))[2].append(mount)
        return [Mounted(target, sb, tuple(mounts)) for target, sb, mounts in found.values()]

    def tmpfs(self) -> tuple[Tmpfs, ...]:
        """Describe what each of them contains."""
        return tuple(self._tmpfs.read(target, sb) for target, sb in self.tmpfs_mounts())

    def tmpfs_content(self) -> tuple[TmpfsContent, ...]:
        """Describe all but devtmpfs, with the bytes that are in them."""
        contents = TmpfsContents(self.kernel, self._tmpfs)
        return contents.read(self._mounted(_IN_MEMORY - {b"devtmpfs"}))

    @functools.cached_property
    def _tmpfs(self) -> TmpfsReader:
        return TmpfsReader(self.kernel)

    # --- everything ------------------------------------------------------------------------

    def fill(self, view: GuestView, want: frozenset[Subject]) -> GuestView:
        """Add what is wanted to a view; what cannot be told is named in its ``degraded``."""
        answers: dict[str, Any] = {}
        for subject, name, question in self._questions():
            if subject in want:
                answers[name] = self._ask(name, question)
        details = self._each("details", self.detail) if Subject.TASKS in want else {}
        if Subject.MAPS in want:
            answers["maps"] = tuple(
                ProcessMaps(pid, vmas) for pid, vmas in self._each("mappings", self.maps).items()
            )
        if Subject.FILES in want:
            answers["files"] = tuple(
                ProcessFiles(pid, files)
                for pid, files in self._each("open files", self.files).items()
            )
        return dataclasses.replace(
            view,
            tasks=tuple(
                dataclasses.replace(task, detail=details.get(task.pid)) for task in view.tasks
            ),
            degraded=tuple(self.guest.degraded),
            **answers,
        )

    def _questions(self) -> tuple[tuple[Subject, str, Callable[[], object]], ...]:
        kernel = self.kernel
        return (
            (Subject.LOCKS, "held_locks", self.held_locks),
            (Subject.FILE_SYSTEMS, "superblocks", lambda: superblocks.read_superblocks(kernel)),
            (Subject.BLOCK_DEVICES, "block_devices", lambda: self.block_devices.all),
            (Subject.BLOCK_DEVICES, "mapped_devices", self.mapped_devices),
            (Subject.NETWORK, "network_devices", lambda: self._network().read()),
            (Subject.NETWORK, "sockets", lambda: self._sockets().read()),
            (Subject.MODULES, "modules", lambda: loaded_modules.read_modules(kernel)),
            (Subject.SWAP, "swaps", lambda: swap.read_swaps(kernel, self.names)),
            (Subject.SYSCTLS, "sysctls", self.sysctls),
            (Subject.TMPFS, "tmpfs", self.tmpfs),
            (Subject.TMPFS_CONTENT, "tmpfs_content", self.tmpfs_content),
        )

    def _network(self) -> NetworkDevices:
        with guest_reads("reading the layout of network devices"):
            return NetworkDevices(self.kernel)

    def _sockets(self) -> SocketTables:
        with guest_reads("reading the layout of sockets"):
            return SocketTables(self.kernel)

    def _each(self, what: str, question: Callable[[int], T]) -> dict[GuestPid, T]:
        found = {}
        total = 0
        for pid in sorted(self.processes):
            answer = self._ask(f"{what} of process {pid}", functools.partial(question, pid))
            if answer is not None:
                found[GuestPid(pid)] = answer
                total += _weight(answer)
                if total > _MAX_ITEMS:
                    self.guest.degraded.append(
                        f"{what}: more than {_MAX_ITEMS}, from process {pid}"
                    )
                    break
        return found

    def _ask(self, what: str, question: Callable[[], T]) -> T | None:
        """Ask; what is not told, or told otherwise in two places, is named and left out.

        Processors stop anywhere: a list that is just being changed is no reason to tell nothing.
        """
        try:
            with guest_reads(""):  # what is read is named below
                return question()
        except (UnsupportedGuestError, CorruptGuestError, PageAbsentError) as error:
            where = f" ({error.context})" if error.context else ""
            self.guest.degraded.append(f"{what.replace('_', ' ')}: {error.message}{where}")
            return None


def _weight(answer: object) -> int:
    if isinstance(answer, TaskDetail):
        return len(answer.threads) + len(answer.groups)
    return len(answer) if isinstance(answer, tuple) else 1
