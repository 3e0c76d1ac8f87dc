"""The channel that the guest agent (qemu-ga) is, whichever way the words travel.

Commands: QEMU documentation, "QEMU Guest Agent Protocol Reference" (qga/qapi-schema.json). The
agent is a hostile peer: every reply is checked, and every wait has a deadline.
"""

from __future__ import annotations

import base64
import binascii
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ouassister.access import AGENT
from ouassister.errors import AgentEndedError, AgentError, DeadlineError
from ouassister.provider.channel import Channel
from ouassister.provider.channel import ExecResult as ExecResult

if TYPE_CHECKING:
    from collections.abc import Sequence

_POLL_S = 0.005
_ANSWER_S = 10.0
_SILENT_S = 60.0  # no agent came back


class Agent(Channel):
    """One session with the guest agent."""

    name: ClassVar[str] = AGENT
    write_chunk: ClassVar[int] = 1 << 20  # bytes of a file that one command carries

    @abstractmethod
    def execute(self, command: str, *, timeout_s: float = 30.0, **arguments: object) -> Any:  # noqa: ANN401 - a JSON value
        """Run one command; an underscore in an argument's name stands for a hyphen.

        Raises:
            AgentError: The agent answered with an error, or not in its protocol.
            DeadlineError: No answer in ``timeout_s``.
        """

    def ping(self, *, timeout_s: float = 5.0) -> None:
        """See `Channel`."""
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
        """See `Channel`."""
        # Not guest-file-write: what that makes, everybody in the guest may write to (0666).
        for start in range(0, len(content) or 1, self.write_chunk):
            script = f'umask 077; cat {">>" if start else ">"}"$1"'
            words = ["/bin/sh", "-c", script, "ouassister", path]
            chunk = content[start : start + self.write_chunk]
            done = self.run(words, stdin=chunk, timeout_s=timeout_s)
            if done.exit_status != 0:
                told = done.stderr.decode("utf-8", "backslashreplace").strip()[:500]
                raise AgentError(f"{path} was not written in the guest: {told}")

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
        """See `Channel`."""
        end = time.monotonic() + timeout_s
        pid = self.start(argv, stdin=stdin, timeout_s=timeout_s)
        pause = _POLL_S
        while (result := self._look(argv[0], pid, end)) is None:
            if time.monotonic() >= end:
                raise DeadlineError(f"{argv[0]} still runs in the guest after {timeout_s:.1f} s")
            time.sleep(pause)
            # Each poll costs the guest a wake-up: long programs are asked less often.
            pause = min(pause * 1.2, most_s)
        return result

    def _look(self, program: str, pid: int, end: float) -> ExecResult | None:
        silent = time.monotonic()
        while True:
            left = max(end - time.monotonic(), 0.1)
            try:
                return self.status(pid, timeout_s=min(left, _ANSWER_S))
            except (AgentEndedError, DeadlineError) as error:  # the next one is asked
                if left <= _ANSWER_S:
                    raise
                if time.monotonic() >= silent + _SILENT_S:
                    message = f"the guest agent no longer tells of {program}"
                    raise AgentError(message) from error


def _data(reply: dict[str, object], key: str) -> bytes:
    value = reply.get(key, "")
    try:
        return base64.b64decode(cast("str", value), validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise AgentError(f"the guest agent's {key} is not base64") from error
