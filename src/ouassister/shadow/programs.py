"""Runs programs of the guest, one at a time, and answers what they ask; see `supervisor`.

    supervisor ─┬─ runner ── init ── the program      namespaces of its own
                ├─ server of its /proc                outside of them
                ├─ stand-in of the service manager    inside, but for pids
                └─ proxy                              while it may fetch

Who is outside of the program's pid namespace cannot be seen, signalled or traced by it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ouassister import codec
from ouassister.shadow import raw, runner, sandbox
from ouassister.shadow.fetch import proxy
from ouassister.shadow.fetch.mirrors import Mirrors
from ouassister.shadow.procfs import VALUES, Procfs, recorder
from ouassister.shadow.servicemanager import RECORDS, Attached, Listeners
from ouassister.shadow.syscalls.handlers import handlers
from ouassister.shadow.syscalls.notify import serve_one
from ouassister.shadow.syscalls.records import SYSCALLS, JsonLines

if TYPE_CHECKING:
    from ouassister.disk.layout import Layout
    from ouassister.shadow.syscalls.handlers import Handlers
    from ouassister.shadow.told import Told

_MOST_DESCRIPTORS: Final = 8  # of one message
_OUTPUT: Final = f"{sandbox.WORK}/output"
_ENDING_S: Final = 30.0  # for the kernel to end a namespace


class SetUpError(Exception):
    """A program could not be started, or not be watched to its end."""


class Programs:
    """The programs of one shadow.

    Args:
        control: The supervisor's socket; when it can be read while a program runs, the host's side
            has gone, or speaks out of turn.
        stage: Where the stage lies; the working folder.
        layout: The guest's file systems.
        told: What is known of the guest.
    """

    def __init__(self, control: socket.socket, stage: str, layout: Layout, told: Told) -> None:
        self._control = control
        self._stage = stage
        self._layout = layout
        self._mirrors = Mirrors(())
        self._helpers: list[int] = []  # pids of what serves one program and ends with it
        self._recorder = JsonLines(f"{stage}/{_OUTPUT}/{SYSCALLS}")
        self._told = told
        self._handlers: Handlers | None = None

    def know(self, told: Told) -> None:
        """From now on, answer from this."""
        if self._handlers is not None:
            self._handlers.close()
        self._told, self._handlers = told, None

    def run(self, request: dict[str, Any]) -> dict[str, object]:
        """Run a program to its end.

        Raises:
            SetUpError: The host does not let it start, or its stand-ins died.
        """
        if self._handlers is None:
            self._handlers = handlers(self._told.facts, self._recorder)
        program = runner.Program(
            argv=tuple(request["argv"]),
            environment=dict(request["environment"]),
            fetches=request["mirrors"] is not None,
            package_cache=request["package_cache"],
            output=f"{_OUTPUT}/{request['output']}" if request["output"] else None,
        )
        if request["mirrors"] is not None:
            self._mirrors = codec.from_value(Mirrors, request["mirrors"])
        deadline = time.monotonic() + request["timeout_s"]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            try:
                return self._run(program, ours, theirs, deadline)
            finally:
                for helper in self._helpers:
                    os.kill(helper, signal.SIGKILL)
                    os.waitpid(helper, 0)
                self._helpers.clear()

    def _run(
        self, program: runner.Program, ours: socket.socket, theirs: socket.socket, deadline: float
    ) -> dict[str, object]:
        procfs = Procfs(self._told.nodes)
        with theirs:
            self._helpers.append(self._serve_proc(procfs, ours, theirs))
            child = os.fork()
            if child == 0:
                ours.close()
                self._control.close()
                uts = self._told.facts.uts
                runner.run(program, self._stage, self._layout, uts, theirs, procfs)
            procfs.close()
        services = Attached(self._told.services, f"{_OUTPUT}/{RECORDS}")
        try:
            answer = self._wait(child, ours, services, deadline)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                services.stop()
            raise
        try:
            services.stop()
        except OSError as error:
            raise SetUpError(str(error)) from error
        return answer

    def _serve_proc(self, procfs: Procfs, *others: socket.socket) -> int:
        server = os.fork()
        if server == 0:
            status = 1
            try:
                raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
                self._control.close()
                for other in others:
                    other.close()
                procfs.serve(recorder(Path(_OUTPUT, VALUES)))
                status = 0
            finally:
                os._exit(status)
        return server

    def _wait(
        self, child: int, channel: socket.socket, services: Attached, deadline: float
    ) -> dict[str, object]:
        """Serve notifications until the child ends; kill it at the deadline or on hang-up."""
        pidfd = os.pidfd_open(child)
        first = child  # the first process of the program's pid namespace, once it is known
        failure: str | None = None
        timed_out = False
        with selectors.DefaultSelector() as selector:
            selector.register(pidfd, selectors.EVENT_READ, "exit")
            selector.register(channel, selectors.EVENT_READ, "channel")
            selector.register(services.channel, selectors.EVENT_READ, "services")
            selector.register(self._control, selectors.EVENT_READ, "control")
            running = True
            while running:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline and not timed_out:
                    timed_out = True
                    deadline += _ENDING_S
                    os.kill(first, signal.SIGKILL)
                for key, events in ready:
                    match key.data:
                        case "exit":
                            running = False
                        case "channel":
                            message = self._take_channel(selector, channel, services)
                            if message.startswith("pid "):
                                first = int(message[4:])
                            elif message:
                                failure = message
                        case "services":
                            _take_listener(selector, services.channel)
                        case "control":
                            raise SystemExit(1)
                        case "listener" if events & selectors.EVENT_READ:
                            with contextlib.suppress(BlockingIOError):
                                self._serve(selector, key.fd)
        os.close(pidfd)
        _pid, status = os.waitpid(child, 0)
        if timed_out:
            return {"timed_out": True, "status": 124}
        if failure is not None:
            raise SetUpError(failure)
        return {"timed_out": False, "status": os.waitstatus_to_exitcode(status)}

    def _serve(self, selector: selectors.BaseSelector, listener: int) -> None:
        assert self._handlers is not None  # noqa: S101 - made before any program
        try:
            serve_one(listener, self._handlers)
        except OSError:  # no process has the filter any more
            selector.unregister(listener)
            os.close(listener)

    def _take_channel(
        self, selector: selectors.BaseSelector, channel: socket.socket, services: Attached
    ) -> str:
        """Take what the runner and the first process send; text is the pid, or what failed."""
        message, descriptors, _flags, _address = socket.recv_fds(channel, 4096, _MOST_DESCRIPTORS)
        served = False
        try:
            match message:
                case b"":
                    selector.unregister(channel)
                case b"proxy":
                    self._start_proxy(descriptors[0])
                case b"listener":
                    selector.register(descriptors[0], selectors.EVENT_READ, "listener")
                case b"services":
                    served = services.know_listeners(Listeners.received(descriptors))
                case _:
                    if descriptors:
                        served = services.know_namespaces(descriptors)
                    return message.decode("utf-8", "replace")
            return ""
        except OSError as error:
            raise SetUpError(str(error)) from error
        finally:
            if served:
                channel.send(runner.GO)

    def _start_proxy(self, descriptor: int) -> None:
        """Serve a socket of the program's network from this one, which is the host's."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with socket.socket(fileno=descriptor) as listener:
            told = os.open(f"{_OUTPUT}/{proxy.REFUSED}", flags, 0o644)
            self._helpers.append(proxy.start(listener, self._mirrors, told))
            os.close(told)


def _take_listener(selector: selectors.BaseSelector, channel: socket.socket) -> None:
    """Take the listener of a program that the stand-in starts."""
    _message, descriptors, _flags, _address = socket.recv_fds(channel, 64, _MOST_DESCRIPTORS)
    if not descriptors:
        selector.unregister(channel)
    for descriptor in descriptors:
        selector.register(descriptor, selectors.EVENT_READ, "listener")
