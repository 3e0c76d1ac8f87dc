"""The sockets of the service manager in the shadow's /run, and the loop that serves them.

Everything is bounded: clients, what one may send before it has said who it is, messages, unread
answers, records. A client that goes too far is cut off; one that only waits makes room for others.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.shadow.events import END, MAX_RECORDS, Event, Outcome, encode
from ouassister.shadow.servicemanager import journal
from ouassister.shadow.servicemanager.bus import Client
from ouassister.shadow.servicemanager.manager import Who
from ouassister.shadow.servicemanager.places import in_the_place_of
from ouassister.shadow.servicemanager.recorders import Recorders
from ouassister.shadow.servicemanager.wire import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ouassister.shadow.servicemanager.callers import Callers
    from ouassister.shadow.servicemanager.journal import Journal
    from ouassister.shadow.servicemanager.manager import Signal
    from ouassister.shadow.servicemanager.objects import Objects

PRIVATE_SOCKET: Final = "/run/systemd/private"
BUS_SOCKET: Final = "/run/dbus/system_bus_socket"
RECORD_PIPE: Final = "/run/ouassister/record"
BOOTED: Final = "/run/systemd/system"  # sd_booted(3)
MAX_CLIENTS: Final = 64
_BACKLOG: Final = 128
_CHUNK: Final = 65536
_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred, include/linux/socket.h
_GUID_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Listeners:
    """What the shadow's programs connect to, and the pipe that recorders write to."""

    private: socket.socket
    bus: socket.socket
    pipe: int
    journal: tuple[socket.socket, ...] = ()  # what they send log messages to

    def descriptors(self) -> list[int]:
        """To be sent to another process."""
        logs = (one.fileno() for one in self.journal)
        return [self.private.fileno(), self.bus.fileno(), self.pipe, *logs]

    @classmethod
    def received(cls, descriptors: Sequence[int]) -> Listeners:
        """Out of what `descriptors` sent."""
        private, bus, pipe, *logs = descriptors
        journal = tuple(socket.socket(fileno=one) for one in logs)
        return cls(socket.socket(fileno=private), socket.socket(fileno=bus), pipe, journal)

    def close(self) -> None:
        """Close all; the names stay."""
        self.private.close()
        self.bus.close()
        for one in self.journal:
            one.close()
        os.close(self.pipe)


