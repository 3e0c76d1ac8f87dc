"""The story of a run: what happens now, told on one stream, and how long each step took."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from ouassister.model import Phase
from ouassister.text import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Timeline:
    """Phases in order; each is told when it begins and ends.

    Args:
        tell: Takes one line; None stays silent.
        log: Takes a phase's name and "begin", "end" or the error's name; the history of a VM.
    """

    def __init__(
        self,
        tell: Callable[[str], None] | None = None,
        log: Callable[[str, str], None] | None = None,
    ) -> None:
        self._start = time.monotonic()
        self._tell = tell or (lambda _line: None)
        self._log = log or (lambda _step, _detail: None)
        self._phases: list[Phase] = []

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The finished phases."""
        return tuple(self._phases)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one step."""
        start = time.monotonic()
        self.say(f"{name} …")
        self._log(name, "begin")
        try:
            yield
        except BaseException as error:
            self._log(name, type(error).__name__)
            raise
        seconds = time.monotonic() - start
        self._phases.append(Phase(name, round(seconds, 4)))
        self._log(name, f"end {seconds:.3f} s")
        self.say(f"{name}: {seconds:.2f} s")

    def say(self, line: str) -> None:
        """Tell one line, escaped for a terminal, with the time since the run began."""
        self._tell(f"[{time.monotonic() - self._start:7.2f} s] {plain(line)}")

    def seconds(self, *names: str) -> float:
        """The sum of the phases with these names."""
        return sum(phase.seconds for phase in self._phases if phase.name in names)


def stderr_story(line: str) -> None:
    """Tell on standard error, at once."""
    print(line, file=sys.stderr, flush=True)
