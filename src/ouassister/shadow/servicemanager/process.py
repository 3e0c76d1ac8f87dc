"""The process that serves: in the tree and the namespaces of the shadow's programs, but of pids.

It sees the tree as they do and answers from it. They do not see it: it is no process of their pid
namespace, and nobody there can kill it, trace it, or take its records back.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from ouassister.shadow import raw
from ouassister.shadow.servicemanager.callers import Callers
from ouassister.shadow.servicemanager.guestctl import GuestPrograms, GuestSystemctl
from ouassister.shadow.servicemanager.journal import Journal
from ouassister.shadow.servicemanager.manager import Manager
from ouassister.shadow.servicemanager.objects import Objects
from ouassister.shadow.servicemanager.server import Records, Server
from ouassister.shadow.servicemanager.unitfiles import UnitFiles
from ouassister.shadow.servicemanager.units import Units

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ouassister.shadow.servicemanager.guestctl import Output
    from ouassister.shadow.servicemanager.server import Listeners
    from ouassister.shadow.servicemanager.state import ManagerState

_READY: Final = b"ready"
_NAMESPACES: Final = ("uts", "ipc", "net", "cgroup", "pid_for_children", "mnt")


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """A stand-in that serves.

    Attributes:
        pid: Its process, a child of who started it.
        channel: Held open while it shall serve.
    """

    pid: int
    channel: socket.socket

    def stop(self) -> bool:
        """Let it take what is still there, end its records and itself.

        Returns:
            Whether it did; what it recorded cannot be trusted otherwise.
        """
        self.channel.close()
        _pid, status = os.waitpid(self.pid, 0)
        return status == 0


def open_namespaces() -> list[int]:
    """Open those of the calling process and of its children.

    Called once its first child is there, in the /proc of its own pid namespace. Nobody else may
    open them: who leaves privileges behind without an exec is not to be looked at (ptrace(2)).
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    return [os.open(f"/proc/self/ns/{name}", flags) for name in _NAMESPACES]


def start(
    namespaces: Sequence[int],
    listeners: Listeners,
    state: ManagerState,
    records: int,
    log: int,
    confine: Callable[[], None],
) -> ServiceManager:
    """Start a stand-in for one tree; when it returns, it serves.

    Args:
        namespaces: Where the programs run, as `open_namespaces` gave them; closed here.
        listeners: What the first process there made in its tree (`listen`); closed here.
        state: What the guest had running.
        records: Descriptor of a file out of the guest's reach, opened to append.
        log: The same, for what is told to the guest's log daemon.
        confine: Called in a child, before it becomes a program of the guest: installs the filter of
            system calls and hands its listener to who answers.

    Raises:
        OSError: It could not join them; the message tells why.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _become(namespaces, listeners, state, records, log, confine, theirs)
    theirs.close()
    listeners.close()
    for descriptor in namespaces:
        os.close(descriptor)
    answer = ours.recv(4096)
    if answer != _READY:
        ours.close()
        os.waitpid(pid, 0)
        reason = answer.decode("utf-8", "replace") or "it died"
        raise OSError(f"the stand-in of the service manager: {reason}")
    return ServiceManager(pid, ours)


def _become(
    namespaces: Sequence[int],
    listeners: Listeners,
    state: ManagerState,
    records: int,
    log: int,
    confine: Callable[[], None],
    channel: socket.socket,
) -> NoReturn:
    status = 1
    try:
        raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        callers = Callers(os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        own = [Path(f"/proc/self/ns/{name}").stat().st_ino for name in _NAMESPACES]
        # Modules come from the host's files alone; from here on the tree is the guest's.
        sys.path.clear()
        sys.meta_path.clear()
        for descriptor, inode in zip(namespaces, own, strict=True):
            if os.fstat(descriptor).st_ino != inode:  # programs that fetch have the host's network
                raw.setns(descriptor, 0)
        os.chdir("/")
        channel.send(_READY)
    except OSError as error:
        channel.send(str(error).encode("utf-8", "replace")[:4000])
        os._exit(1)
    try:
        run = GuestPrograms(confine).run
        serve(listeners, state, records, log, callers, run, channel.fileno())
        status = 0
    finally:
        os._exit(status)


def serve(
    listeners: Listeners,
    state: ManagerState,
    records: int,
    log: int,
    callers: Callers,
    run: Callable[[Sequence[str]], Output],
    stop: int,
    root: str = "",
) -> None:
    """Serve until ``stop`` can be read, and end the records.

    Args:
        listeners: Where clients come in.
        state: What the guest had running.
        records: Descriptor to write events to.
        log: Descriptor to write log messages to.
        callers: Tells packages from processes.
        run: Runs a program of the guest.
        stop: Descriptor.
        root: What stands before each path of the tree.
    """
    written = Records(records)
    started_ns = time.time_ns()
    files = UnitFiles(root)
    systemctl = GuestSystemctl(run, files)
    files.ask_paths = systemctl.unit_paths
    units = Units(files, state, started_ns)
    manager = Manager(units, systemctl, written.write)
    objects = Objects(manager, written.write)
    journal = Journal(listeners.journal, log)
    Server(listeners, objects, callers, written.write, journal).run(stop)
    written.end()
