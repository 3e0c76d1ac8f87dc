"""The sockets of the guest's log daemon: what scripts tell it is kept beside the run's output.

Nobody at /dev/log is more than a lost line: where systemd runs, logger(1) ends with an error then,
and who writes into its pipe is killed by SIGPIPE. Debian's mariadb-server sets up its tables so.

Source: systemd v252 src/journal/journald-{syslog,native}.c; util-linux 2.38 misc-utils/logger.c
(``--socket-errors=auto``).
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.shadow.servicemanager.places import in_the_place_of

if TYPE_CHECKING:
    from collections.abc import Iterable

LOG: Final = "journal.log"  # a file of the run's output, out of the programs' reach
SOCKETS: Final = ("/run/systemd/journal/dev-log", "/run/systemd/journal/socket")
_MAX_MESSAGE: Final = 65536
_MAX_BYTES: Final = 1 << 20
_LOST: Final = b"ouassister: what follows in the log is not kept\n"


def listen(root: str = "") -> tuple[socket.socket, ...]:
    """Make the sockets; what is left of the guest's own is replaced.

    Args:
        root: What stands before each path; empty where the tree is the root.
    """
    made = []
    for path in SOCKETS:
        Path(root + path).parent.mkdir(parents=True, exist_ok=True)
        taker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with in_the_place_of(Path(root + path), 0o666):
            taker.bind(root + path)
        made.append(taker)
    return tuple(made)


class Journal:
    """Takes what is told, so that nobody waits, and keeps the first MiB of it.

    Args:
        sockets: Of `listen`.
        descriptor: Of the file to append to.
    """

    def __init__(self, sockets: Iterable[socket.socket], descriptor: int) -> None:
        self.sockets = tuple(sockets)
        self._descriptor = descriptor
        self._left = _MAX_BYTES

    def take(self) -> None:
        """Take all that waits."""
        for one in self.sockets:
            with contextlib.suppress(BlockingIOError):
                while True:  # descriptors sent along are dropped by the kernel
                    self._keep(one.recv(_MAX_MESSAGE).rstrip(b"\0\n") + b"\n")

    def _keep(self, line: bytes) -> None:
        if self._left <= 0:
            return
        self._left -= len(line)
        os.write(self._descriptor, line if self._left > 0 else _LOST)
