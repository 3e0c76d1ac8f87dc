"""What of the host must not be reached, and tells when it was."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

WORD: Final = "oua-canary"  # as in escape.c
# Files of the host's kernel that a program could have left a trace in.
_KERNEL: Final = (
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/hostname",
    "/proc/mounts",
)


@dataclass
class Canaries:
    """A file, listening sockets and a process. ``visitors`` counts what came to the sockets."""

    file: Path
    tcp: tuple[str, int]
    unix: Path
    abstract: str
    process: subprocess.Popen[bytes]
    visitors: list[str] = field(default_factory=list)

    def targets(self) -> str:
        """For escape.c; ports of all addresses that lead to this host from inside."""
        addresses = ("127.0.0.1", _own_address(), "10.0.2.2", "169.254.169.254")
        lines = [f"file {self.file}", "file /etc/shadow", f"pid {self.process.pid}"]
        lines += [f"tcp {address} {self.tcp[1]}" for address in dict.fromkeys(addresses)]
        lines += [f"unix {self.unix}", f"abstract {self.abstract}"]
        return "\n".join(lines) + "\n"

    def harm(self, before: dict[str, str]) -> list[str]:
        """What has happened to them since `state` was asked."""
        after = self.state()
        changed = [f"{name} was {before[name]!r}, is {after[name]!r}" for name in before
                   if before[name] != after[name]]  # fmt: skip
        return [*changed, *(f"a visitor at {name}" for name in self.visitors)]

    def state(self) -> dict[str, str]:
        """All that must stay as it is."""
        told = {name: Path(name).read_text() for name in _KERNEL if Path(name).exists()}
        told["/proc/mounts"] = "\n".join(
            line for line in told["/proc/mounts"].splitlines() if "ouassister" in line
        )
        told["passwords"] = hashlib.sha256(Path("/etc/shadow").read_bytes()).hexdigest()
        told["file"] = self.file.read_text()
        told["process"] = str(self.process.poll())
        return told


@contextlib.contextmanager
def standing(folder: Path) -> Iterator[Canaries]:
    """Put them up, and take them down."""
    file = folder / "canary"
    file.write_text(f"{WORD}\n")
    file.chmod(0o666)  # its rights are not what keeps anybody away
    folder.chmod(0o755)
    unix, abstract = folder / "socket", f"oua-canary-{os.getpid()}"
    process = subprocess.Popen(["sleep", "infinity"])
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.kill)
        tcp = stack.enter_context(socket.create_server(("", 0)))
        port = tcp.getsockname()[1]
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("", port))
        named = stack.enter_context(socket.socket(socket.AF_UNIX))
        named.bind(str(unix))
        unix.chmod(0o777)
        hidden = stack.enter_context(socket.socket(socket.AF_UNIX))
        hidden.bind(f"\0{abstract}")
        canaries = Canaries(file, ("", port), unix, abstract, process)
        stop = threading.Event()
        for name, listener in (("tcp", tcp), ("udp", udp), ("unix", named), ("abstract", hidden)):
            listener.settimeout(0.1)
            if name != "udp":
                listener.listen()
            thread = threading.Thread(target=_watch, args=(name, listener, canaries, stop))
            thread.start()
            stack.callback(thread.join)
        stack.callback(stop.set)
        yield canaries


def _watch(name: str, listener: socket.socket, canaries: Canaries, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            if name == "udp":
                listener.recv(64)
            else:
                listener.accept()[0].close()
        except TimeoutError:
            continue
        canaries.visitors.append(name)


def _own_address() -> str:
    """The address that this host has on its way out; no packet is sent for that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: nobody's
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address
