"""Runs a function of ours in a process of its own, which knows all that this one does.

Reading memory is work for the processor; in a thread it would take turns with whoever waits for
it. What comes of it goes into files.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from typing import TYPE_CHECKING, Final

from ouassister.errors import InternalError, OUassisterError, from_code
from ouassister.shadow import raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAX_ERROR: Final = 1 << 16


class Running:
    """A function that runs.

    Args:
        pid: Of its process.
        answer: Where it tells how it ended: nothing, or an error's code and message.
    """

    def __init__(self, pid: int, answer: int) -> None:
        self._pid = pid
        self._answer = answer

    def wait(self) -> None:
        """Wait until it has ended.

        Raises:
            OUassisterError: What it raised, by its code.
        """
        if not self._pid:
            return
        with os.fdopen(self._answer, "rb") as pipe:
            told = pipe.read(_MAX_ERROR)
        pid, self._pid = self._pid, 0
        _pid, status = os.waitpid(pid, 0)
        if told:
            code, _, message = told.decode("utf-8", "replace").partition("\n")
            raise from_code(code, message)
        if status:
            raise InternalError(f"a process of ours ended with {status:#x}")

    def end(self) -> None:
        """End it, whatever it does."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            os.close(self._answer)
            self._pid = 0


@contextlib.contextmanager
def beside(function: Callable[[], None]) -> Iterator[Running]:
    """Start ``function``; it does not outlive the block.

    Called while no other thread runs: it would not be there in the new process.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _become(function, writer, parent)
    os.close(writer)
    running = Running(pid, reader)
    try:
        yield running
    finally:
        running.end()


def _become(function: Callable[[], None], answer: int, parent: int) -> None:
    status = 1
    gc.disable()  # it would write to all that both share, and the process is a short one
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return  # it died before the kernel was told
        function()
        status = 0
    except OUassisterError as error:
        os.write(answer, f"{error.code}\n{error.message}".encode("utf-8", "replace")[:_MAX_ERROR])
        status = 0
    except Exception as error:
        text = f"{InternalError.code}\n{type(error).__name__}: {error}"
        os.write(answer, text.encode("utf-8", "replace")[:_MAX_ERROR])
    finally:
        os._exit(status)
