"""The guest agent (qemu-ga), as a hostile peer: every reply bounded, every wait with a deadline.

Protocol: QEMU documentation, "QEMU Guest Agent Protocol Reference" (qga/qapi-schema.json). The
channel has no connections: replies to an earlier client may still be in it, so each session
starts with guest-sync-delimited, whose answer is preceded by a 0xFF byte.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ouassister.errors import AgentError, DeadlineError
from ouassister.provider import sockets

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_DELIMITER = b"\xff"
# qemu-ga keeps up to 16 MiB of each output stream (GUEST_EXEC_MAX_OUTPUT, qga/commands.c); in
# base64, twice, with room for the envelope.
_REPLY_LIMIT = 46 << 20
_POLL_S = 0.005
_WRITE_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a program in the guest left behind; ``exit_status`` is -SIGNAL when it was killed."""

    exit_status: int
    stdout: bytes
    stderr: bytes
    truncated: bool


class Qga:
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
        token = secrets.randbits(53)
        # The leading 0xFF makes the agent's parser drop a request that an earlier client left
        # half written.
        request = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
        self._send(_DELIMITER + json.dumps(request).encode() + b"\n", end)
        self._buffer.clear()
        while True:
            self._until(_DELIMITER, end, keep=False)
            line = self._until(b"\n", end, keep=True)
            try:
                if json.loads(line) == {"return": token}:
                    break
            except (ValueError, RecursionError):
                continue  # the tail of a stale reply
        self._synced = True

    def execute(self, command: str, *, timeout_s: float = 30.0, **arguments: object) -> Any:  # noqa: ANN401 - a JSON value
        """Run one command; an underscore in an argument's name stands for a hyphen.

        Raises:
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
        line = self._until(b"\n", end, keep=True)
        self._synced = True
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

    def ping(self, *, timeout_s: float = 5.0) -> None:
        """Return when the agent answers."""
        self.execute("guest-ping", timeout_s=timeout_s)

    def enabled(self, *commands: str, timeout_s: float = 5.0) -> bool:
        """Tell whether the agent knows all of ``commands`` and allows them."""
        info = self.execute("guest-info", timeout_s=timeout_s)
        try:
            allowed = {c["name"] for c in info["supported_commands"] if c["enabled"] is True}
        except (TypeError, KeyError) as error:
            raise AgentError("the guest agent's guest-info is malformed") from error
        return allowed.issuperset(commands)

    def write_file(self, path: str, content: bytes, *, timeout_s: float = 30.0) -> None:
        """Write a file in the guest, with the agent's own mode and owner.

        Raises:
            AgentError: The agent may not, or wrote less.
        """
        handle = self.execute("guest-file-open", timeout_s=timeout_s, path=path, mode="w")
        if not isinstance(handle, int):
            raise AgentError("the guest agent's guest-file-open returned no handle")
        try:
            for start in range(0, len(content), _WRITE_CHUNK):
                chunk = content[start : start + _WRITE_CHUNK]
                buffer = base64.b64encode(chunk).decode()
                reply = self.execute(
                    "guest-file-write", timeout_s=timeout_s, handle=handle, buf_b64=buffer
                )
                if not isinstance(reply, dict) or reply.get("count") != len(chunk):
                    raise AgentError(f"the guest agent did not write all of {path}")
        finally:
            self.execute("guest-file-close", timeout_s=timeout_s, handle=handle)

    def start(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 10.0) -> int:
        """Start a program in the guest; return its pid there."""
        arguments: dict[str, object] = {"path": argv[0], "arg": list(argv[1:])}
        if stdin:
            arguments["input_data"] = base64.b64encode(stdin).decode()
        reply = self.execute("guest-exec", timeout_s=timeout_s, capture_output=True, **arguments)
        pid = reply.get("pid") if isinstance(reply, dict) else None
        if not isinstance(pid, int):
            raise AgentError("the guest agent's guest-exec returned no pid")
        return pid

    def status(self, pid: int, *, timeout_s: float = 10.0) -> ExecResult | None:
        """The result of a started program; None while it runs. A result is given once."""
        reply = self.execute("guest-exec-status", timeout_s=timeout_s, pid=pid)
        if not isinstance(reply, dict) or not isinstance(reply.get("exited"), bool):
            raise AgentError("the guest agent's guest-exec-status is malformed")
        if not reply["exited"]:
            return None
        signal, code = reply.get("signal"), reply.get("exitcode")
        if isinstance(signal, int):
            code = -signal
        if not isinstance(code, int):
            raise AgentError("the guest agent's guest-exec-status has no exit code")
        truncated = bool(reply.get("out-truncated")) or bool(reply.get("err-truncated"))
        return ExecResult(code, _data(reply, "out-data"), _data(reply, "err-data"), truncated)

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float,
        most_s: float = 0.1,
    ) -> ExecResult:
        """Run a program in the guest to its end; look at it each ``most_s`` seconds at least.

        Raises:
            DeadlineError: It still runs after ``timeout_s``; it is not killed.
        """
        end = time.monotonic() + timeout_s
        pid = self.start(argv, stdin=stdin, timeout_s=timeout_s)
        pause = _POLL_S
        while (result := self.status(pid, timeout_s=max(end - time.monotonic(), 0.1))) is None:
            if time.monotonic() >= end:
                raise DeadlineError(f"{argv[0]} still runs in the guest after {timeout_s:.1f} s")
            time.sleep(pause)
            # Each poll costs the guest a wake-up: long programs are asked less often.
            pause = min(pause * 1.2, most_s)
        return result

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
            if total > _REPLY_LIMIT:
                raise AgentError(f"the guest agent sent more than {_REPLY_LIMIT} bytes at once")
        taken = bytes(self._buffer[:at])
        del self._buffer[: at + 1]
        return taken


def _data(reply: dict[str, object], key: str) -> bytes:
    value = reply.get(key, "")
    try:
        return base64.b64decode(cast("str", value), validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise AgentError(f"the guest agent's {key} is not base64") from error
