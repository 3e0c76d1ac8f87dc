"""Puts the guest's /dev into a program's tree, with the few devices in it that lead somewhere.

Source: Linux v6.1 ``Documentation/filesystems/devpts.rst`` (an instance of its own);
``mount(2)`` (a mount over a file).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.shadow import raw
from ouassister.shadow.mounts import DEVICE_NODES, Tmpfs, exact

if TYPE_CHECKING:
    from ouassister.shadow.mounts import Sources

_TERMINALS: Final = "newinstance,ptmxmode=0666,mode=620,gid=5"


@dataclass(frozen=True, slots=True)
class GuestDevices:
    """The guest's /dev, mounted before; harmless nodes over its own, and terminals of the shadow's.

    Attributes:
        source: Where it is mounted.
        own_shm: Nothing of the guest will stand at /dev/shm.
        target: Where it goes.
    """

    source: str
    own_shm: bool
    target: str = "/dev"

    def describe(self) -> str:
        """See `ouassister.shadow.mounts.Operation`."""
        return f"mount --bind {self.source} /dev with {', '.join(DEVICE_NODES)}, ptmx and pts"

    def sources(self) -> tuple[str, ...]:
        """See `ouassister.shadow.mounts.Operation`."""
        return (self.source, *(f"/dev/{name}" for name in DEVICE_NODES))

    def execute(self, sources: Sources) -> None:
        """See `ouassister.shadow.mounts.Operation`."""
        part = raw.open_part(sources.descriptor(self.source), b"")
        try:
            with exact(b"/dev") as place:
                raw.mount(f"/proc/self/fd/{part}", place, "", raw.MS_BIND)
        finally:
            os.close(part)
        for name in DEVICE_NODES:
            with exact(f"/dev/{name}".encode()) as place:
                raw.mount(sources[f"/dev/{name}"], place, "", raw.MS_BIND)
        with exact(b"/dev/pts") as place:
            raw.mount("devpts", place, "devpts", raw.MS_NOSUID | raw.MS_NOEXEC, _TERMINALS)
        with exact(b"/dev/ptmx") as place:
            raw.mount("/dev/pts/ptmx", place, "", raw.MS_BIND)
        if self.own_shm:
            Tmpfs("/dev/shm", 0o1777, exact=True).execute(sources)  # noqa: S108 - the guest's
