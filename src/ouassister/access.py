"""How a resume gets at its guest, and which links it opens: told while the guest sleeps.

Kept in its change set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

AGENT: Final = "qemu-ga"
SSH: Final = "ssh"
ROOT: Final = "root"  # who logs in by it, where nobody else is named
PORT: Final = "virtio-port"
PORT_NAME: Final = "org.ouassister.0"  # of the port that our helper serves


@dataclass(frozen=True, slots=True)
class Access:
    """The channel that programs are run through, and what brings the change set in.

    Attributes:
        channel: Its name.
        host_keys: Of ssh: the guest's own public keys, each as ``TYPE BASE64``, as they lie on
            its disk. Nothing else can answer in its place.
        carried: The channel brings the change set in, too: no disk is plugged in.
        links_down: Network devices whose links were down when the guest fell asleep, by its memory:
            the gate does not open them.
        links_untold: Those of which nothing tells it: the gate opens them.
    """

    channel: str = AGENT
    host_keys: tuple[str, ...] = ()
    carried: bool = False
    links_down: tuple[str, ...] = ()
    links_untold: tuple[str, ...] = ()


BY_AGENT: Final = Access()
