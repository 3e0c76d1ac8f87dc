"""Runs one target on case after case, each within limits that end the process when it breaks them.

A case may end well or be refused with an error of ours. All else is a finding: another exception,
more processor time or memory than the target's limit, a signal. The case lies in a file before it
runs, so that whatever ends the process leaves it behind.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import resource
import signal
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar

from ouassister.errors import InternalError, OUassisterError

if TYPE_CHECKING:
    from collections.abc import Sequence

CORPUS = Path(__file__).parent / "corpus"


class Target(ABC):
    """Something that reads what a guest wrote."""

    cpu_s: ClassVar[float] = 10
    memory_mib: ClassVar[int] = 256
    internal: ClassVar[bool] = False  # whether InternalError is no finding

    @abstractmethod
    def make(self, random: Random) -> bytes:
        """Return a case; the same for the same numbers."""

    @abstractmethod
    def run(self, case: bytes) -> None:
        """Read it."""


@dataclasses.dataclass
class Tally:
    """What became of the cases."""

    cases: int = 0
    refused: int = 0
    slowest_s: float = 0.0  # of processor time


def run_cases(target: Target, cases: Sequence[bytes], current: Path, tally: Tally) -> None:
    """Run some cases; returns when none of them is a finding."""
    for case in cases:
        current.write_bytes(case)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, target.cpu_s)
        try:
            target.run(case)
        except OUassisterError as error:
            if isinstance(error, InternalError) and not target.internal:
                raise
            tally.refused += 1
            # What is shown to a person has to be showable.
            str(error).encode()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        tally.cases += 1
        tally.slowest_s = max(tally.slowest_s, time.process_time() - start)


def fuzz(target: Target, seed: str, seconds: float, current: Path) -> Tally:
    """Run new cases for some time, and one at least."""
    tally = Tally()
    end = time.monotonic() + seconds
    while True:
        random = Random(f"{seed}/{tally.cases}")  # noqa: S311 - no secret
        run_cases(target, [target.make(random)], current, tally)
        if time.monotonic() >= end:
            return tally


def limit(target: Target) -> None:
    """Bound this process: too slow ends in SIGPROF with a traceback, too large in MemoryError."""
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + (target.memory_mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    sys.setrecursionlimit(1000)
