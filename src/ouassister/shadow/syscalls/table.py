"""The support table of system calls: what is answered from the guest, and what is kept away.

Everything that stands in no row goes to the host's kernel, inside the namespaces of the shadow.
Numbers: Linux arch/x86/entry/syscalls/syscall_64.tbl and syscall_32.tbl.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Answer(StrEnum):
    """How a call is answered."""

    NOTIFY = "emulated"  # by a handler, from the guest's kernel
    SUCCEED = "elided"  # returns 0 and does nothing
    REFUSE = "refused"  # fails with ``errno``


@dataclass(frozen=True, slots=True)
class Row:
    """One system call: its numbers per architecture (None where it does not exist)."""

    name: str
    x86_64: int | None
    i386: int | None
    answer: Answer
    note: str
    errno: int = 0


_SYNC_NOTE: Final = "the union layer is thrown away or extracted, which syncs by itself"
_KERNEL_NOTE: Final = "would reach the host's kernel"

TABLE: Final[tuple[Row, ...]] = (
    Row("uname", 63, 122, Answer.NOTIFY, "the guest's struct new_utsname"),
    Row("olduname", None, 109, Answer.REFUSE, "obsolete struct; no program found", errno.ENOSYS),
    Row("oldolduname", None, 59, Answer.REFUSE, "obsolete struct; no program found", errno.ENOSYS),
    Row("sync", 162, 36, Answer.SUCCEED, _SYNC_NOTE),
    Row("fsync", 74, 118, Answer.SUCCEED, _SYNC_NOTE),
    Row("fdatasync", 75, 148, Answer.SUCCEED, _SYNC_NOTE),
    Row("msync", 26, 144, Answer.SUCCEED, _SYNC_NOTE),
    Row("sync_file_range", 277, 314, Answer.SUCCEED, _SYNC_NOTE),
    Row("syncfs", 306, 344, Answer.SUCCEED, _SYNC_NOTE),
    Row("io_uring_setup", 425, 425, Answer.REFUSE, "bypasses system call filters", errno.ENOSYS),
    Row("io_uring_enter", 426, 426, Answer.REFUSE, "bypasses system call filters", errno.ENOSYS),
    Row("io_uring_register", 427, 427, Answer.REFUSE, "bypasses the filter", errno.ENOSYS),
    Row("bpf", 321, 357, Answer.REFUSE, _KERNEL_NOTE, errno.ENOSYS),
    Row("perf_event_open", 298, 336, Answer.REFUSE, _KERNEL_NOTE, errno.ENOSYS),
    Row("userfaultfd", 323, 374, Answer.REFUSE, _KERNEL_NOTE, errno.ENOSYS),
    Row("add_key", 248, 286, Answer.REFUSE, _KERNEL_NOTE, errno.ENOSYS),
    Row("request_key", 249, 287, Answer.REFUSE, _KERNEL_NOTE, errno.ENOSYS),
    Row("keyctl", 250, 288, Answer.REFUSE, _KERNEL_NOTE, errno.ENOSYS),
    Row("init_module", 175, 128, Answer.REFUSE, _KERNEL_NOTE, errno.EPERM),
    Row("finit_module", 313, 350, Answer.REFUSE, _KERNEL_NOTE, errno.EPERM),
    Row("delete_module", 176, 129, Answer.REFUSE, _KERNEL_NOTE, errno.EPERM),
    Row("kexec_load", 246, 283, Answer.REFUSE, _KERNEL_NOTE, errno.EPERM),
    Row("kexec_file_load", 320, None, Answer.REFUSE, _KERNEL_NOTE, errno.EPERM),
    Row("reboot", 169, 88, Answer.REFUSE, _KERNEL_NOTE, errno.EPERM),
    Row("swapon", 167, 87, Answer.REFUSE, _KERNEL_NOTE, errno.EPERM),
    Row("swapoff", 168, 115, Answer.REFUSE, _KERNEL_NOTE, errno.EPERM),
    Row("syslog", 103, 103, Answer.REFUSE, "the host's kernel log", errno.EPERM),
)
