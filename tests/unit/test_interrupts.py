"""Signals and a VM that somebody starts end a run by an error, and leave no handler behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from ouassister.errors import InterruptedRunError, RunningVMError
from ouassister.interrupts import interruptible, watched

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def signal_self(*numbers: signal.Signals) -> None:
    """Wait for the error of the last signal; without one the test fails."""
    for number in numbers:
        os.kill(os.getpid(), number)
    wait()


def wait(seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    pytest.fail("nothing ended the wait")


@pytest.mark.parametrize("number", NUMBERS)
def test_signal_ends_the_run_by_its_name(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in NUMBERS]
    expected = pytest.raises(InterruptedRunError, match=f"ended by {number.name}")
    with expected as caught, interruptible():
        signal_self(number)
    assert caught.value.exit_status == 143
    assert [signal.getsignal(one) for one in NUMBERS] == before


def test_further_signals_do_not_disturb_the_cleaning_up() -> None:
    cleaned = []

    def work() -> None:
        try:
            signal_self(signal.SIGTERM)
        finally:
            for number in NUMBERS:
                os.kill(os.getpid(), number)
            cleaned.append(True)

    with pytest.raises(InterruptedRunError, match="SIGTERM"), interruptible():
        work()
    assert cleaned == [True]


def test_handlers_come_back_without_a_signal_and_after_an_error() -> None:
    before = [signal.getsignal(one) for one in NUMBERS]
    with interruptible():
        assert [signal.getsignal(one) for one in NUMBERS] != before
    with pytest.raises(ZeroDivisionError), interruptible():
        raise ZeroDivisionError
    assert [signal.getsignal(one) for one in NUMBERS] == before


def test_vm_that_is_started_ends_the_run_within_a_second() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    running = threading.Event()
    start = time.monotonic()
    running.set()
    expected = pytest.raises(RunningVMError, match="web1 was started while it was being updated")
    with expected, watched("web1", running.is_set):
        wait()
    assert time.monotonic() - start < 1
    assert signal.getsignal(signal.SIGUSR1) is before
    assert not watchers()


def test_vm_that_sleeps_on_is_left_in_peace() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    asked = threading.Event()

    def is_running() -> bool:
        asked.set()
        return False

    with watched("web1", is_running):
        assert asked.wait(5)
    assert signal.getsignal(signal.SIGUSR1) is before
    assert not watchers()


def test_error_of_the_block_passes_and_ends_the_watch() -> None:
    with pytest.raises(ZeroDivisionError), watched("web1", lambda: False):
        raise ZeroDivisionError
    assert not watchers()


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watch"]
