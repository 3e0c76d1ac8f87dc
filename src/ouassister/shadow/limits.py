"""What the guest's programs may take of the host, beside time: processes, memory, files, output.

A control group (`cgroups`) counts all of a shadow together. For what has none, there are resource
limits, which do what they can:

    RLIMIT_NPROC   without a group for processes. It counts those of one user of the guest, ours of
                   the same id included; a program with many users has it for each
    RLIMIT_FSIZE   one file is not larger than what the disk has left. Only a sum fills a disk, and
                   `room` looks at that; but fallocate(2) takes any size at once
    RLIMIT_CORE    none
    oom_score_adj  without a group for memory, the kernel ends something of the shadow first when
                   memory is short, and of that the largest. Set by the keeper for all: who has
                   changed its owner may not write it any more

RLIMIT_AS and RLIMIT_DATA are not: they count what is reserved, not what is used, and a runtime
reserves more than a host has.

Source: setrlimit(2); Linux v6.1 kernel/ucount.c (``is_rlimit_overlimit``), kernel/fork.c
(``copy_process``: only the capabilities of the host's root lift RLIMIT_NPROC);
proc_pid_oom_score_adj(5).
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.shadow.cgroups import MEMORY, PIDS, Group, find

if TYPE_CHECKING:
    from ouassister.shadow.syscalls.records import Recorder

_LEAST_MEMORY: Final = 1 << 30
_WHO_ENDS_FIRST: Final = "/proc/self/oom_score_adj"
_MOST_LIKELY: Final = "1000"
_WHAT: Final = {PIDS: "{} processes", MEMORY: "{} bytes of memory"}


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of the host one shadow may take.

    Attributes:
        pids: Processes and threads, all together.
        memory_bytes: With what they keep in a tmpfs; 0 for half of the host's.
        output_bytes: What one program prints; more is dropped.
        grouped: Make a control group, where the host lets us.
    """

    pids: int = 4096
    memory_bytes: int = 0
    output_bytes: int = 64 << 20
    grouped: bool = True

    def memory(self) -> int:
        """The bytes of memory."""
        if self.memory_bytes:
            return self.memory_bytes
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(_LEAST_MEMORY, total // 2)


class Bounds:
    """The limits of one shadow, in force for whoever enters.

    Made by the keeper, which has the caller's rights, for all that it will start; entered by
    programs, which have none.

    Args:
        limits: How much.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._most = {PIDS: limits.pids, MEMORY: limits.memory()}
        self._group = Group(find() if limits.grouped else (), self._most)
        self._untold = self._group.refused
        if MEMORY not in self._group.controllers:
            Path(_WHO_ENDS_FIRST).write_text(_MOST_LIKELY)

    @property
    def controllers(self) -> tuple[str, ...]:
        """What the control group bounds."""
        return self._group.controllers

    def enter(self, largest_file: int, recorder: Recorder | None) -> None:
        """Bound the calling process and what it starts.

        Args:
            largest_file: Bytes.
            recorder: Told when the control group cannot be entered; None where that was told.
        """
        grouped = self.controllers
        try:
            self._group.join()
        except OSError as error:
            grouped = ()
            if recorder is not None:
                recorder(record(f"the control group cannot be entered: {error.strerror}"))
        if PIDS not in grouped:
            _lower(resource.RLIMIT_NPROC, self.limits.pids)
        _lower(resource.RLIMIT_FSIZE, largest_file)
        _lower(resource.RLIMIT_CORE, 0)

    def tell_reached(self, recorder: Recorder) -> None:
        """Write down which limits of the group refused something since the last call.

        At the first call also what could not be put into one.
        """
        for refused in self._untold:
            recorder(record(f"no control group bounds programs in the shadow: {refused}"))
        self._untold = ()
        for controller in self._group.reached():
            what = _WHAT[controller].format(self._most[controller])
            recorder(record(f"programs in the shadow reached the limit of {what}"))

    def remove(self) -> None:
        """Remove the control group, after its last process."""
        self._group.remove()


def record(detail: str) -> dict[str, object]:
    """A limit that was reached, for `ouassister.shadow.events.read_syscalls`."""
    return {
        "kind": "limit",
        "name": "limit",
        "outcome": "limited",
        "args": [],
        "package": "",
        "program": "",
        "detail": detail,
    }


def _lower(what: int, most: int) -> None:
    _soft, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(what, (most, most))
