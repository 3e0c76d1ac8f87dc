"""The helper of a guest, run on this host behind a terminal in the place of its virtio port."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
import tty
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Port:
    """A port of which one end is a UNIX socket, as QEMU's chardev is, and the other a device."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "port.sock"
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.device = os.ttyname(self._slave)
        os.chmod(self.device, 0o600)  # noqa: PTH101 - a name, no file of ours
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self._listener.listen(1)
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def start(self, helper: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([helper, self.device], stdin=subprocess.DEVNULL)

    def close(self) -> None:
        os.close(self._stopped)
        self._thread.join(30)
        assert not self._thread.is_alive()
        for one in (self._master, self._slave, self._stop):
            os.close(one)
        self._listener.close()

    def _serve(self) -> None:
        """One client after the other; what comes while there is none is lost."""
        while self._ready(self._listener.fileno()):
            peer, _ = self._listener.accept()
            with peer, contextlib.suppress(OSError):
                while self._pass_on(peer):
                    pass

    def _ready(self, *others: int) -> list[int]:
        ready = select.select([self._stop, *others], [], [])[0]
        return [] if self._stop in ready else ready

    def _pass_on(self, peer: socket.socket) -> bool:
        ready = self._ready(peer.fileno(), self._master)
        if self._master in ready:
            peer.sendall(os.read(self._master, 4096))
        if peer.fileno() in ready:
            data = peer.recv(4096)
            if not data:
                return False
            while data and self._writable():
                data = data[os.write(self._master, data[:1024]) :]
        return bool(ready)

    def _writable(self) -> bool:
        """Whatever the helper says meanwhile has to wait; a terminal takes some of it."""
        return bool(select.select([], [self._master], [], 30)[1])
