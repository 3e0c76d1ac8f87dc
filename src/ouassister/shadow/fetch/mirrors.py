"""Which hosts a guest's package manager may reach, and under which addresses.

The list comes from the guest's own sources, so it is a guest's word: a source that names the host's
loopback, or the address where clouds serve their secrets, would turn the fetching of lists into a
way to the host's services. Such addresses are refused unless the VM's owner has listed them.

Source: RFC 6890 (special-purpose addresses); apt-transport-http(1), apt-transport-mirror(1).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable

_PORTS: Final = {"http": 80, "https": 443}
_MAX_HOSTS: Final = 256
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9a-fA-F:.]{2,45}")


@dataclass(frozen=True, slots=True)
class Mirrors:
    """Where the package manager may go.

    Attributes:
        hosts: Names or addresses, with their ports.
        local: Those of them whose address may be one of this host or of its links.
        upstream: The proxy that the guest is configured with; all goes through it.
    """

    hosts: tuple[tuple[str, int], ...]
    local: tuple[tuple[str, int], ...] = field(default=())
    upstream: tuple[str, int] | None = None

    def reaches(self, host: str, port: int) -> bool:
        """Tell whether a host is one of them."""
        return (host.lower().rstrip("."), port) in self.hosts

    def may_connect(self, host: str, port: int, address: str) -> bool:
        """Tell whether the address that a host's name stands for may be connected to."""
        return (host.lower().rstrip("."), port) in self.local or is_remote(address)


def place_of(uri: str) -> tuple[str, int] | None:
    """Return host and port that an apt source's URI names; None where it names no host."""
    try:
        parts = urlsplit(uri.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    scheme = parts.scheme.lower().rpartition("+")[2]  # "mirror+http", "tor+https"
    if scheme not in _PORTS or not host or not _HOST.fullmatch(host):
        return None
    return host.lower().rstrip("."), port or _PORTS[scheme]


def places_of(uris: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Return the hosts of many URIs, each once, in their order; at most 256."""
    found = dict.fromkeys(place for uri in uris if (place := place_of(uri)) is not None)
    return tuple(found)[:_MAX_HOSTS]


def is_remote(address: str) -> bool:
    """Tell whether an address is another machine's: not this host's, its links' or a group's."""
    one = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(one, ipaddress.IPv6Address):
        inner = one.ipv4_mapped or one.sixtofour or (one.teredo[1] if one.teredo else None)
        if inner is not None and not is_remote(str(inner)):
            return False
    return not (
        one.is_loopback
        or one.is_link_local
        or one.is_multicast
        or one.is_unspecified
        or (one.version == 4 and one.is_reserved)
        or (one.version == 4 and one in ipaddress.ip_network("0.0.0.0/8"))
    )
