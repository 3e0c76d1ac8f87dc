"""A function in a process of its own: its files, its errors, and its end."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from ouassister.beside import beside
from ouassister.errors import CorruptGuestError, InternalError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host


def test_what_it_wrote_is_there_when_it_was_waited_for(tmp_path: Path) -> None:
    def write() -> None:
        (tmp_path / "x").write_text("y")

    with beside(write) as running:
        running.wait()
        assert (tmp_path / "x").read_text() == "y"
        running.wait()  # once more is no harm


def test_its_error_comes_back_by_its_code() -> None:
    def fail() -> None:
        raise CorruptGuestError("a list without an end")

    with beside(fail) as running, pytest.raises(CorruptGuestError, match="a list without an end"):
        running.wait()


def test_a_defect_is_an_internal_error() -> None:
    def fail() -> None:
        raise KeyError("x")

    with beside(fail) as running, pytest.raises(InternalError, match="KeyError: 'x'"):
        running.wait()


def test_one_that_was_killed_is_an_error() -> None:
    with (
        beside(lambda: os.kill(os.getpid(), 9)) as running,
        pytest.raises(InternalError, match="ended with 0x9"),
    ):
        running.wait()


def test_it_does_not_outlive_the_block(tmp_path: Path) -> None:
    def hang() -> None:
        (tmp_path / "new").write_text(str(os.getpid()))
        (tmp_path / "new").rename(tmp_path / "pid")
        time.sleep(600)

    deadline = time.monotonic() + 30
    with beside(hang):
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
