"""The guest agent as a hostile peer: what it may send, and what it may withhold."""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import AgentEndedError, AgentError, DeadlineError
from ouassister.provider import qga
from ouassister.provider.qga import Qga

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Serve = Callable[..., Qga]


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Connect to an agent that syncs properly and answers by the given function.

    With ``deaf``, as behind a port that was held back: only once somebody has hung up. With
    ``late``, only once something else was asked.
    """
    path = tmp_path / "qga.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    opened: list[Qga] = []
    threads: list[threading.Thread] = []

    def work(answer: Callable[[str, object], bytes], *, deaf: bool, late: bool) -> None:
        peer, _ = listener.accept()
        if deaf:
            with peer:
                while peer.recv(4096):
                    pass
            peer, _ = listener.accept()
        held = b""
        before = b'{"return": "stale"}\n'
        with peer, peer.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line.lstrip(b"\xff"))
                if request["execute"] == "guest-sync-delimited":
                    reply = held + before + b"\xff" + _line({"return": request["arguments"]["id"]})
                    held = b""
                    before = b'{"error": {"desc": "JSON parse error, stray"}}\n'
                else:
                    reply = answer(request["execute"], request["arguments"])
                    if late:
                        held, reply = reply, b""
                try:
                    peer.sendall(reply)
                except OSError:
                    return  # the client had enough

    def start(
        answer: Callable[[str, object], bytes], *, deaf: bool = False, late: bool = False
    ) -> Qga:
        how = {"deaf": deaf, "late": late}
        threads.append(threading.Thread(target=work, args=(answer,), kwargs=how))
        threads[-1].start()
        opened.append(Qga(path))
        return opened[-1]

    yield start
    for agent in opened:
        agent.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    listener.close()


def test_who_gets_no_first_answer_hangs_up_and_comes_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qga, "_SYNC_S", 1.0)
    agent = serve(lambda _name, _arguments: _line({"return": {"pid": 7}}), deaf=True)
    assert agent.start(["/bin/true"], timeout_s=60) == 7


def test_stale_replies_are_dropped(serve: Serve) -> None:
    agent = serve(lambda _name, _arguments: _line({"return": {"pid": 7}}))
    assert agent.start(["/bin/true"]) == 7


def test_endless_reply_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qga, "_REPLY_LIMIT", 1 << 20)
    agent = serve(lambda _name, _arguments: b"x" * (4 << 20))
    with pytest.raises(AgentError, match="more than"):
        agent.ping()


def test_silence_ends_at_the_deadline(serve: Serve) -> None:
    agent = serve(lambda _name, _arguments: b"")
    with pytest.raises(DeadlineError):
        agent.ping(timeout_s=0.1)


def test_reply_after_its_deadline_is_not_taken_for_the_next(serve: Serve) -> None:
    answers = iter([b"", _line({"return": "late"}) + _line({"return": {"pid": 8}})])
    agent = serve(lambda _name, _arguments: next(answers))
    with pytest.raises(DeadlineError):
        agent.ping(timeout_s=0.1)
    with pytest.raises(AgentError, match="no pid"):
        agent.start(["/bin/true"])  # "late" came after the sync: an agent that lies is refused


@pytest.mark.parametrize("torn", [b"", b'{"return": {"exi'])
def test_agent_that_ends_with_a_question_is_told_apart_from_a_silent_one(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    monkeypatch.setattr(qga, "_SYNC_S", 1.0)
    answers = iter([torn, _line({"return": {"pid": 8}})])
    agent = serve(lambda _name, _arguments: next(answers))
    with pytest.raises(AgentEndedError, match="guest-ping"):
        agent.ping(timeout_s=60)
    assert agent.start(["/bin/true"]) == 8


def test_program_is_asked_for_again_when_the_agent_took_the_question_along(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qga, "_SYNC_S", 1.0)
    ended = {"return": {"exited": True, "exitcode": 3}}
    answers = iter([_line({"return": {"pid": 8}}), b"", _line(ended)])
    agent = serve(lambda _name, _arguments: next(answers))
    assert agent.run(["/bin/false"], timeout_s=60).exit_status == 3


def test_answer_of_a_slow_agent_is_taken(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    # A program's result is told once: it must not be dropped for what was asked behind it.
    monkeypatch.setattr(qga, "_SYNC_S", 1.0)
    pids = iter([7, 8])
    agent = serve(lambda _name, _arguments: _line({"return": {"pid": next(pids)}}), late=True)
    assert agent.start(["/bin/true"], timeout_s=60) == 7
    assert agent.start(["/bin/true"], timeout_s=60) == 8


@pytest.mark.parametrize(
    "reply",
    [
        b"nonsense\n",
        b"[1]\n",
        b"7\n",
        b'{"error": 7}\n',
        b'{"error": {}}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
    ],
)
def test_malformed_reply_is_refused(serve: Serve, reply: bytes) -> None:
    agent = serve(lambda _name, _arguments: reply)
    with pytest.raises(AgentError):
        agent.ping()


def test_refusal_carries_the_agents_words_escaped(serve: Serve) -> None:
    agent = serve(lambda _name, _arguments: _line({"error": {"desc": "no \x1b[31m" * 1000}}))
    with pytest.raises(AgentError, match="guest-ping") as caught:
        agent.ping()
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 5000


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"exited": "yes"},
        {"exited": True},
        {"exited": True, "exitcode": "0"},
        {"exited": True, "exitcode": 0, "out-data": 7},
        {"exited": True, "exitcode": 0, "out-data": "*"},
        [],
    ],
)
def test_malformed_exec_status_is_refused(serve: Serve, status: object) -> None:
    agent = serve(lambda _name, _arguments: _line({"return": status}))
    with pytest.raises(AgentError):
        agent.status(7)


def test_agent_without_guest_exec_is_told_apart(serve: Serve) -> None:
    commands = [{"name": "guest-exec", "enabled": False}, {"name": "guest-ping", "enabled": True}]
    agent = serve(lambda _name, _arguments: _line({"return": {"supported_commands": commands}}))
    assert agent.enabled("guest-ping")
    assert not agent.enabled("guest-exec")
    assert not agent.enabled("guest-exec-status")


def test_malformed_info_is_refused(serve: Serve) -> None:
    agent = serve(lambda _name, _arguments: _line({"return": {"supported_commands": [1]}}))
    with pytest.raises(AgentError, match="guest-info"):
        agent.enabled("guest-exec")


def test_program_that_does_not_end_meets_its_deadline(serve: Serve) -> None:
    agent = serve(lambda _name, _arguments: _line({"return": {"pid": 7, "exited": False}}))
    with pytest.raises(DeadlineError, match="still runs"):
        agent.run(["/bin/sleep"], timeout_s=0.1)
