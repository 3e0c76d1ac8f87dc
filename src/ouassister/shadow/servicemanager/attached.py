"""The stand-in of one program, from the side of who starts both."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.shadow import raw
from ouassister.shadow.servicemanager.journal import LOG
from ouassister.shadow.servicemanager.process import ServiceManager, start
from ouassister.shadow.syscalls.filter import build_filter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ouassister.shadow.servicemanager.server import Listeners
    from ouassister.shadow.servicemanager.state import ManagerState

RECORDS: Final = "services"  # a file of the run's output, out of the programs' reach
_APPEND: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


class Attached:
    """Starts the stand-in once the program's namespaces and sockets are known.

    Args:
        state: What the guest had running.
        records: Path of the file to append events to.
        enter: Puts a program of the guest that the stand-in starts within the limits of programs.

    Attributes:
        channel: Brings the listeners of the filters of the guest's programs that the stand-in
            starts; read by who answers them.
    """

    def __init__(self, state: ManagerState, records: str, enter: Callable[[], None]) -> None:
        self.channel, self._senders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._state = state
        self._records = records
        self._enter = enter
        self._namespaces: Sequence[int] = ()
        self._listeners: Listeners | None = None
        self._manager: ServiceManager | None = None

    def know_namespaces(self, namespaces: Sequence[int]) -> bool:
        """Where the program runs; raises OSError as `start`, and tells whether that happened."""
        self._namespaces = namespaces
        return self._start()

    def know_listeners(self, listeners: Listeners) -> bool:
        """The sockets that it made; raises OSError as `start`, and tells whether that happened."""
        self._listeners = listeners
        return self._start()

    def stop(self) -> None:
        """End the stand-in after its program.

        Raises:
            OSError: It died before; what it recorded is not all there was.
        """
        self.channel.close()
        self._senders.close()
        if self._manager is not None:
            if not self._manager.stop():
                raise OSError("the stand-in of the service manager died")
            return
        for descriptor in self._namespaces:
            os.close(descriptor)
        if self._listeners is not None:
            self._listeners.close()

    def _start(self) -> bool:
        if not self._namespaces or self._listeners is None:
            return False
        records = os.open(self._records, _APPEND, 0o644)  # read by the host's side
        log = os.open(Path(self._records).with_name(LOG), _APPEND, 0o644)
        try:
            self._manager = start(
                self._namespaces, self._listeners, self._state, records, log, self._confine
            )
        finally:
            os.close(records)
            os.close(log)
        return True

    def _confine(self) -> None:
        self._enter()
        listener = raw.seccomp_listener(build_filter())
        socket.send_fds(self._senders, [b"listener"], [listener])
        os.close(listener)
