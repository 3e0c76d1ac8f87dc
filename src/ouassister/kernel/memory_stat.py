"""Figures of a process's memory, as /proc/PID/statm and status have them.

Source: Linux v6.1 ``include/linux/mm_types.h`` (``struct mm_struct``), ``include/linux/mm.h``
(``get_mm_counter``), ``include/linux/sched/coredump.h`` (``MMF_DUMPABLE_MASK``),
``fs/proc/task_mmu.c``. ``rss_stat`` is an array of ``struct percpu_counter`` since f1a7941243c1
("mm: convert mm's rss stats into percpu_counter", v6.2), of which the kernel shows the common
part alone.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drgn import sizeof

from ouassister.guest_model import VirtAddr
from ouassister.kernel.fields import Fields, labels, offset, read_word

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel

_SUID_DUMP_USER: Final = 1  # of MMF_DUMPABLE_MASK, the two lowest bits
_MAX_AUXV: Final = 1024


@dataclass(frozen=True, slots=True)
class MemoryStat:
    """What /proc/PID/statm and status tell of memory; pages, and addresses."""

    total: int
    peak: int
    locked: int
    pinned: int
    resident_peak: int
    anonymous: int
    file: int
    shared: int
    swapped: int
    data: int
    stack: int
    executable: int
    page_tables: int  # bytes
    code: tuple[int, int]
    data_range: tuple[int, int]
    start_brk: int
    start_stack: int
    arguments: tuple[int, int]
    environment: tuple[int, int]
    auxv: bytes
    dumpable: bool  # otherwise what is in /proc/PID belongs to root

    @property
    def resident(self) -> int:
        """Pages in memory."""
        return self.anonymous + self.file + self.shared


class MemoryStats:
    """Figures of the memory of this kernel's processes; within `guest_reads`.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._mm = Fields(
            kernel, "struct mm_struct", "total_vm", "hiwater_vm", "locked_vm", "pinned_vm.counter",
            "hiwater_rss", "data_vm", "stack_vm", "exec_vm", "pgtables_bytes.counter", "start_code",
            "end_code", "start_data", "end_data", "start_brk", "start_stack", "arg_start",
            "arg_end", "env_start", "env_end",
        )  # fmt: skip
        self._mm_flags = offset(kernel, "struct mm_struct", "flags")  # be it a bitmap or a word
        self._auxv = (
            offset(kernel, "struct mm_struct", "saved_auxv"),
            min(sizeof(kernel.type("struct mm_struct").member("saved_auxv").type), _MAX_AUXV),
        )
        if (
            kernel.type("struct mm_struct")
            .member("rss_stat")
            .type.type_name()
            .startswith("struct percpu_counter")
        ):
            size = kernel.type("struct percpu_counter").size or 0
            start = offset(kernel, "struct mm_struct", "rss_stat") + offset(
                kernel, "struct percpu_counter", "count"
            )
        else:
            size, start = 8, offset(kernel, "struct mm_struct", "rss_stat.count")
        numbers = labels(kernel.prog.constant("MM_FILEPAGES").type_)  # it has no name
        self._rss = {
            name: start + size * numbers[name]
            for name in ("MM_FILEPAGES", "MM_ANONPAGES", "MM_SWAPENTS", "MM_SHMEMPAGES")
        }

    def read(self, mm: int) -> MemoryStat:
        """Describe a ``struct mm_struct *``."""
        (total, peak, locked, pinned, resident, data, stack, executable, tables, *marks) = (
            self._mm.read(mm)
        )
        rss: dict[str, int] = {}
        for name, place in self._rss.items():
            value = read_word(self._kernel, mm + place)
            rss[name] = 0 if value >> 63 else value  # get_mm_counter: a moment's negative is none
        at, size = self._auxv
        return MemoryStat(
            total=total,
            peak=max(peak, total),
            locked=locked,
            pinned=pinned,
            resident_peak=resident,
            anonymous=rss["MM_ANONPAGES"],
            file=rss["MM_FILEPAGES"],
            shared=rss["MM_SHMEMPAGES"],
            swapped=rss["MM_SWAPENTS"],
            data=data,
            stack=stack,
            executable=executable,
            page_tables=tables,
            code=(marks[0], marks[1]),
            data_range=(marks[2], marks[3]),
            start_brk=marks[4],
            start_stack=marks[5],
            arguments=(marks[6], marks[7]),
            environment=(marks[8], marks[9]),
            auxv=_auxv(self._kernel.virtual.read(VirtAddr(mm + at), size)),
            dumpable=read_word(self._kernel, mm + self._mm_flags) & 3 == _SUID_DUMP_USER,
        )


def _auxv(raw: bytes) -> bytes:
    """Cut the auxiliary vector behind its end (AT_NULL)."""
    for number, (kind, _) in enumerate(struct.iter_unpack("<QQ", raw[: len(raw) // 16 * 16])):
        if kind == 0:
            return raw[: (number + 1) * 16]
    return raw
