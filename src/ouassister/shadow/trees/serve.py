"""Mounts and serves /sys and /dev in a shadow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ouassister.shadow import raw
from ouassister.shadow.devices.filesystem import DevFiles
from ouassister.shadow.served import server, snapshot
from ouassister.shadow.sysfs.filesystem import SysFiles
from ouassister.shadow.sysfs.record import recorders
from ouassister.shadow.trees.handover import DEV, SYS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ouassister.shadow.served.snapshot import Node


def serve(folder: Path, stage: Path, records: Path) -> tuple[int, ...]:
    """Mount what was handed over, in the supervisor; return the pids of the servers.

    Args:
        folder: Where `write` wrote.
        stage: Has an empty folder for each.
        records: The file that takes what programs do to /sys.

    Raises:
        InternalError: What was handed over is no tree.
        OSError: The host refuses a mount.
    """
    made: dict[str, tuple[int, Callable[[list[Node]], Any]]] = {
        SYS: (raw.MS_NOEXEC, lambda nodes: SysFiles(nodes, *recorders(records))),
        DEV: (0, lambda nodes: DevFiles(nodes, server.caller)),
    }
    pids = []
    for name, (flags, operations) in made.items():
        if not (folder / name).exists():
            continue
        nodes = snapshot.read(folder / name)

        def make(
            nodes: list[Node] = nodes, operations: Callable[[list[Node]], Any] = operations
        ) -> object:
            return operations(nodes)

        source = "sysfs" if name == SYS else "udev"
        mode = nodes[0].mode & 0o7777
        pids.append(server.start(source, str(stage / name), flags, mode, make))
    return tuple(pids)


def served(stage: Path) -> frozenset[str]:
    """Tell which of them `serve` has mounted."""
    return frozenset(name for name in (SYS, DEV) if (stage / name).is_mount())
