"""What ends a run early: signals, and a VM that somebody starts while it is being updated."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Final

from ouassister.errors import InterruptedRunError, RunningVMError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_WATCH_S: Final = 0.3
_STARTED: Final = signal.SIGUSR1


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into an error of the main thread, so that all is cleaned up.

    Further signals are ignored while the first is being handled.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def end(number: int, _frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise InterruptedRunError(f"ended by {signal.Signals(number).name}")

    before = [(number, signal.signal(number, end)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextlib.contextmanager
def watched(name: str, is_running: Callable[[], bool]) -> Iterator[None]:
    """End the block when the VM is started by somebody else; the VM is not disturbed.

    Raises:
        RunningVMError: It was started.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_S):
            try:
                started = is_running()
            except OSError:  # who cannot tell must not go on
                started = True
            if started:
                os.kill(os.getpid(), _STARTED)
                return

    def end(_number: int, _frame: FrameType | None) -> None:
        if not done.is_set():
            done.set()
            raise RunningVMError(
                f"{name} was started while it was being updated, or its disk went away"
            )

    before = signal.signal(_STARTED, end)
    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.signal(_STARTED, before)
