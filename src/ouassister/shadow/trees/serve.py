"""Mounts and serves /sys and /dev in a shadow."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ouassister.shadow import raw
from ouassister.shadow.devices.filesystem import DevFiles
from ouassister.shadow.served import server, snapshot
from ouassister.shadow.sysfs.filesystem import SysFiles
from ouassister.shadow.sysfs.record import recorders
from ouassister.shadow.trees.handover import DEV, SYS

if TYPE_CHECKING:
    from pathlib import Path

_PERMISSIONS: Final = 0o7777


class ServerDiedError(Exception):
    """A tree is not served any more: programs get ENOTCONN there."""


class Servers:
    """What serves the trees of one shadow."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}

    def start(self, folder: Path, stage: Path, records: Path) -> None:
        """Mount and serve what was handed over; called in the supervisor.

        Args:
            folder: Where `ouassister.shadow.trees.handover.write` wrote.
            stage: Has an empty folder for each.
            records: The file that takes what programs do to /sys; a whole path, since a server of
                FUSE leaves the working folder.

        Raises:
            InternalError: What was handed over is no tree.
            OSError: The host refuses a mount.
        """
        if (folder / SYS).exists():
            system = snapshot.read(folder / SYS)
            self._pids[SYS] = server.start(
                "sysfs", str(stage / SYS), raw.MS_NOEXEC, system[0].mode & _PERMISSIONS,
                lambda: SysFiles(system, *recorders(records)),
            )  # fmt: skip
        if (folder / DEV).exists():
            devices = snapshot.read(folder / DEV)
            self._pids[DEV] = server.start(
                "udev", str(stage / DEV), 0, devices[0].mode & _PERMISSIONS,
                lambda: DevFiles(devices, server.caller),
            )  # fmt: skip

    def pids(self) -> tuple[int, ...]:
        """Return who serves."""
        return tuple(self._pids.values())

    def check(self) -> None:
        """Make sure that all are served.

        Raises:
            ServerDiedError: One is not; what programs did since they were checked may be wrong.
        """
        for name, pid in self._pids.items():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._pids[name]
                code = os.waitstatus_to_exitcode(status)
                raise ServerDiedError(f"the server of the shadow's /{name} ended with {code}")


def served(stage: Path) -> frozenset[str]:
    """Tell which of them are mounted."""
    return frozenset(name for name in (SYS, DEV) if (stage / name).is_mount())
