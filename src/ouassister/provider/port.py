"""The channel that our own helper on a virtio port is: for guests whose agent may run nothing.

The other side is guest/port.c, whose head tells the lines and their meaning (guest/port.h). Nothing
of an earlier session disturbs: a line begins with a newline and has a checksum, what answers is
known by the id of the question, and a helper that was started anew knows none of the programs.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import select
import time
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final

from ouassister.access import PORT
from ouassister.errors import ChannelError, DeadlineError
from ouassister.provider import sockets
from ouassister.provider.channel import OUTPUT_LIMIT, Channel, ExecResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_PROTOCOL: Final = b"1"
PROTOCOL_NAME: Final = b"ouassister-port protocol " + _PROTOCOL  # in a helper that speaks it
_PART: Final = 48 << 10
_LINE_LIMIT: Final = 96 << 10
_REQUEST_LIMIT: Final = 8 << 20
_WORDS_LIMIT: Final = 4096
_FILE_PART: Final = 1 << 20
_ANSWER_S: Final = 2.0  # for the first answer of a helper; and between two looks at it
_SILENT_S: Final = 60.0  # nobody is there any more
_NUMBER: Final = re.compile(rb"[0-9]{1,9}")


@dataclass(slots=True)
class _Program:
    """What is known of a program that runs."""

    name: str
    lines: int = 0
    size: int = 0
    lost: bool = False
    streams: dict[bytes, bytearray] = field(
        default_factory=lambda: {b"out": bytearray(), b"err": bytearray()}
    )

    @property
    def unknown(self) -> str:
        return f"the end of {self.name} in the guest is unknown"

    def add(self, word: bytes, data: bytes) -> None:
        stream = self.streams[word]
        room = OUTPUT_LIMIT - len(stream)
        stream += data[:room]
        self.lost |= len(data) > room


class PortChannel(Channel):
    """One session with the helper.

    Args:
        path: Host side of its port.

    Raises:
        OSError: Nobody listens at ``path``.
    """

    name: ClassVar[str] = PORT

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = sockets.connect(path)
        self._socket.setblocking(False)
        self._buffer = bytearray()
        self._known = False  # a helper has answered

    def _connect_anew(self) -> None:
        self._socket = sockets.connect_anew(self._socket, self._path)
        self._socket.setblocking(False)
        self._buffer.clear()

    def close(self) -> None:
        """Hang up. Closing twice is fine."""
        self._socket.close()

    def ping(self, *, timeout_s: float = 5.0) -> None:
        """See `Channel`."""
        end = time.monotonic() + timeout_s
        patience = _ANSWER_S
        while not self._is_there(min(time.monotonic() + patience, end)):
            if time.monotonic() >= end:
                raise DeadlineError("the helper in the guest did not answer in time")
            self._connect_anew()
            patience *= 2

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float,
        most_s: float = 0.1,
    ) -> ExecResult:
        """See `Channel`; the helper tells of a program's end by itself."""
        end = time.monotonic() + timeout_s
        words = b"".join(os.fsencode(word) + b"\0" for word in argv)
        request = words + stdin
        if len(request) > _REQUEST_LIMIT or len(argv) > _WORDS_LIMIT:
            raise ChannelError(f"{argv[0]}: more than the helper in the guest takes")
        if not self._known:
            self.ping(timeout_s=timeout_s)
        number = secrets.token_hex(8)
        for offset in range(0, len(request), _PART):
            part = base64.b64encode(request[offset : offset + _PART]).decode()
            self._send(f"part {number} {offset} {part}", end)
        self._send(f"run {number} {len(argv)} {len(words)} {len(request)}", end)
        return self._attend(_Program(argv[0]), number.encode(), end, timeout_s)

    def write_file(self, path: str, content: bytes, *, timeout_s: float = 30.0) -> None:
        """See `Channel`."""
        end = time.monotonic() + timeout_s
        for start in range(0, len(content) or 1, _FILE_PART):
            script = f'umask 077; cat {">>" if start else ">"}"$1"'
            words = ["/bin/sh", "-c", script, "ouassister", path]
            part = content[start : start + _FILE_PART]
            done = self.run(words, stdin=part, timeout_s=max(end - time.monotonic(), 0.1))
            if done.exit_status != 0:
                told = done.stderr.decode("utf-8", "backslashreplace").strip()[:500]
                raise ChannelError(f"{path} was not written in the guest: {told}")

    def _attend(self, program: _Program, number: bytes, end: float, timeout_s: float) -> ExecResult:
        """Take what a program writes, to its end; a helper that is silent is asked for it."""
        heard = time.monotonic()
        look, question = heard + _ANSWER_S, None
        while True:
            line = self._line(min(look, end))
            now = time.monotonic()
            if line and line[1] in (number, question):
                heard, look = now, now + _ANSWER_S
                if line[1] == number and (done := _take(program, line)) is not None:
                    return done
                if line[1] == question and number not in line[3:]:
                    raise ChannelError(f"{program.unknown}: its helper was started anew")
            if now >= end:
                message = f"{program.name} still runs in the guest after {timeout_s:.1f} s"
                raise DeadlineError(message)
            if now >= heard + _SILENT_S:
                self._known = False
                raise ChannelError(f"{program.unknown}: the helper is silent")
            if now >= look:
                question, look = self._ask(end), now + _ANSWER_S

    def _is_there(self, end: float) -> bool:
        """Ask once; a helper that ends takes the question with it."""
        self._known = False
        try:
            question = self._ask(end)
        except DeadlineError:
            return False
        while line := self._line(end):
            if line[0] == b"here" and line[1] == question:
                if line[2] != _PROTOCOL:
                    raise ChannelError(
                        "the helper in the guest is of another version: install it anew"
                        " ('ouassister helper')"
                    )
                self._known = True
                return True
        return False

    def _ask(self, end: float) -> bytes:
        question = secrets.token_hex(8)
        self._send(f"ask {question}", end)
        return question.encode()

    def _send(self, words: str, end: float) -> None:
        """Send a line; what comes in meanwhile is kept, so that neither side waits for the other.

        Raises:
            DeadlineError: Nobody takes it.
        """
        text = f"{words} ".encode()
        left = memoryview(b"\n%s%08x\n" % (text, zlib.crc32(text)))
        while left:
            self._wait(select.POLLIN | select.POLLOUT, end)
            self._receive()
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                self._wait(select.POLLIN | select.POLLOUT, end)
            except OSError as error:
                raise ChannelError(f"the helper's port {self._path} failed: {error}") from error

    def _line(self, end: float) -> list[bytes]:
        """The next line of the helper, as its words; none when none came before ``end``."""
        while True:
            for line in self._lines():
                return line
            try:
                self._wait(select.POLLIN, end)
            except DeadlineError:
                return []
            self._receive()

    def _lines(self) -> Iterator[list[bytes]]:
        """What the buffer has of whole lines that are well-formed."""
        while (at := self._buffer.find(b"\n")) >= 0:
            raw = bytes(self._buffer[:at])
            del self._buffer[: at + 1]
            if line := parse(raw):
                yield line
        if len(self._buffer) > _LINE_LIMIT:  # no line of ours: what follows will not fit
            self._buffer.clear()

    def _receive(self) -> None:
        if len(self._buffer) > OUTPUT_LIMIT:
            raise ChannelError("the helper in the guest sends more than it was asked for")
        try:
            data = self._socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelError(f"the helper's port {self._path} failed: {error}") from error
        if not data:
            raise ChannelError(f"QEMU closed the helper's port {self._path}")
        self._buffer += data

    def _wait(self, events: int, end: float) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        if not poll.poll(max(end - time.monotonic(), 0) * 1000):
            raise DeadlineError("the helper in the guest does not read its port")


