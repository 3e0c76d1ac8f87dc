"""The guest agent (qemu-ga), as a hostile peer: every reply bounded, every wait with a deadline.

Protocol: QEMU documentation, "QEMU Guest Agent Protocol Reference" (qga/qapi-schema.json). The
channel has no connections: replies to an earlier client may still be in it, so each session
starts with guest-sync-delimited, whose answer is preceded by a 0xFF byte.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING, Any

from ouassister.errors import AgentEndedError, AgentError, DeadlineError
from ouassister.provider import sockets
from ouassister.provider.agent import Agent
from ouassister.provider.channel import ExecResult as ExecResult

if TYPE_CHECKING:
    from pathlib import Path

_DELIMITER = b"\xff"
# qemu-ga keeps up to 16 MiB of each output stream (GUEST_EXEC_MAX_OUTPUT, qga/commands.c); in
# base64, twice, with room for the envelope.
_REPLY_LIMIT = 46 << 20
# What a new agent says of the delimiter, and of the rest of a question that another had begun.
_NOT_JSON = b"JSON parse error"
_SYNC_S = 2.0  # for the first answer


class Qga(Agent):
    """One session with the guest agent.

    Args:
        path: Host side of the agent's channel.

    Raises:
        OSError: Nobody listens at ``path``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = sockets.connect(path)
        self._buffer = bytearray()
        self._synced = False

    def __enter__(self) -> Qga:
        """Close at the end of the block."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Hang up. Closing twice is fine."""
        self._socket.close()

    def sync(self, *, timeout_s: float) -> None:
        """Wait until the agent answers, and drop every stale reply.

        Raises:
            DeadlineError: The agent did not answer.
        """
        end = time.monotonic() + timeout_s
        patience = _SYNC_S
        while not self._sync(min(time.monotonic() + patience, end)):
            if time.monotonic() >= end:
                raise DeadlineError("the guest agent did not answer in time")
            self._socket = sockets.connect_anew(self._socket, self._path)
            patience *= 2
        self._synced = True

    def _sync(self, end: float) -> bool:
        """Ask once; an agent that ends takes the question with it, and the next one must be asked.

        An answer to an earlier question is stale, too.
        """
        try:
            token = self._ask_sync(end)
            self._buffer.clear()
            while True:
                self._until(_DELIMITER, end, keep=False)
                line = self._until(b"\n", end, keep=True)
                if _token(line) == token:  # else the tail of a stale reply
                    return True
        except DeadlineError:
            return False

    def _ask_sync(self, end: float) -> int:
        token = secrets.randbits(53)
        # The leading 0xFF makes the agent's parser drop a request that an earlier client left
        # half written.
        request = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
        self._send(_DELIMITER + json.dumps(request).encode() + b"\n", end)
        return token

    def execute(self, command: str, *, timeout_s: float = 30.0, **arguments: object) -> Any:  # noqa: ANN401 - a JSON value
        """Run one command; an underscore in an argument's name stands for a hyphen.

        Raises:
            AgentEndedError: The agent took the question with it when it ended.
            AgentError: The agent answered with an error, or not in its protocol.
            DeadlineError: No answer in ``timeout_s``.
        """
        end = time.monotonic() + timeout_s
        if not self._synced:
            self.sync(timeout_s=timeout_s)
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        # Set again when the reply is whole: after a missed deadline it may still come.
        self._synced = False
        self._send(json.dumps({"execute": command, "arguments": named}).encode() + b"\n", end)
        line = self._answer(command, end)
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AgentError(f"the guest agent's reply to {command} is not JSON") from error
        if isinstance(reply, dict) and "return" in reply:
            return reply["return"]
        try:
            text = str(reply["error"]["desc"])[:500]
        except (TypeError, KeyError, IndexError) as error:
            raise AgentError(f"the guest agent's reply to {command} is no reply") from error
        raise AgentError(f"the guest agent refused {command}: {text!r}")

    def _answer(self, command: str, end: float) -> bytes:
        """The line that answers what was just sent.

        What is not answered soon has a second question behind it: an agent answers in order, so
        whoever answers that one first never got this one.
        """
        tokens: list[int] = []
        patience = _SYNC_S
        while True:
            held = len(self._buffer)
            try:
                line = self._until(b"\n", min(time.monotonic() + patience, end), keep=True)
            except DeadlineError:
                if time.monotonic() >= end:
                    raise
                if len(self._buffer) == held:  # else it is answering
                    tokens.append(self._ask_sync(end))
                    patience *= 2
                continue
            if not tokens:
                self._synced = True
                return line
            # Before the mark: what it had written of an answer when it ended.
            _torn, mark, tail = line.rpartition(_DELIMITER)
            if mark and _token(tail) in tokens:
                raise AgentEndedError(f"the guest agent ended before it answered {command}")
            if _NOT_JSON not in line:
                return line

    def _send(self, data: bytes, end: float) -> None:
        self._socket.settimeout(max(end - time.monotonic(), 0.001))
        try:
            self._socket.sendall(data)
        except TimeoutError as error:
            raise DeadlineError("the guest agent does not read its channel") from error
        except OSError as error:
            raise AgentError(f"the agent's channel {self._path} was closed: {error}") from error

    def _until(self, stop: bytes, end: float, *, keep: bool) -> bytes:
        """Take the bytes before ``stop`` from the channel; bounded, whether kept or not."""
        searched = total = 0
        while (at := self._buffer.find(stop, searched)) < 0:
            if keep:
                searched = len(self._buffer)
            else:
                self._buffer.clear()
            left = end - time.monotonic()
            if left <= 0:
                raise DeadlineError("the guest agent did not answer in time")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(1 << 18)
            except TimeoutError:
                continue
            except OSError as error:
                raise AgentError(f"the agent's channel {self._path} failed: {error}") from error
            if not data:
                raise AgentError(f"QEMU closed the agent's channel {self._path}")
            self._buffer += data
            total += len(data)
            if max(total, len(self._buffer)) > _REPLY_LIMIT:
                raise AgentError(f"the guest agent sent more than {_REPLY_LIMIT} bytes at once")
        taken = bytes(self._buffer[:at])
        del self._buffer[: at + 1]
        return taken


def _token(line: bytes) -> int | None:
    """What an answer to guest-sync-delimited carries; None for any other line."""
    try:
        value = json.loads(line)["return"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return value if isinstance(value, int) else None
