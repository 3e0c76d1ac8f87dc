"""What recorders wrote is hostile text; what comes out are words of a small alphabet, bounded."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import InternalError, UpdaterError
from ouassister.model import Action
from ouassister.shadow.events import (
    END,
    Event,
    Outcome,
    actions_of,
    encode,
    read_events,
    read_syscalls,
    read_values,
)
from ouassister.shadow.procfs import recorder

if TYPE_CHECKING:
    from pathlib import Path

RELOAD = Action(("systemctl", "daemon-reload"))


def read(*lines: str) -> tuple[tuple[Action, ...], tuple[str, ...]]:
    """What becomes of deferred calls, each of words that are separated by tabs."""
    return actions_of(Event(Outcome.DEFERRED, tuple(line.split("\t"))) for line in lines)


def test_nothing_recorded_is_nothing_to_do() -> None:
    assert actions_of(()) == ((), ())


def test_calls_become_actions_in_their_order() -> None:
    actions, notes = read(
        "systemctl\tstart\tssh.service",
        "modprobe\tloop",
        "systemctl\t--no-block\trestart\tsystemd-udevd.service",
    )
    assert actions == (
        Action(("systemctl", "start", "ssh.service")),
        Action(("modprobe", "loop")),
        Action(("systemctl", "--no-block", "restart", "systemd-udevd.service")),
    )
    assert notes == ()


def test_reload_comes_first_and_once() -> None:
    actions, _notes = read(
        "systemctl\trestart\ta.service",
        "systemctl\t--system\tdaemon-reload",
        "systemctl\tdaemon-reload",
        "telinit\tq",
    )
    assert actions == (RELOAD, Action(("systemctl", "restart", "a.service")))


@pytest.mark.parametrize("line", ["systemctl\t--system\tdaemon-reexec", "telinit\tu"])
def test_a_new_service_manager_is_started_instead_of_a_reload(line: str) -> None:
    """A reload would leave the old program running: that of libc6 or systemd before the upgrade."""
    actions, _notes = read("systemctl\tdaemon-reload", line, "systemctl\tdaemon-reload")
    assert actions == (Action(("systemctl", "daemon-reexec")),)


def test_repeated_call_is_done_once_where_it_was_last() -> None:
    actions, _notes = read("modprobe\ta", "modprobe\tb", "modprobe\ta")
    assert actions == (Action(("modprobe", "b")), Action(("modprobe", "a")))


@pytest.mark.parametrize(
    "line",
    [
        "systemctl\tstart\ta;reboot",
        "systemctl\tstart\t$(reboot)",
        "systemctl\tstart\ta b",
        "systemctl\tstart\t'a'",
        "systemctl\tstart\t",
        "systemctl\tstart\t" + "a" * 256,
        "systemctl start a",
        "systemctl\tstart\ta\x1b[2J",
        "systemctl\tstart\té",
        "\t",
    ],
)
def test_odd_words_are_not_done_and_told_in_ascii(line: str) -> None:
    actions, notes = read(line)
    assert actions == ()
    assert len(notes) == 1
    assert notes[0].startswith("a recorded call with odd words is not done: ")
    assert notes[0].isascii()
    assert notes[0].isprintable()
    assert len(notes[0]) < 500


def test_unit_names_with_escapes_pass() -> None:
    line = "systemctl\tstart\tsystemd-fsck@dev-disk-by\\x2duuid-a.service\tpath:/x=y"
    assert read(line)[0] == (Action(tuple(line.split("\t"))),)


@pytest.mark.parametrize("kind", ["link", "pipe", "socket", "folder"])
def test_what_a_program_put_in_its_place_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "events"
    (tmp_path / "secret").write_text("root:x:0:0")
    if kind == "link":
        path.symlink_to("secret")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    else:
        path.mkdir()
    for reader in (read_events, read_values, read_syscalls):
        with pytest.raises(UpdaterError, match="a program in the shadow replaced events"):
            reader(path)


def test_too_many_calls_are_cut_and_told() -> None:
    lines = [f"systemctl\tstart\ts{i}.service" for i in range(4100)]
    actions, notes = read(*lines, "systemctl\tdaemon-reload")
    assert actions[0] == RELOAD
    assert len(actions) == 1 + 4096
    assert notes == ("4 recorded calls over the limit are not done",)


def test_values_below_proc_sys_are_read_as_they_were_recorded(tmp_path: Path) -> None:
    path = tmp_path / "values"
    assert read_values(path) == ()
    recorder(path)("net/ipv4/ip_forward", b"1")
    assert read_values(path) == (
        Event(Outcome.DEFERRED, ("sysctl", "-w", "net/ipv4/ip_forward=1")),
    )
    path.write_bytes(b"[]\n")
    with pytest.raises(InternalError, match="a record of values"):
        read_values(path)


# --- records of the stand-in ---


def test_events_survive_their_file(tmp_path: Path) -> None:
    events = (
        Event(Outcome.DEFERRED, ("systemctl", "start", "a.service"), "pkg", "postinst"),
        Event(Outcome.FOREIGN, ("org.x", "a\u20ac\n"), detail="why"),
    )
    path = tmp_path / "records"
    path.write_bytes(encode(events[0]) + END + encode(events[1]) + END)  # two programs
    assert read_events(path) == events
    path.write_bytes(b"")
    assert read_events(path) == ()


@pytest.mark.parametrize(
    "content",
    [
        encode(Event(Outcome.DONE, ())),
        END + encode(Event(Outcome.DONE, ())),
        END[:-1],
        b"{}\n" + END,
        b"[" * 100_000 + b"\n" + END,
        b"\xff\n" + END,
        encode(Event(Outcome.DONE, ())).replace(b"done", b"well") + END,
    ],
)
def test_records_that_are_damaged_or_end_early_are_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "records"
    path.write_bytes(content)
    with pytest.raises(InternalError, match=r"records? of the service manager"):
        read_events(path)


def test_outcomes_become_actions_and_notes() -> None:
    actions, notes = actions_of(
        (
            Event(Outcome.DEFERRED, ("systemctl", "stop", "a.service")),
            Event(Outcome.DONE, ("systemctl", "enable", "a.service"), "pkg"),
            Event(Outcome.DEFERRED, ("systemctl", "daemon-reload"), "pkg"),
            Event(Outcome.DEFERRED, ("systemctl", "start", "a.service"), "pkg"),
            Event(Outcome.DEFERRED, ("systemctl", "set-environment", "A=$(x)"), "pkg"),
            Event(Outcome.WITHHELD, ("systemctl", "reboot"), detail="later"),
            Event(Outcome.FOREIGN, ("org.x", "a.b.C"), "pkg", detail="\x1b[2J"),
            Event(Outcome.UNKNOWN, ("a.b.D", "/"), detail="no such method here"),
            Event(Outcome.LOST, (), detail="too many"),
        )
    )
    assert actions == (
        RELOAD,
        Action(("systemctl", "stop", "a.service")),
        Action(("systemctl", "start", "a.service")),
    )
    assert notes == (
        "a recorded call with odd words is not done: 'systemctl set-environment A=$(x)'"
        " (package pkg)",
        "a script asked for 'systemctl reboot': later",
        "a script called 'org.x a.b.C' (package pkg) and got an error: ?[2J",
        "a script called 'a.b.D /' and got an error: no such method here",
        "too many",
    )
