"""Runs programs of the guest, one at a time, and answers what they ask; see `supervisor`.

    supervisor ─┬─ runner ── init ── the program      namespaces of its own
                ├─ server of its /proc                outside of them
                ├─ stand-in of the service manager    inside, but for pids
                └─ proxy                              while it may fetch

Who is outside of the program's pid namespace cannot be seen, signalled or traced by it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import selectors
import signal
import socket
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ouassister import codec
from ouassister.shadow import raw, runner, sandbox
from ouassister.shadow.fetch import proxy
from ouassister.shadow.fetch.mirrors import Mirrors
from ouassister.shadow.output import Output
from ouassister.shadow.procfs import VALUES, Procfs, recorder
from ouassister.shadow.room import Room
from ouassister.shadow.scripts import ScriptWatch
from ouassister.shadow.servicemanager import RECORDS, Attached, Listeners
from ouassister.shadow.syscalls.handlers import handlers
from ouassister.shadow.syscalls.notify import serve_one
from ouassister.shadow.syscalls.records import SYSCALLS, JsonLines
from ouassister.shadow.syscalls.stopped import Stopped
from ouassister.shadow.watch import Watch

if TYPE_CHECKING:
    from ouassister.disk.layout import Layout
    from ouassister.shadow.limits import Bounds
    from ouassister.shadow.syscalls.handlers import Handlers
    from ouassister.shadow.told import Told

_MOST_DESCRIPTORS: Final = 8  # of one message
_PROC_ENDS_S: Final = 10.0  # once nobody sees it any more
_OUTPUT: Final = f"{sandbox.WORK}/output"


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
        bounds: What programs may take of the host.
    """

    def __init__(
        self, control: socket.socket, stage: str, layout: Layout, told: Told, bounds: Bounds
    ) -> None:
        self._control = control
        self._stage = stage
        self._layout = layout
        self._mirrors = Mirrors(())
        self._helpers: list[int] = []  # pids of what serves one program and ends with it
        self._recorder = JsonLines(f"{stage}/{_OUTPUT}/{SYSCALLS}")
        self._told = told
        self._trees: frozenset[str] = frozenset()
        self._bounds = bounds
        self._handlers: Handlers | None = None

    def know(self, told: Told, trees: frozenset[str]) -> None:
        """From now on, answer from this, and show these trees."""
        self._told, self._trees = told, trees
        self.forget()

    def forget(self) -> None:
        """Answer as if no program had run before."""
        if self._handlers is not None:
            self._handlers.close()
        self._handlers = None

    def run(self, request: dict[str, Any]) -> dict[str, object]:
        """Run a program to its end.

        Raises:
            SetUpError: The host does not let it start, or its stand-ins died.
        """
        if self._handlers is None:
            records = f"{self._stage}/{_OUTPUT}/{RECORDS}"
            stopped = Stopped(self._told.services.daemons, records)
            self._handlers = handlers(self._told.facts, self._recorder, stopped)
        program = runner.Program(
            argv=tuple(request["argv"]),
            environment=dict(request["environment"]),
            fetches=request["mirrors"] is not None,
            package_cache=request["package_cache"],
            output=None,
            trees=self._trees,
        )
        if request["mirrors"] is not None:
            self._mirrors = codec.from_value(Mirrors, request["mirrors"])
        room = Room((sandbox.WORK, sandbox.CACHE))
        scripts = ScriptWatch(request["script_timeout_s"], self._recorder)
        watch = Watch(request["timeout_s"], scripts, room)
        watch.check_room()
        if watch.over:
            return watch.answer(0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            try:
                return self._run(program, ours, theirs, request["output"], watch, room)
            finally:
                for helper in self._helpers:
                    os.kill(helper, signal.SIGKILL)
                    os.waitpid(helper, 0)
                self._helpers.clear()
                self._bounds.tell_reached(self._recorder)

    def _run(
        self,
        program: runner.Program,
        ours: socket.socket,
        theirs: socket.socket,
        output: str | None,
        watch: Watch,
        room: Room,
    ) -> dict[str, object]:
        procfs = Procfs(self._told.nodes)
        with theirs:
            self._helpers.append(self._serve_proc(procfs, ours, theirs))
            printed = None
            if output is not None:
                limit = self._bounds.limits.output_bytes
                printed = Output(f"{_OUTPUT}/{output}", limit)
                program = replace(program, output=printed.writer)
            largest = room.left()[0]
            enter = partial(self._bounds.enter, largest, self._recorder)
            child = os.fork()
            if child == 0:
                ours.close()
                self._control.close()
                facts = self._told.facts
                runner.run(program, self._stage, self._layout, facts, theirs, procfs, enter)
            procfs.close()
            if printed is not None:
                printed.started()
        services = Attached(
            self._told.services,
            f"{_OUTPUT}/{RECORDS}",
            partial(self._bounds.enter, largest, None),
        )
        try:
            answer = self._wait(child, ours, services, printed, watch)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                services.stop()
            raise
        try:
            services.stop()
        except OSError as error:
            if not watch.over:  # else nothing of it counts: it may have found no room, either
                raise SetUpError(str(error)) from error
        self._check_proc()
        return answer

    def _check_proc(self) -> None:
        """Make sure that programs had a /proc to their end; it goes by itself after them.

        The kernel ends the connection before its server has ended, so that a look without waiting
        would miss a server that died under the last program.
        """
        server = self._helpers[0]
        pidfd = os.pidfd_open(server)
        try:
            ended, _, _ = select.select([pidfd], [], [], _PROC_ENDS_S)
        finally:
            os.close(pidfd)
        if not ended:
            raise SetUpError("something in the shadow still holds its /proc")
        self._helpers.pop(0)
        _pid, status = os.waitpid(server, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            raise SetUpError(f"the server of /proc died: it ended with {code}")

    def _serve_proc(self, procfs: Procfs, *others: socket.socket) -> int:
        server = os.fork()
        if server == 0:
            status = 1
            try:
                raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
                self._control.close()
                for other in others:
                    other.close()
                # Whole, since a server of FUSE leaves the working folder.
                procfs.serve(recorder(Path(self._stage, _OUTPUT, VALUES)))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        return server

    def _wait(
        self,
        child: int,
        channel: socket.socket,
        services: Attached,
        printed: Output | None,
        watch: Watch,
    ) -> dict[str, object]:
        """Serve notifications until the child ends; kill it when it is over, or on hang-up."""
        pidfd = os.pidfd_open(child)
        first = child  # the first process of the program's pid namespace, once it is known
        failure: str | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(pidfd, selectors.EVENT_READ, "exit")
            selector.register(channel, selectors.EVENT_READ, "channel")
            selector.register(services.channel, selectors.EVENT_READ, "services")
            selector.register(self._control, selectors.EVENT_READ, "control")
            if printed is not None:
                selector.register(printed.reader, selectors.EVENT_READ, "printed")
            running = True
            while running:
                ready = selector.select(watch.wait_s())
                if watch.look(first):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(first, signal.SIGKILL)
                for key, _events in ready:
                    match key.data:
                        case "exit":
                            running = False
                        case "channel":
                            message = self._take_channel(selector, channel, services)
                            if message.startswith("pid "):
                                first = int(message[4:])
                            elif message:
                                failure = message
                        case "printed":
                            assert printed is not None  # noqa: S101 - it was registered
                            _take_printed(selector, printed, watch)
                        case "services":
                            _take_listener(selector, services.channel)
                        case "control":
                            raise SystemExit(1)
                        case "listener":
                            self._serve(selector, key.fd)
        os.close(pidfd)
        _pid, status = os.waitpid(child, 0)
        _finish(printed, watch)
        if failure is not None and not watch.over:
            raise SetUpError(failure)
        return watch.answer(os.waitstatus_to_exitcode(status))

    def _serve(self, selector: selectors.BaseSelector, listener: int) -> None:
        assert self._handlers is not None  # noqa: S101 - made before any program
        try:
            more = serve_one(listener, self._handlers)
        except OSError:  # what its caller is told fails as well, and it is killed with the program
            more = False
        if not more:
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


def _take_printed(selector: selectors.BaseSelector, printed: Output, watch: Watch) -> None:
    """Keep what the program printed."""
    try:
        if not printed.take():
            selector.unregister(printed.reader)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        watch.check_room(refused=True)


def _finish(printed: Output | None, watch: Watch) -> None:
    """Keep what it printed last."""
    if printed is None:
        return
    try:
        printed.finish()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        watch.check_room(refused=True)


def _take_listener(selector: selectors.BaseSelector, channel: socket.socket) -> None:
    """Take the listener of a program that the stand-in starts."""
    _message, descriptors, _flags, _address = socket.recv_fds(channel, 64, _MOST_DESCRIPTORS)
    if not descriptors:
        selector.unregister(channel)
    for descriptor in descriptors:
        selector.register(descriptor, selectors.EVENT_READ, "listener")