def parse(raw: bytes) -> list[bytes]:
    """The words of a line without its newline; none of what is no line of the helper."""
    text, blank, crc = raw.rpartition(b" ")
    if not blank or len(raw) > _LINE_LIMIT or crc != b"%08x" % zlib.crc32(text + blank):
        return []
    words = text.split(b" ")
    enough = {b"here": 3, b"not": 3, b"out": 4, b"err": 4, b"end": 5}.get(words[0], 1 << 30)
    return words if len(words) >= enough else []


def _take(program: _Program, line: list[bytes]) -> ExecResult | None:
    """What a line says of the program; its end, if that is what it says.

    Raises:
        ChannelError: It did not start, or not all of it was heard.
    """
    word, number = line[0], line[2]
    value = line[4] if word == b"end" else b"0"
    if word == b"here" or not (_NUMBER.fullmatch(number) and _NUMBER.fullmatch(value)):
        raise ChannelError(f"{program.unknown}: the helper does not keep to its protocol")
    if word == b"not":
        raise ChannelError(f"{program.name} did not start in the guest: {os.strerror(int(number))}")
    if int(number) != program.lines:
        raise ChannelError(f"{program.unknown}: a line of the helper was lost")
    program.lines += 1
    if word != b"end":
        try:
            program.add(word, base64.b64decode(line[3], validate=True))
        except (ValueError, binascii.Error) as error:
            raise ChannelError(f"{program.unknown}: what it wrote is not base64") from error
        return None
    status = -int(value) if line[3] == b"signal" else int(value)
    out, err = (bytes(program.streams[stream]) for stream in (b"out", b"err"))
    return ExecResult(status, out, err, program.lost)
