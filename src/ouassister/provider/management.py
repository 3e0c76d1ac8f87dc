"""The network that stays open behind the closed gate: between this host and its guest alone.

A user network of QEMU with ``restrict=on`` lets the guest reach nobody, and a forwarded port of
loopback lets this host reach the guest's sshd. Whatever could open it further is refused by name.

Source: QEMU v7.2.0 qemu-options.hx (``-netdev user``), net/slirp.c (``slirp_hostfwd``).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.access import ROOT
from ouassister.provider.cmdline import devices, repeated, words

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of a user network; others let more through: guestfwd, smb and tftp, for some.
_HARMLESS: Final = frozenset(
    ("id", "type", "restrict", "hostfwd", "net", "host", "dhcpstart", "dns", "hostname",
     "domainname", "ipv4", "ipv6")
)  # fmt: skip
_FORWARD: Final = re.compile(
    r"tcp:(?P<host>[^:]*):(?P<port>[0-9]{1,5})-[^:]*:(?P<guest>[0-9]{1,5})"
)
_USER: Final = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")  # useradd(8), and dots


@dataclass(frozen=True, slots=True)
class Management:
    """A network device for ssh alone.

    Attributes:
        device: Its id; its link is never closed.
        netdev: Its back end.
        port: The port of loopback; 0: QEMU chooses one.
        guest_port: Where the guest's sshd listens.
        identity: File of the private key; None for those of the user's ssh-agent.
        user: Who logs in; another than root has sudo run each program.
    """

    device: str
    netdev: str
    port: int
    guest_port: int
    identity: Path | None
    user: str = ROOT


def find(
    command: Sequence[str], device: str, identity: Path | None, user: str = ROOT
) -> Management:
    """Find the management device in QEMU's command.

    Raises:
        ValueError: It is not there, or more than this host and the guest could meet there; the
            message completes "DEVICE ...".
    """
    if not _USER.fullmatch(user):
        raise ValueError(f"has the user {user!r}, which is no name of one")
    netdev = next(
        (one.get("netdev", "") for one in devices(words(command)) if one.get("id") == device), None
    )
    if netdev is None:
        raise ValueError("is the id of no -device of the command")
    found = [pairs for pairs in repeated(command, "netdev") if ("id", netdev) in pairs]
    if len(found) != 1:
        raise ValueError("has no -netdev of the command as its back end, or not one alone")
    pairs = found[0]
    if ("type", "user") not in pairs:
        raise ValueError("has a back end that is no user network")
    odd = sorted({key for key, _value in pairs} - _HARMLESS)
    if odd:
        raise ValueError(f"has a back end with {', '.join(odd)}: who can reach it is not known")
    if [value for key, value in pairs if key == "restrict"] != ["on"]:
        raise ValueError("has a back end without restrict=on: the guest could reach the world")
    forwards = [value for key, value in pairs if key == "hostfwd"]
    match = _FORWARD.fullmatch(forwards[0]) if len(forwards) == 1 else None
    if match is None:
        raise ValueError("needs one hostfwd=tcp:127.0.0.1:PORT-:22 of its back end, and no other")
    if not _is_loopback(match["host"]):
        raise ValueError(
            f"forwards from {match['host'] or 'every address'}: others than this host could reach"
            " the guest"
        )
    return Management(device, netdev, int(match["port"]), int(match["guest"]), identity, user)


def forwarded_port(table: str, management: Management) -> int | None:
    """The port of loopback, by what QEMU's ``info usernet`` shows of all user networks."""
    if management.port:
        return management.port
    inside = False
    for line in table.splitlines():
        if line and not line[0].isspace():  # "Hub -1 (NETDEV):"
            inside = line.rstrip().endswith(f"({management.netdev}):")
        match = re.match(r"\s+TCP\[HOST_FORWARD]\s+\d+\s+127\.\S+\s+(\d+)\s+\S+\s+(\d+)\s", line)
        if inside and match and int(match[2]) == management.guest_port:
            return int(match[1])
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False
