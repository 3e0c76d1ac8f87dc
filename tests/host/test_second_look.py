"""A command whose channel is lost: seen to its end, and done again apart; by a real shell."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, ClassVar, cast

import pytest

from ouassister.errors import ChannelError, DeadlineError
from ouassister.provider.channel import Channel, ExecResult
from ouassister.reflect import apart, bootstrap, second_look

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ouassister.provider.interface import Running

pytestmark = pytest.mark.host


class Here(Channel):
    """This host as if it were a guest; it is lost where it is told to be.

    ``lost`` has a word of the program's arguments, and how often a program with it loses us.
    """

    name: ClassVar[str] = "here"

    def __init__(self) -> None:
        self.lost: dict[str, int] = {}
        self.ran: list[str] = []
        self.ended = False

    def runs(self) -> bool:
        return not self.ended

    def channel(self) -> Here:
        return self

    def ping(self, *, timeout_s: float = 5.0) -> None:
        raise AssertionError("nobody asks for this here")

    def close(self) -> None:
        raise AssertionError("nobody asks for this here")

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float,
        most_s: float = 0.1,
    ) -> ExecResult:
        words = " ".join(argv)
        self.ran.append(words)
        for word, times in self.lost.items():
            if word in words and times:
                self.lost[word] -= 1
                raise ChannelError(f"lost at {word}")
        done = subprocess.run(
            argv, input=stdin, capture_output=True, check=False, timeout=timeout_s
        )
        return ExecResult(done.returncode, done.stdout, done.stderr, False)

    def write_file(self, path: str, content: bytes, *, timeout_s: float = 30.0) -> None:
        self.run(["/bin/sh", "-c", f"cat >{path}"], stdin=content, timeout_s=timeout_s)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setattr(apart, "_PLACE", str(tmp_path))
    monkeypatch.setattr(apart, "_PAUSE_S", 0.0)
    monkeypatch.setattr(second_look, "_PAUSE_S", 0.0)
    # Others may try the same on this host, and nothing that they run is meant.
    monkeypatch.setattr(bootstrap, "await_command", lambda: ["/bin/sh", "-c", "exit 0 # await"])
    return Here()


def run_apart(here: Here, *argv: str, stdin: bytes = b"", timeout_s: float = 60.0) -> ExecResult:
    return apart.run(cast("Running", here), argv, stdin=stdin, timeout_s=timeout_s)


def test_command_apart_tells_what_it_would_have_told(here: Here, tmp_path: Path) -> None:
    script = 'cat; printf "<%s>" "$@"; echo "err" >&2; exit 7'
    done = run_apart(here, "/bin/sh", "-c", script, "sh", "a b", "'$HOME", "", stdin=b"\0in\xff")
    assert done == ExecResult(7, b"\0in\xff<a b><'$HOME><>", b"err\n", False)
    assert run_apart(here, "/bin/sh", "-c", "kill -9 $$").exit_status == -9
    assert list(tmp_path.iterdir()) == []


def test_command_apart_is_asked_for_until_the_channel_is_back(here: Here) -> None:
    here.lost = {"while [": 3}
    assert run_apart(here, "/bin/echo", "there").stdout == b"there\n"
    assert here.lost == {"while [": 0}


def test_channel_that_does_not_come_back_is_told(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "_BACK_S", 0.0)
    here.lost = {"while [": 1}
    with pytest.raises(ChannelError, match="lost at"):
        run_apart(here, "/bin/echo", "there")


def test_channel_of_a_vm_that_has_ended_is_not_waited_for(here: Here) -> None:
    here.ended = True
    here.lost = {"echo": 1, "await": 1}
    with pytest.raises(ChannelError, match="lost at"):
        second_look.run(cast("Running", here), ["/bin/echo", "there"], timeout_s=60)
    assert here.lost == {"echo": 0, "await": 1}
    here.lost = {"while [": 1}
    with pytest.raises(ChannelError, match="lost at"):
        run_apart(here, "/bin/echo", "there")


def test_command_apart_that_does_not_end_in_time_is_told(here: Here) -> None:
    with pytest.raises(DeadlineError, match="cat still runs"):
        run_apart(here, "/bin/cat", timeout_s=0.0)


def test_what_was_taken_away_in_the_guest_is_no_result(here: Here, tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match="the guest removed"):
        run_apart(here, "/bin/sh", "-c", f"sleep 0.1; rm -r {tmp_path}/ouassister-apart-*")
    with pytest.raises(ChannelError, match="malformed"):
        run_apart(here, "/bin/sh", "-c", "echo nonsense >./status; rm ./status.new; exec sleep 1")


def test_lost_command_is_awaited_and_done_again_apart(here: Here, tmp_path: Path) -> None:
    here.lost = {"twice": 1, "await": 2}
    count = ["/bin/sh", "-c", f"cat; echo twice >>{tmp_path}/count; cat {tmp_path}/count"]
    done = second_look.run(cast("Running", here), count, stdin=b"x", timeout_s=60)
    assert done.stdout == b"xtwice\n"
    assert here.lost == {"twice": 0, "await": 0}
    assert [one for one in here.ran if "systemd-run" in one]
    here.ran.clear()
    done = second_look.run(cast("Running", here), count, stdin=b"x", timeout_s=60)
    assert done.stdout == b"xtwice\ntwice\n"
    assert len(here.ran) == 1  # nothing was lost


def test_lost_command_is_not_done_again_before_its_end_was_seen(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_look, "_BACK_S", 0.0)
    here.lost = {"once": 1, "await": 1}
    with pytest.raises(ChannelError, match="lost at await"):
        second_look.run(cast("Running", here), ["/bin/echo", "once"], timeout_s=60)
    assert len(here.ran) == 2


def test_command_that_cannot_be_begun_apart_either_is_given_up(here: Here) -> None:
    here.lost = {"once": 1, "systemd-run": 1}
    done = second_look.run(cast("Running", here), ["/bin/echo", "once"], timeout_s=60)
    assert done.stdout == b"once\n"
    here.lost = {"once": 1, "systemd-run": 2}
    with pytest.raises(ChannelError, match="lost at systemd-run"):
        second_look.run(cast("Running", here), ["/bin/echo", "once"], timeout_s=60)
