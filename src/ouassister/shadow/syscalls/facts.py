"""What the guest's kernel tells of itself, as far as system calls ask for it; data only.

The record travels to the supervisor: small, and made of numbers and bytes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from ouassister.guest_model import GuestPid
from ouassister.model import Uts


@dataclass(frozen=True, slots=True)
class GuestProcess:
    """One process (thread group leader) of the guest.

    ``group``, ``session`` and ``limits`` are None and empty where the guest was not asked.
    """

    pid: GuestPid
    comm: bytes
    uid: int
    suid: int
    threads: tuple[GuestPid, ...] = ()
    nice: int = 0
    policy: int = 0  # SCHED_*
    priority: int = 0  # of a real-time policy
    group: int | None = None
    session: int | None = None
    limits: tuple[tuple[int, int], ...] = ()  # soft and hard, by RLIMIT_* number


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """What sysinfo(2) tells of memory, in bytes."""

    total: int = 0
    free: int = 0
    shared: int = 0
    buffers: int = 0
    swap_total: int = 0
    swap_free: int = 0


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """A sleeping guest, for the handlers of system calls.

    ``loads`` are of 1, 5 and 15 minutes, times 65536. ``mounted`` are the places of the guest's
    file systems, which a script must not take away.
    """

    uts: Uts
    processes: tuple[GuestProcess, ...] = ()
    cpus: int = 0  # 0: not known, the host's are told
    memory: GuestMemory | None = None
    uptime_s: int = 0
    loads: tuple[int, int, int] = (0, 0, 0)
    threads: int = 0
    mounted: tuple[bytes, ...] = ()
    listeners: tuple[bytes, ...] = ()  # see `ouassister.shadow.syscalls.daemons`

    @property
    def pids_end(self) -> int | None:
        """What is above every pid, thread and process group of the guest's; None: not known."""
        numbers = [
            number
            for one in self.processes
            for number in (one.pid, *one.threads, one.group or 0, one.session or 0)
        ]
        return max(numbers) + 1 if numbers else None
