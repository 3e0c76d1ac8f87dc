"""UNIX sockets at paths of any length."""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import TYPE_CHECKING

from ouassister.errors import ChannelError

if TYPE_CHECKING:
    from pathlib import Path


def connect(path: Path, *, timeout_s: float = 10.0) -> socket.socket:
    """Connect to a listening UNIX stream socket.

    Raises:
        TimeoutError: Somebody listens, but has no room for another client.
        OSError: Nobody listens there.
    """
    end = time.monotonic() + timeout_s
    # sun_path holds 108 bytes (unix(7)); a path through the folder's descriptor is always short.
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # A blocking connect would wait without end while the listener's backlog is full.
        sock.setblocking(False)
        while True:
            try:
                sock.connect(f"/proc/self/fd/{folder}/{path.name}")
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise TimeoutError(f"no room for another client at {path}") from error
                time.sleep(0.01)
        sock.setblocking(True)
        return sock
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(folder)


def connect_anew(old: socket.socket, path: Path) -> socket.socket:
    """Hang up at a virtio port of the guest, and connect again.

    A port whose client did not read when its VM was saved stays held back after the VM was
    restored, with all that the guest has to say, until a client hangs up: docs/design/0025.

    Raises:
        ChannelError: Nobody listens there any more.
    """
    old.close()
    try:
        return connect(path)
    except OSError as error:
        raise ChannelError(f"nobody listens at {path} any more: {error}") from error


def peer_pid(sock: socket.socket) -> int:
    """The process that listens at the other end (SO_PEERCRED, unix(7))."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", raw)[0]
    return pid
