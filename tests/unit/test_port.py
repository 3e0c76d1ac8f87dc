"""The helper on a virtio port as a hostile peer: what it may send, and what it may withhold."""

from __future__ import annotations

import base64
import socket
import threading
import zlib
from typing import TYPE_CHECKING

import pytest

from ouassister.errors import ChannelError, DeadlineError
from ouassister.provider import port
from ouassister.provider.port import PortChannel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Answer = Callable[[list[bytes]], bytes]
    Serve = Callable[..., PortChannel]


def said(words: str) -> bytes:
    text = f"{words} ".encode()
    return b"\n%s%08x\n" % (text, zlib.crc32(text))


def silent(_words: list[bytes]) -> bytes:
    return b""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Connect to a helper that is there, and answers ``run`` by the given function.

    With ``deaf``, as behind a port that was held back: only once somebody has hung up.
    """
    path = tmp_path / "port.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    opened: list[PortChannel] = []
    threads: list[threading.Thread] = []

    def work(answer: Answer, *, deaf: bool) -> None:
        peer, _ = listener.accept()
        if deaf:
            with peer:
                while peer.recv(4096):
                    pass
            peer, _ = listener.accept()
        with peer, peer.makefile("rb") as lines:
            for line in lines:
                words = line.split()
                reply = b""
                if words[:1] == [b"ask"]:
                    reply = said(f"here {words[1].decode()} 1")
                elif words[:1] == [b"run"]:
                    reply = answer(words)
                try:
                    peer.sendall(reply)
                except OSError:
                    return  # the client had enough

    def start(answer: Answer, *, deaf: bool = False) -> PortChannel:
        threads.append(threading.Thread(target=work, args=(answer,), kwargs={"deaf": deaf}))
        threads[-1].start()
        opened.append(PortChannel(path))
        return opened[-1]

    yield start
    for channel in opened:
        channel.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    listener.close()


def answers(*lines: str) -> Answer:
    """Lines in which ID stands for the program's."""
    return lambda words: b"".join(said(line.replace("ID", words[1].decode())) for line in lines)


def _data(text: bytes) -> str:
    return base64.b64encode(text).decode()


def test_who_gets_no_first_answer_hangs_up_and_comes_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port, "_ANSWER_S", 1.0)
    assert serve(answers("end ID 0 exit 3"), deaf=True).run(["x"], timeout_s=60).exit_status == 3


def test_result_is_taken_from_its_lines_among_others(serve: Serve) -> None:
    stale = "end 0123456789abcdef 0 exit 9"
    out = f"out ID 0 {_data(b'one ')}"
    channel = serve(
        answers(
            stale, out, f"err ID 1 {_data(b'oh')}", f"out ID 2 {_data(b'two')}", "end ID 3 exit 7"
        )
    )
    done = channel.run(["x"], timeout_s=10)
    assert (done.exit_status, done.stdout, done.stderr, done.truncated) == (
        7,
        b"one two",
        b"oh",
        False,
    )


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("out ID 1 QQ==",), "a line of the helper was lost"),
        (("end ID 1 exit 0",), "a line of the helper was lost"),
        (("out ID 0 Q=Q=",), "not base64"),
        (("out ID zero QQ==",), "protocol"),
        (("end ID 0 exit many",), "protocol"),
        (("end ID 99999999999999999999 exit 1",), "protocol"),
        (("here ID 1",), "protocol"),
        (("not ID 2",), "did not start in the guest: No such file"),
    ],
)
def test_helper_that_does_not_keep_to_its_protocol_is_told(
    serve: Serve, lines: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ChannelError, match=words):
        serve(answers(*lines)).run(["x"], timeout_s=10)


def test_lines_that_are_none_are_no_answer(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "_ANSWER_S", 60)
    odd = b"\n\xff\0\nout \nend 0 0 exit 0 00000000\n" + said("end") + said("what is this")
    channel = serve(lambda words: odd + said(f"end {words[1].decode()} 0 exit 0")[:-3] + b"\n")
    with pytest.raises(DeadlineError, match=r"still runs in the guest after 0\.5 s"):
        channel.run(["x"], timeout_s=0.5)


def test_program_that_the_helper_knows_nothing_of_is_lost(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port, "_ANSWER_S", 0.1)
    with pytest.raises(ChannelError, match="its helper was started anew"):
        serve(silent).run(["x"], timeout_s=30)


def test_helper_that_answers_nothing_any_more_is_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = serve(silent)
    channel.ping(timeout_s=10)
    monkeypatch.setattr(port, "_ANSWER_S", 0.05)
    monkeypatch.setattr(port, "_SILENT_S", 0.01)
    with pytest.raises(ChannelError, match="the helper is silent"):
        channel.run(["x"], timeout_s=30)


def test_endless_output_is_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "OUTPUT_LIMIT", 1 << 20)
    part = _data(bytes(40_000))
    lines = [f"out ID {number} {part}" for number in range(60)]
    done = serve(answers(*lines, "end ID 60 signal 9")).run(["x"], timeout_s=30)
    assert (len(done.stdout), done.exit_status, done.truncated) == (1 << 20, -9, True)


def test_line_without_an_end_is_dropped(serve: Serve) -> None:
    channel = serve(lambda words: b"x" * (3 << 20) + answers("end ID 0 exit 3")(words))
    assert channel.run(["x"], timeout_s=30).exit_status == 3


def test_helper_of_another_version_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "port"))
        listener.listen(1)
        channel = PortChannel(tmp_path / "port")
        peer, _ = listener.accept()

        def work() -> None:
            question = peer.recv(1000).split()[1].decode()
            peer.sendall(said(f"here {question} 2"))

        thread = threading.Thread(target=work)
        thread.start()
        with pytest.raises(ChannelError, match="another version: install it anew"):
            channel.ping(timeout_s=10)
        thread.join(10)
        channel.close()
        peer.close()


def test_port_that_nobody_serves_is_told_by_the_deadline_or_its_end(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "port"))
        listener.listen(1)
        channel = PortChannel(tmp_path / "port")
        peer, _ = listener.accept()
        with pytest.raises(DeadlineError, match="did not answer"):
            channel.ping(timeout_s=0.1)
        channel._known = True  # as after an answer
        with pytest.raises(DeadlineError, match="does not read"):
            channel.run(["x"], stdin=bytes(4 << 20), timeout_s=0.2)
        peer.close()
        with pytest.raises(ChannelError, match=r"QEMU closed|failed"):
            channel.ping(timeout_s=5)
        channel.close()