def listen(root: str = "") -> Listeners:
    """Make the sockets and the pipe; what is left of the guest's own is replaced.

    Called by the first process of the programs' pid namespace: clients see who listened as their
    peer, and libsystemd takes no peer that has no pid (src/basic/socket-util.c, ``getpeercred``).

    Args:
        root: What stands before each path; empty where the tree is the root.
    """
    for path in (PRIVATE_SOCKET, BUS_SOCKET, RECORD_PIPE, BOOTED + "/x"):
        Path(root + path).parent.mkdir(parents=True, exist_ok=True)
    sockets = []
    for path, mode in ((PRIVATE_SOCKET, 0o700), (BUS_SOCKET, 0o666)):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with in_the_place_of(Path(root + path), mode):
            listener.bind(root + path)
        listener.listen(_BACKLOG)
        sockets.append(listener)
    with contextlib.suppress(FileNotFoundError):
        Path(root + RECORD_PIPE).unlink()
    os.mkfifo(root + RECORD_PIPE, 0o600)
    Path(root + RECORD_PIPE).chmod(0o622)  # scripts run as many users
    # Held for writing too, so that it has no end while no recorder has it open.
    pipe = os.open(root + RECORD_PIPE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISFIFO(os.fstat(pipe).st_mode):
        raise OSError(f"{RECORD_PIPE} was replaced")
    return Listeners(sockets[0], sockets[1], pipe, journal.listen(root))


class Records:
    """Writes events to a file, as many as anybody will read.

    Args:
        descriptor: Of the file, opened to append.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._left = MAX_RECORDS

    def write(self, event: Event) -> None:
        """Write one event."""
        line = encode(event)
        if self._left < len(line):
            if self._left:
                self._left = 0
                lost = Event(Outcome.LOST, (), detail="too many recorded calls; the rest is lost")
                os.write(self._descriptor, encode(lost))
            return
        self._left -= len(line)
        os.write(self._descriptor, line)

    def end(self) -> None:
        """Say that nothing is missing."""
        os.write(self._descriptor, END)


class Server:
    """Serves until it is told to stop.

    Args:
        listeners: Where clients come in.
        objects: The service manager.
        callers: Tells packages from processes.
        record: Takes each event.
        log: Takes log messages.
    """

    def __init__(
        self,
        listeners: Listeners,
        objects: Objects,
        callers: Callers,
        record: Callable[[Event], None],
        log: Journal,
    ) -> None:
        self._log = log
        self._listeners = listeners
        self._objects = objects
        self._callers = callers
        self._record = record
        self._recorders = Recorders(record)
        self._guid = os.urandom(_GUID_BYTES).hex()
        self._names = 0
        self._selector = selectors.DefaultSelector()
        self._clients: dict[socket.socket, Client] = {}  # the longest idle first

    def run(self, stop: int) -> None:
        """Serve until the descriptor ``stop`` can be read; then take what is still there."""
        for listener in (self._listeners.private, self._listeners.bus, self._listeners.pipe, stop):
            self._selector.register(listener, selectors.EVENT_READ)
        for one in self._log.sockets:
            self._selector.register(one, selectors.EVENT_READ)
        running = True
        while running:
            waiting = any(client.waiting for client in self._clients.values())
            ready = self._selector.select(0 if waiting else None)
            running = not any(key.fd == stop for key, _ in ready)
            self._drain_pipe()  # a recorder has ended before the same script's next call
            self._log.take()
            for key, events in ready:
                if key.fileobj in (self._listeners.private, self._listeners.bus):
                    self._accept(key.fileobj)
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._clients:
                    self._exchange(key.fileobj, events)
            for connection in list(self._clients):  # one call each, so that nobody waits for long
                self._answer(connection)
        for connection in list(self._clients):
            self._exchange(connection, selectors.EVENT_READ)
            while connection in self._clients and self._clients[connection].waiting:
                self._answer(connection)
        self._drain_pipe()
        self._log.take()
        for connection in list(self._clients):
            self._close(connection)
        self._selector.close()

    def _drain_pipe(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._listeners.pipe, _CHUNK):
                self._recorders.feed(data)

    def _accept(self, listener: object) -> None:
        assert isinstance(listener, socket.socket)  # noqa: S101 - registered so
        try:
            connection, _address = listener.accept()
        except BlockingIOError:
            return
        if len(self._clients) >= MAX_CLIENTS:
            self._close(next(iter(self._clients)))
        connection.setblocking(False)
        pid, uid, _gid = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        unique = ""
        if listener is self._listeners.bus:
            self._names += 1
            unique = f":1.{self._names}"
        self._clients[connection] = Client(
            unique, self._guid, pid, uid, self._identify, self._objects, self._record
        )
        self._selector.register(connection, selectors.EVENT_READ)

    def _identify(self, pid: int, uid: int) -> Who:
        return Who(uid, self._callers.of(pid))

    def _exchange(self, connection: socket.socket, events: int) -> None:
        """Read, if the client has not called for more than it reads; write what waits."""
        client = self._clients.pop(connection)
        self._clients[connection] = client  # not idle
        try:
            if events & selectors.EVENT_READ and client.listening:
                data = connection.recv(_CHUNK)  # descriptors sent along are dropped by the kernel
                if not data:
                    self._close(connection)
                    return
                client.feed(data)
            self._flush(connection)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            self._close(connection)

    def _answer(self, connection: socket.socket) -> None:
        client = self._clients.get(connection)
        if client is None or not client.waiting:
            return
        try:
            signals = client.answer()
            self._flush(connection)
        except (OSError, ProtocolError):
            self._close(connection)
            return
        for signal in signals:
            self._broadcast(signal, client)

    def _broadcast(self, signal: Signal, cause: Client) -> None:
        for connection, client in list(self._clients.items()):
            if client.ready and (client.subscribed or client is cause):
                try:
                    client.send_signal(signal)
                    self._flush(connection)
                except (OSError, ProtocolError):
                    self._close(connection)

    def _flush(self, connection: socket.socket) -> None:
        """Send what can be sent; the rest waits until the client reads."""
        client = self._clients[connection]
        with contextlib.suppress(BlockingIOError):
            while client.unsent:
                del client.unsent[: connection.send(client.unsent)]
        read = selectors.EVENT_READ if client.listening else 0
        write = selectors.EVENT_WRITE if client.unsent else 0
        if read | write:
            self._selector.modify(connection, read | write)

    def _close(self, connection: socket.socket) -> None:
        del self._clients[connection]
        self._selector.unregister(connection)
        connection.close()
