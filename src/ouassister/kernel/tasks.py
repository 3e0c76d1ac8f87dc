"""Processes: thread group leaders in the initial pid namespace.

Source: Linux v6.1 ``include/linux/sched.h`` (``struct task_struct``, ``TASK_*``, ``PF_*``),
``fs/proc/array.c`` (``task_state_array``), ``fs/proc/base.c`` (``get_mm_cmdline``). Names that
moved: ``__state`` since 2f064a59a11f ("sched: Change task_struct::state", v5.14);
``start_boottime`` since cf25e24db61c ("time: Rename tsk->real_start_time to ->start_boottime",
v5.5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, PageAbsentError
from ouassister.kernel import walk
from ouassister.kernel.paths import file_path
from ouassister.kernel.program import guest_reads
from ouassister.memory import NotMappedError, VirtualMemory
from ouassister.model import GuestPid, Task, VirtAddr

if TYPE_CHECKING:
    from drgn import Object

    from ouassister.kernel.program import Kernel

_PF_KTHREAD: Final = 0x0020_0000
_TASK_REPORT: Final = 0x7F
_STATE_CHARS: Final = "RSDTtXZP"  # by the highest set bit of state & TASK_REPORT
_UNINTERRUPTIBLE, _NOLOAD = 2, 0x400
_MAX_CMDLINE_BYTES: Final = 128 << 10  # MAX_ARG_STRLEN; longer ones are cut
_MAX_CMDLINES_BYTES: Final = 256 << 20  # of all processes
_PER_ARGUMENT: Final = 48  # what Python adds to each
_PAGE_SIZE: Final = 4096


def leaders(kernel: Kernel) -> dict[int, Object]:
    """Return every thread group leader, the idle task left out, by pid."""
    with guest_reads("walking the list of processes"):
        head = kernel.prog["init_task"].tasks.address_of_().value_()
        found = {}
        for node in walk.list_nodes(kernel, head):
            task = kernel.container("struct task_struct", "tasks", node)
            pid = task.pid.value_()
            if not 0 < pid <= 1 << 22 or pid in found:  # PID_MAX_LIMIT
                raise CorruptGuestError(f"a process has pid {pid}, twice or out of bounds")
            if pid == task.tgid.value_():
                found[pid] = task
    return found


def read_tasks(kernel: Kernel, tasks: dict[int, Object]) -> tuple[Task, ...]:
    """Describe each process."""
    described = []
    left = _MAX_CMDLINES_BYTES
    with guest_reads("reading the list of processes"):
        for pid in sorted(tasks):
            task = _task(kernel, tasks[pid])
            left -= sum(map(len, task.cmdline)) + len(task.cmdline) * _PER_ARGUMENT
            if left < 0:
                raise CorruptGuestError(
                    f"the command lines of processes take more than {_MAX_CMDLINES_BYTES} bytes"
                )
            described.append(task)
    return tuple(described)


def _task(kernel: Kernel, task: Object) -> Task:
    kernel_thread = bool(task.flags.value_() & _PF_KTHREAD)
    mm = task.mm.read_()
    user = not kernel_thread and bool(mm)
    return Task(
        pid=GuestPid(task.pid.value_()),
        parent=GuestPid(task.real_parent.tgid.value_()),
        comm=task.comm.string_(),
        state=_state(task),
        uid=task.real_cred.uid.val.value_(),
        exe=_exe(kernel, mm) if user else None,
        cmdline=_cmdline(kernel, mm) if user else (),
        start_ns=_start(task),
        kernel_thread=kernel_thread,
    )


def _state(task: Object) -> str:
    try:
        state = task.member_("__state").value_()
    except LookupError:
        state = task.state.value_()
    report = (state | task.exit_state.value_()) & _TASK_REPORT
    if report == _UNINTERRUPTIBLE and state & _NOLOAD:
        return "I"
    return _STATE_CHARS[report.bit_length()]


def _start(task: Object) -> int:
    try:
        start: int = task.start_boottime.value_()
    except AttributeError:
        start = task.real_start_time.value_()
    return start


def _exe(kernel: Kernel, mm: Object) -> bytes | None:
    file = mm.exe_file.read_()
    return file_path(kernel, file) if file else None


def _cmdline(kernel: Kernel, mm: Object) -> tuple[bytes, ...]:
    start, end = mm.arg_start.value_(), mm.arg_end.value_()
    if not start < end:
        return ()
    root = kernel.virtual.translate(mm.pgd.value_())
    space = VirtualMemory(kernel.memory, root, kernel.levels)
    try:
        raw = space.read(VirtAddr(start), min(end - start, _MAX_CMDLINE_BYTES))
        if raw[-1]:
            # A title that the process wrote over its arguments and environment (setproctitle)
            raw = _title(space, start, max(end, mm.env_end.value_()) - start)
    except (NotMappedError, PageAbsentError):
        return ()  # swapped out, or never saved: the caller cannot do anything about it
    return tuple(raw.removesuffix(b"\0").split(b"\0"))


def _title(space: VirtualMemory, start: int, size: int) -> bytes:
    size = min(size, _PAGE_SIZE)  # as get_mm_proctitle cuts it
    return space.read(VirtAddr(start), size).partition(b"\0")[0]
