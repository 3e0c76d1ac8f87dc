"""QMP, QEMU's machine protocol, for synchronous callers with a deadline on every wait.

Protocol: QEMU documentation, "QEMU Machine Protocol Specification". The work is done by the
`qemu.qmp` package; its event loop runs only inside calls of this class.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from typing import TYPE_CHECKING, Any, TypeVar

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    QMPClient,
    QMPError,
    Runstate,
)
from qemu.qmp.qmp_client import ExecuteError

from ouassister.errors import DeadlineError, QemuLostError, QemuRefusedError
from ouassister.provider import sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

T = TypeVar("T")
Event = dict[str, Any]

# A peer that hangs up is reported by our errors; the package would log it a second time.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False


class Qmp:
    """One QMP connection.

    Args:
        path: QEMU's QMP socket.
        timeout_s: Longest wait for QEMU's greeting.

    Raises:
        OSError: Nobody listens at ``path``.
        QemuLostError: QEMU hung up during the greeting.
        DeadlineError: No greeting came.
    """

    def __init__(self, path: Path, *, timeout_s: float = 10.0) -> None:
        self._path = path
        self._socket = sockets.connect(path)
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("ouassister")
        self.pid = sockets.peer_pid(self._socket)
        try:
            self._run("the greeting", self._client.connect(self._socket), timeout_s)
        except BaseException:
            self._shut()
            raise

    def __enter__(self) -> Qmp:
        """Close at the end of the block."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close."""
        self.close()

    def execute(self, command: str, *, timeout_s: float = 30.0, **arguments: object) -> Any:  # noqa: ANN401 - a JSON value
        """Run one command; an underscore in an argument's name stands for a hyphen.

        Raises:
            QemuRefusedError: QEMU answered with an error.
            QemuLostError: QEMU ended.
            DeadlineError: No answer in ``timeout_s``.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._run(command, self._client.execute(command, named), timeout_s)

    def execute_with(self, command: str, arguments: dict[str, object]) -> Any:  # noqa: ANN401
        """Run one command whose argument names hold underscores or dots."""
        return self._run(command, self._client.execute(command, arguments), 30.0)

    def send_fd(self, name: str, descriptor: int) -> None:
        """Hand a file descriptor to QEMU, which keeps it under ``name`` (``fd:NAME``)."""
        # The descriptor travels with a space, which QEMU's JSON parser skips.
        socket.send_fds(self._socket, [b" "], [descriptor])
        self.execute("getfd", fdname=name)

    @contextlib.contextmanager
    def listen(self, *names: str) -> Iterator[Callable[..., Event]]:
        """Collect events from here on.

        Yields:
            ``wait(timeout_s, match=None)``: the next event, or the next one that ``match``
            accepts; raises DeadlineError or QemuLostError.
        """
        listener = EventListener(names)

        def wait(timeout_s: float, match: Callable[[Event], bool] | None = None) -> Event:
            end = time.monotonic() + timeout_s
            while True:
                left = end - time.monotonic()
                event = dict(self._run("/".join(names), self._next(listener), left))
                if match is None or match(event):
                    return event

        with self._client.listen(listener):
            yield wait

    def close(self) -> None:
        """Hang up; QEMU goes on. Closing twice is fine."""
        if self._loop.is_closed():
            return
        # Ended by QEMU or by us: either way the connection is gone, which is what was asked.
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            self._loop.run_until_complete(asyncio.wait_for(self._client.disconnect(), 5))
        self._shut()

    def _shut(self) -> None:
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        self._socket.close()

    async def _next(self, listener: EventListener) -> Event:
        """The next event, or the end of the connection, whichever comes first."""
        # runstate_changed() sees only what changes from now on.
        if listener.empty() and self._client.runstate is not Runstate.RUNNING:
            raise EOFError
        event = asyncio.ensure_future(listener.get())
        gone = asyncio.ensure_future(self._client.runstate_changed())
        try:
            await asyncio.wait((event, gone), return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                raise EOFError
            return dict(event.result())
        finally:
            for task in (event, gone):
                task.cancel()
            await asyncio.gather(event, gone, return_exceptions=True)

    def _run(self, what: str, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        if self._loop.is_closed():
            work.close()
            raise QemuLostError(f"the QMP connection to {self._path} was closed before {what}")
        try:
            return self._loop.run_until_complete(asyncio.wait_for(work, max(timeout_s, 0)))
        except TimeoutError as error:
            message = f"QEMU did not answer within {timeout_s:.1f} s: {what}"
            raise DeadlineError(message, hint="see QEMU's log beside the vm.toml") from error
        except ExecuteError as error:
            raise QemuRefusedError(what, error.error_class, str(error)) from error
        except (ExecInterruptedError, ConnectError, QMPError, EOFError, OSError) as error:
            raise QemuLostError(f"QEMU hung up at {self._path} during {what}") from error
