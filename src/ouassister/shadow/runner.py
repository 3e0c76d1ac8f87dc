"""Starts one program inside the tree: namespaces, mounts, system call filter, exec.

What it needs of who answers it is told on a channel, in messages with descriptors: the pid of its
first process with the namespaces, the sockets of the service manager, the socket of the proxy, the
listener of the filter. A message without descriptors is what failed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from ouassister.shadow import blkid, raw, sandbox
from ouassister.shadow.fetch import proxy
from ouassister.shadow.mounts import enter_tree
from ouassister.shadow.servicemanager import listen, open_namespaces
from ouassister.shadow.syscalls.filter import ALL_PIDS, build_filter
from ouassister.shadow.tmpfs_handover import read_places

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.disk.layout import Layout
    from ouassister.shadow.procfs import Procfs
    from ouassister.shadow.syscalls.facts import GuestFacts

GO: Final = b"go"  # the stand-ins serve: the program may start
_SET_UP_FAILED: Final = 125
_NOT_EXECUTABLE: Final = 126
_NOT_FOUND: Final = 127
_SIOCGIFFLAGS: Final = 0x8913  # include/uapi/linux/sockios.h
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1


@dataclass(frozen=True, slots=True)
class Program:
    """What to run, and what it may see.

    ``fetches``: a proxy of ours listens on its loopback. ``output`` is a descriptor for standard
    output and error; None passes the caller's on. ``trees``: which of /sys and /dev are served.
    """

    argv: tuple[str, ...]
    environment: dict[str, str]
    fetches: bool
    package_cache: bool
    output: int | None
    trees: frozenset[str] = frozenset()


def run(
    program: Program,
    stage: str,
    layout: Layout,
    facts: GuestFacts,
    channel: socket.socket,
    procfs: Procfs,
    enter: Callable[[], None],
) -> NoReturn:
    """Run ``program`` and exit with its status; called in a child of the supervisor.

    Args:
        program: The program.
        stage: Where the stage lies.
        layout: The guest's file systems.
        facts: The guest: its names, and which pids are its own.
        channel: Takes what is needed of it, and what goes wrong before the program starts.
        procfs: Its /proc, which somebody serves.
        enter: Puts the calling process within the limits of programs; raises OSError.
    """
    raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
    flags = raw.CLONE_NEWPID | raw.CLONE_NEWNS | raw.CLONE_NEWUTS | raw.CLONE_NEWIPC
    flags |= raw.CLONE_NEWCGROUP | raw.CLONE_NEWNET
    try:
        enter()
        raw.unshare(flags)
        opened, tell_opened = os.pipe()
    except OSError as error:
        _fail(channel, error)
    first = os.fork()
    if first == 0:
        os.close(tell_opened)
        os.read(opened, 1)
        _become_init(program, stage, layout, facts, channel, procfs)
    procfs.close()
    try:
        # Before the first process enters the tree: this one gets the same root then, and with it a
        # /proc that does not show it.
        namespaces = open_namespaces()
        socket.send_fds(channel, [f"pid {first}".encode()], namespaces)
    except OSError as error:
        _fail(channel, error)
    for descriptor in namespaces:
        os.close(descriptor)
    channel.close()
    os.close(tell_opened)
    _pid, status = os.waitpid(first, 0)
    os._exit(_exit_code(status))


def _become_init(
    program: Program,
    stage: str,
    layout: Layout,
    facts: GuestFacts,
    channel: socket.socket,
    procfs: Procfs,
) -> NoReturn:
    """Build the tree, start the program, reap until it ends; the rest dies with this process."""
    raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        uts = facts.uts
        raw.sethostname(uts.nodename.encode("utf-8", "surrogateescape"))
        raw.setdomainname(uts.domainname.encode("utf-8", "surrogateescape"))
        operations = sandbox.tree(
            stage,
            layout,
            read_places(Path(stage, sandbox.MEMORY)),
            program.trees,
            package_cache=program.package_cache,
        )
        enter_tree(f"{stage}/{sandbox.merged(0)}", operations)
        blkid.write()
        _loopback_up()
        if program.fetches:
            with socket.create_server(proxy.ADDRESS) as listener:
                socket.send_fds(channel, [b"proxy"], [listener.fileno()])
        listeners = listen()
        socket.send_fds(channel, [b"services"], listeners.descriptors())
        listeners.close()
        # Between the guest's highest pid and the first of the shadow there is nobody to ask for.
        first_pid = min(_skip_guest_pids(), facts.pids_end or sandbox.FIRST_PID)
        procfs.cover()
        if channel.recv(len(GO)) != GO:
            raise OSError("nobody answers for the service manager")
        child = os.fork()
    except OSError as error:
        _fail(channel, error)
    if child == 0:
        _execute(program, channel, first_pid)
    channel.close()
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(_exit_code(status))


def _execute(program: Program, channel: socket.socket, first_pid: int) -> NoReturn:
    os.setsid()  # no controlling terminal: nothing can be typed into the caller's
    if program.output is not None:
        null = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((null, 0), (program.output, 1), (program.output, 2)):
            os.dup2(source, target)
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o022)
    try:
        listener = raw.seccomp_listener(build_filter(first_pid))
        socket.send_fds(channel, [b"listener"], [listener])
        os.close(listener)
    except OSError as error:
        _fail(channel, error)
    channel.close()
    try:
        os.execvpe(program.argv[0], program.argv, program.environment)
    except FileNotFoundError:
        status, reason = _NOT_FOUND, "not found in the guest"
    except OSError as error:
        status, reason = _NOT_EXECUTABLE, error.strerror or "cannot be executed"
    os.write(2, f"{program.argv[0]}: {reason}\n".encode())
    os._exit(status)


def _fail(channel: socket.socket, error: OSError) -> NoReturn:
    with contextlib.suppress(OSError):
        channel.send(str(error).encode("utf-8", "replace")[:4000])
    os._exit(_SET_UP_FAILED)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(probe, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def _skip_guest_pids() -> int:
    """Let pids start where no guest has any, so that the updater's and the guest's never collide.

    Best effort: pid_max belongs to the pid namespace since Linux 6.14 and to the host before,
    where a low one leaves the updater with low pids.

    Returns:
        The first pid that is the updater's; `ALL_PIDS` where they could not be told apart.
    """
    system = Path("/proc/sys/kernel")
    with contextlib.suppress(OSError):
        (system / "pid_max").write_text(f"{1 << 22}\n")
    maximum = int((system / "pid_max").read_text())
    if maximum <= sandbox.FIRST_PID:
        return ALL_PIDS
    (system / "ns_last_pid").write_text(f"{sandbox.FIRST_PID - 1}\n")
    return sandbox.FIRST_PID
