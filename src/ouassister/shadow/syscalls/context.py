"""What the handlers of one shadow share."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from ouassister.shadow.syscalls.notify import Call, Result
from ouassister.shadow.syscalls.standin import StandIns
from ouassister.shadow.syscalls.stopped import Stopped

if TYPE_CHECKING:
    from ouassister.shadow.syscalls.facts import GuestFacts, GuestProcess
    from ouassister.shadow.syscalls.records import Journal


class NotTheGuestsError(OSError):
    """A pid is no process of the guest's: the shadow's own, whose pids have gone round, or none.

    Pids go on from `sandbox.FIRST_PID` to the kernel's limit and then start from the lowest.
    """

    def __init__(self) -> None:
        super().__init__(errno.ESRCH, "no such process of the guest")


class Context:
    """The guest as it sleeps, and what the run has changed of it in name.

    Args:
        facts: The guest.
        journal: Takes what is written down.
        stopped: Knows which daemons the scripts have stopped.
    """

    def __init__(self, facts: GuestFacts, journal: Journal, stopped: Stopped | None = None) -> None:
        self.facts = facts
        self.journal = journal
        self.stopped = stopped or Stopped((), "/nonexistent")
        self.nodename = facts.uts.nodename.encode("utf-8", "surrogateescape")
        self.domainname = facts.uts.domainname.encode("utf-8", "surrogateescape")
        self.stand_ins = StandIns()
        self.processes: dict[int, GuestProcess] = {one.pid: one for one in facts.processes}
        self._threads: dict[int, GuestProcess] = {
            thread: one for one in facts.processes for thread in one.threads
        }

    def process(self, pid: int) -> GuestProcess:
        """The guest's process that a pid or a thread's id belongs to.

        Raises:
            NotTheGuestsError: There is none.
        """
        found = self.processes.get(pid) or self._threads.get(pid)
        if found is None:
            raise NotTheGuestsError
        return found

    def group(self, number: int) -> tuple[GuestProcess, ...]:
        """The guest's processes of a process group; where none tells its own, the leader.

        Raises:
            NotTheGuestsError: There is none.
        """
        found = tuple(one for one in self.facts.processes if one.group == number)
        return found or (self.process(number),)


Answerer = Callable[[Context, int, Call], Result]
"""Takes the context, the listener and the call; raises OSError to fail the call."""
