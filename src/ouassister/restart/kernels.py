"""The kernel that runs against the newest one that is installed.

Source: deb-version(7) for the order of versions; Debian's names of kernels are
``vmlinuz-VERSION-FLAVOUR``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_RELEASE: Final = re.compile(r"(.+?)-((?!rc\d)[a-z].*)")
_PART: Final = re.compile(r"(\d+)|~|-rc")
_PACKAGE: Final = "linux-image-"
_END: Final = (1, -1)  # above what a tilde begins, below any number


def newer(running: str, releases: list[str]) -> str:
    """Return the newest installed kernel of the running one's flavour; "" when it runs already."""
    version, flavour = _split(running)
    newest, best = "", _key(version)
    for release in releases:
        other, its_flavour = _split(release)
        if its_flavour == flavour and _key(other) > best:
            newest, best = release, _key(other)
    return newest


def installed_by(packages: Iterable[str]) -> list[str]:
    """Releases of the kernels that packages install, by Debian's names of them."""
    names = (name.removesuffix("-unsigned") for name in packages)
    return [name.removeprefix(_PACKAGE) for name in names if name.startswith(_PACKAGE)]


def _split(release: str) -> tuple[str, str]:
    """Split a release into version and flavour."""
    found = _RELEASE.fullmatch(release)
    return (found[1], found[2]) if found else (release, "")


def _key(version: str) -> tuple[tuple[int, int], ...]:
    """A key that sorts by numbers; a release candidate comes before its release."""
    numbers = ((1, int(one[1])) if one[1] else (0, 0) for one in _PART.finditer(version))
    return (*numbers, _END)
