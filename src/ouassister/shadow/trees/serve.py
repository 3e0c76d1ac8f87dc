"""Mounts and serves /sys and /dev in a shadow."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.shadow import raw
from ouassister.shadow.devices.filesystem import DevFiles
from ouassister.shadow.served import server, snapshot
from ouassister.shadow.sysfs.filesystem import SysFiles
from ouassister.shadow.sysfs.record import recorders
from ouassister.shadow.trees.handover import DEV, SYS, ask, system_first

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ouassister.shadow.served.snapshot import Node

_PERMISSIONS: Final = 0o7777
_GONE: Final = (errno.ENOTCONN, errno.ECONNABORTED)


class ServerDiedError(Exception):
    """A tree is not served any more: programs get ENOTCONN there."""


class Servers:
    """What serves the trees of one shadow."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}
        self._stage = Path()

    def start(self, folder: Path, stage: Path, records: Path) -> frozenset[str]:
        """Mount and serve them; called in the supervisor.

        Args:
            folder: Where `ouassister.shadow.trees.handover` hands over.
            stage: Has an empty folder for each.
            records: The file that takes what programs do to /sys; a whole path, since a server of
                FUSE leaves the working folder.

        Returns:
            Which of them are mounted.

        Raises:
            InternalError: What was handed over is no tree.
            OSError: The host refuses a mount.
        """
        self._stage = stage
        first = system_first(folder)
        # For its server, which leaves the working folder, too.
        handed = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        try:
            self._pids[SYS] = server.start(
                "sysfs", str(stage / SYS), raw.MS_NOEXEC, first[0].mode & _PERMISSIONS,
                lambda: SysFiles(
                    first, lambda: _asked(handed), *recorders(records, server.caller_pid)
                ),
            )  # fmt: skip
        finally:
            os.close(handed)
        if (folder / DEV).exists():
            devices = snapshot.read(folder / DEV)
            self._pids[DEV] = server.start(
                "udev", str(stage / DEV), 0, devices[0].mode & _PERMISSIONS,
                lambda: DevFiles(devices, server.caller),
            )  # fmt: skip
        return frozenset(self._pids)

    def pids(self) -> tuple[int, ...]:
        """Return who serves."""
        return tuple(self._pids.values())

    def check(self) -> None:
        """Make sure that all are served.

        Raises:
            ServerDiedError: One is not; what programs did since they were checked may be wrong.
        """
        for name, pid in self._pids.items():
            # The kernel ends the connection before the process has ended: programs saw it first.
            options = os.WNOHANG
            try:
                os.statvfs(self._stage / name)
            except OSError as error:
                if error.errno in _GONE:
                    options = 0
            ended, status = os.waitpid(pid, options)
            if ended:
                del self._pids[name]
                code = os.waitstatus_to_exitcode(status)
                raise ServerDiedError(f"the server of the shadow's /{name} ended with {code}")


def _asked(folder: int) -> Sequence[Node]:
    """Ask for /sys, in its server: who gets no answer ends, so that the run does not end well."""
    try:
        return ask(Path(f"/proc/self/fd/{folder}"))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
