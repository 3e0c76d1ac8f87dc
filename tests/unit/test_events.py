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
    read_actions,
    read_events,
)
from ouassister.shadow.session import RECORDED

if TYPE_CHECKING:
    from pathlib import Path

PROGRAMS = frozenset(RECORDED)
RELOAD = Action(("systemctl", "daemon-reload"))


def read(folder: Path, text: str | bytes) -> tuple[tuple[Action, ...], tuple[str, ...]]:
    path = folder / "events"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_actions(path, PROGRAMS)


def test_no_file_means_that_nothing_was_recorded(tmp_path: Path) -> None:
    assert read_actions(tmp_path / "events", PROGRAMS) == ((), ())
    assert read(tmp_path, "") == ((), ())


def test_calls_become_actions_in_their_order(tmp_path: Path) -> None:
    actions, notes = read(
        tmp_path,
        "deb-systemd-invoke\tstart\tssh.service\n"
        "invoke-rc.d\tnginx\trestart\n"
        "systemctl\t--no-block\trestart\tsystemd-udevd.service\n",
    )
    assert actions == (
        Action(("deb-systemd-invoke", "start", "ssh.service")),
        Action(("invoke-rc.d", "nginx", "restart")),
        Action(("systemctl", "--no-block", "restart", "systemd-udevd.service")),
    )
    assert notes == ()


def test_reload_comes_first_and_once(tmp_path: Path) -> None:
    actions, _notes = read(
        tmp_path,
        "systemctl\trestart\ta.service\n"
        "systemctl\t--system\tdaemon-reload\n"
        "systemctl\tdaemon-reexec\n"
        "systemctl\tdaemon-reload\n",
    )
    assert actions == (RELOAD, Action(("systemctl", "restart", "a.service")))


def test_repeated_call_is_done_once_where_it_was_last(tmp_path: Path) -> None:
    line_a, line_b = "service\ta\trestart\n", "service\tb\trestart\n"
    actions, _notes = read(tmp_path, line_a + line_b + line_a)
    assert actions == (
        Action(("service", "b", "restart")),
        Action(("service", "a", "restart")),
    )


@pytest.mark.parametrize("verb", ["is-active", "is-failed", "show", "status", "list-units"])
def test_question_is_no_action_and_is_told_once(tmp_path: Path, verb: str) -> None:
    actions, notes = read(tmp_path, f"systemctl\t{verb}\tx.service\n" * 2)
    assert actions == ()
    assert notes == (f"a script asked 'systemctl {verb} x.service' and was told: unknown",)


@pytest.mark.parametrize(
    "line",
    [
        "rm\t-rf\t/",
        "/bin/systemctl\tstart\ta",
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
def test_odd_words_are_not_done_and_told_in_ascii(tmp_path: Path, line: str) -> None:
    actions, notes = read(tmp_path, line + "\n")
    assert actions == ()
    assert len(notes) == 1
    assert notes[0].startswith("a recorded call with odd words is not done: ")
    assert notes[0].isascii()
    assert notes[0].isprintable()
    assert len(notes[0]) < 500


def test_unit_names_with_escapes_pass(tmp_path: Path) -> None:
    line = "systemctl\tstart\tsystemd-fsck@dev-disk-by\\x2duuid-a.service\tpath:/x=y\n"
    assert read(tmp_path, line)[0] == (Action(tuple(line.rstrip().split("\t"))),)


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
    with pytest.raises(UpdaterError, match="a program in the shadow replaced events"):
        read_actions(path, PROGRAMS)


def test_any_bytes_are_taken(tmp_path: Path) -> None:
    actions, notes = read(tmp_path, bytes(range(256)) * 4)
    assert actions == ()
    assert all(note.isprintable() for note in notes)


def test_more_than_a_mebibyte_is_cut_at_a_line_and_told(tmp_path: Path) -> None:
    line = "systemctl\tstart\t" + "a" * 200
    whole = (1 << 20) // (len(line) + 1)
    actions, notes = read(tmp_path, f"{line}\n" * (whole + 5) + "systemctl\tstart\tlast\n")
    assert actions == (Action(tuple(line.split("\t"))),)
    assert notes == ("more than 1 MiB of recorded calls; the rest is not done",)


def test_too_many_calls_are_cut_and_told(tmp_path: Path) -> None:
    lines = "".join(f"service\ts{i}\tstart\n" for i in range(4100)) + "systemctl\tdaemon-reload\n"
    actions, notes = read(tmp_path, lines)
    assert actions[0] == RELOAD
    assert len(actions) == 1 + 4096
    assert notes == ("4 recorded calls over the limit are not done",)


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
