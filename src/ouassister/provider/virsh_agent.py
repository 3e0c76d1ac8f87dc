"""The guest agent through libvirt, which holds its channel and lets one command in at a time.

Source: libvirt v9.0.0, ``src/qemu/qemu_agent.c`` (``qemuAgentArbitraryCommand``, which syncs
first), ``src/qemu/qemu_domain.c`` (``qemuDomainAgentAvailable``), ``src/remote/remote_protocol.x``
(``REMOTE_STRING_MAX``: a reply has 4 MiB at most).
"""

from __future__ import annotations

import json
import math
import secrets
import shlex
import time
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ouassister.errors import AgentError, DeadlineError
from ouassister.provider.agent import Agent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ouassister.provider.channel import ExecResult
    from ouassister.provider.virsh import Answer, Virsh

# execve(2): one argument has 128 KiB at most (MAX_ARG_STRLEN).
_REQUEST_LIMIT: Final = (128 << 10) - 1
_WORDS_LIMIT: Final = 42 << 10  # that go with a command, before they are written as JSON
_LONG: Final = """exec <"$1.input"; . "$1\""""
_SILENT: Final = "Guest agent is not responding"  # VIR_ERR_AGENT_UNRESPONSIVE
_ABSENT: Final = "QEMU guest agent is not connected"  # so nothing was sent
_PAUSE_S: Final = 0.1
_GRACE_S: Final = 15.0  # libvirt's own syncs before the command's time begins


class VirshAgent(Agent):
    """One session with a domain's guest agent."""

    write_chunk: ClassVar[int] = 40 << 10

    def __init__(self, virsh: Virsh, uuid: str) -> None:
        self._virsh = virsh
        self._uuid = uuid
        self._synced = True  # libvirt syncs before each command

    def close(self) -> None:
        """Nothing is held: libvirt keeps the channel."""

    def execute(self, command: str, *, timeout_s: float = 30.0, **arguments: object) -> Any:  # noqa: ANN401 - a JSON value
        """See `Agent`."""
        end = time.monotonic() + timeout_s
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        while True:
            if not self._synced:
                self._sync(end)
            self._synced = False
            answer = self._ask({"execute": command, "arguments": named}, end)
            if answer.ok or _ABSENT not in answer.reason or time.monotonic() >= end:
                break
        # A command whose answer is late may have been carried out: it is never sent twice.
        if not answer.ok and _SILENT in answer.reason:
            raise DeadlineError(f"the guest agent did not answer in time: {answer.reason}")
        self._synced = True
        if not answer.ok:
            raise AgentError(f"the guest agent refused {command}: {answer.reason[:500]!r}")
        try:
            return json.loads(answer.output)["return"]
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise AgentError(f"the guest agent's reply to {command} is no reply") from error

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float,
        most_s: float = 0.1,
    ) -> ExecResult:
        """See `Channel`; what is too long for one command is put into files of the guest first."""
        words = shlex.join(argv)
        if len(words.encode()) + len(stdin) <= _WORDS_LIMIT:
            return super().run(argv, stdin=stdin, timeout_s=timeout_s, most_s=most_s)
        place = f"/run/ouassister-words-{secrets.token_hex(8)}"
        script = f"rm -f {place} {place}.input; exec {words}\n"
        for path, content in ((f"{place}.input", stdin), (place, script.encode())):
            self.write_file(path, content, timeout_s=timeout_s)
        command = ["/bin/sh", "-c", _LONG, "ouassister", place]
        return super().run(command, timeout_s=timeout_s, most_s=most_s)

    def _sync(self, end: float) -> None:
        """Wait until the agent answers."""
        while True:
            answer = self._ask({"execute": "guest-ping"}, end)
            if answer.ok:
                self._synced = True
                return
            if _SILENT not in answer.reason:
                raise AgentError(f"the guest agent cannot be asked: {answer.reason}")
            if time.monotonic() >= end:
                raise DeadlineError(f"the guest agent did not answer in time: {answer.reason}")
            time.sleep(_PAUSE_S)

    def _ask(self, request: dict[str, object], end: float) -> Answer:
        text = json.dumps(request)
        if len(text) > _REQUEST_LIMIT:
            raise AgentError(f"a command of {len(text)} bytes is too long for virsh")
        left = max(end - time.monotonic(), 0.1)
        words = ("qemu-agent-command", self._uuid, text, "--timeout", str(math.ceil(left)))
        return self._virsh.ask(*words, timeout_s=left + _GRACE_S)
