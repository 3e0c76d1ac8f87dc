"""libvirt, asked through virsh: one program for each question, its words never a shell's.

Where libvirt-python is installed, that answers the same words (`libvirt_python`).

Source: libvirt v9.0.0, ``docs/manpages/virsh.rst``.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from ouassister.errors import DeadlineError, HostNotReadyError, StateError, UsageError

DEFAULT: Final = "qemu:///system"
# qemu_conf.c (virQEMUDriverConfigNew): stateDir and configDir of the driver.
_SYSTEM_SAVES: Final = Path("/var/lib/libvirt/qemu/save")
_SESSION_SAVES: Final = Path("libvirt/qemu/save")
_UNREACHABLE: Final = "failed to connect to the hypervisor"
NO_DOMAIN: Final = "failed to get domain"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one virsh said; ``reason`` is libvirt's own, as one line."""

    ok: bool
    output: str
    reason: str


@dataclass(frozen=True, slots=True)
class Virsh:
    """One libvirt daemon of this host, by its URI."""

    uri: str

    def saves(self) -> Path:
        """The folder of managed saves; libvirt names it nowhere.

        Raises:
            UsageError: The URI leads to another driver, or to another host.
        """
        where = urlsplit(self.uri)
        local = where.scheme in ("qemu", "qemu+unix") and not where.netloc
        if local and where.path == "/system":
            return _SYSTEM_SAVES
        if local and where.path == "/session":
            home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
            return Path(home) / _SESSION_SAVES
        raise UsageError(
            f"{self.uri!r} is no libvirt of this host with QEMU in it",
            hint="--connect takes qemu:///system or qemu:///session",
        )

    def command(self) -> list[str]:
        """What a command's words follow."""
        return ["virsh", "--quiet", "--connect", self.uri]

    def ask(self, *words: str, timeout_s: float = 30.0) -> Answer:
        """Run one command of virsh.

        Raises:
            HostNotReadyError: virsh is not installed, or no daemon answers.
            DeadlineError: It did not end in time; what it began may go on.
        """
        argv = [*self.command(), *words]
        environment = {**os.environ, "LC_ALL": "C"}
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=timeout_s,
                env=environment,
            )
        except FileNotFoundError as error:
            raise HostNotReadyError("virsh is not installed") from error
        except subprocess.TimeoutExpired as error:
            message = f"virsh {words[0]} did not end within {timeout_s:.0f} s"
            raise DeadlineError(message, hint="look at what hangs in libvirt's log") from error
        reason = one_line(done.stderr.decode("utf-8", "replace"))
        if _UNREACHABLE in reason:
            raise HostNotReadyError(f"libvirt does not answer at {self.uri}: {reason}")
        return Answer(done.returncode == 0, done.stdout.decode("utf-8", "replace"), reason)

    def run(self, *words: str, timeout_s: float = 30.0) -> str:
        """Run one command of virsh that has to succeed; returns what it printed.

        Raises:
            StateError: libvirt refused; the reason is its own.
            HostNotReadyError: As `ask`.
            DeadlineError: As `ask`.
        """
        answer = self.ask(*words, timeout_s=timeout_s)
        if not answer.ok:
            message = f"libvirt refused {words[0]}: {answer.reason}"
            raise StateError(message, hint="the reason is libvirt's own; its log has more")
        return answer.output


def one_line(told: str) -> str:
    """What libvirt says of an error, as one line of bounded length."""
    lines = [line.removeprefix("error: ").strip() for line in told.splitlines() if line.strip()]
    return "".join(char if char.isprintable() else "?" for char in "; ".join(lines))[:1000]
