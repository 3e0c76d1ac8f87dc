"""Where the guest's apt goes for lists and archives, and how it is sent through our proxy.

Source: apt-get(8), ``indextargets``; apt.conf(5) and apt-transport-http(1):
``Acquire::http::Proxy`` has one entry more for each host with a proxy of its own, or none.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ouassister.shadow.fetch.mirrors import Mirrors, place_of, places_of

if TYPE_CHECKING:
    from collections.abc import Iterable

ASK: Final = (
    "apt-get indextargets --no-release-info --format '$(REPO_URI)' >/run/ouassister/log/uris"
    " && apt-config dump >/run/ouassister/log/settings"
)
URIS, SETTINGS = "uris", "settings"
_PROXY: Final = re.compile(
    r'(Acquire::https?::Proxy(?:::[A-Za-z0-9.:_-]+)?) "([^"]*)";', re.IGNORECASE
)
_OFF: Final = ("", "direct", "false")
_MAX_SETTINGS: Final = 256


def mirrors(uris: str, settings: str, local: Iterable[tuple[str, int]]) -> Mirrors:
    """Return where apt may go.

    Args:
        uris: A URI of a repository on each line.
        settings: What ``apt-config dump`` prints.
        local: Places that may be this host's, by the word of the VM's owner.
    """
    upstream = next(
        (place for _, value in _proxies(settings) if (place := place_of(value)) is not None), None
    )
    return Mirrors(places_of(uris.splitlines()), tuple(local), upstream)


def options(settings: str, proxy: str) -> tuple[str, ...]:
    """Return the settings that send all of apt's requests to a proxy, whatever the guest's say."""
    names = {"Acquire::http::Proxy", "Acquire::https::Proxy"}
    names.update(name for name, _ in _proxies(settings, off=True))
    detect = ("Acquire::http::Proxy-Auto-Detect=", "Acquire::http::ProxyAutoDetect=")
    return (*detect, *(f"{name}={proxy}" for name in sorted(names)))


def _proxies(settings: str, *, off: bool = False) -> list[tuple[str, str]]:
    """Name and value of the settings that name a proxy; with ``off`` those that deny one, too."""
    found = [(one[1], one[2]) for one in _PROXY.finditer(settings)][:_MAX_SETTINGS]
    return [(name, value) for name, value in found if off or value.lower() not in _OFF]
