"""What apt and dpkg tell of a run while it goes on: errors by package, and who was at work when.

Sources: apt, README.progress-reporting (``APT::Status-Fd``: ``pmerror:NAME:PERCENT:MESSAGE``, where
the name of a package of another architecture has a colon in it); dpkg(1), ``--log``. Both files
lie where the guest's scripts can write, so they are a guest's words: names, and no more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME: Final = r"[a-z0-9][a-z0-9+.-]{0,254}"
_ERROR: Final = re.compile(rf"pmerror:(?P<name>{_NAME})[^:]*(?::[a-z0-9-]+)?:[0-9.]+:(?P<words>.*)")
_WORK: Final = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) "
    rf"(?:install|upgrade|configure|trigproc|remove|purge) (?P<name>{_NAME})(?::[a-z0-9-]+)? "
)
_ZONE: Final = re.compile(r"([+-])(\d\d)(\d\d)")
# dpkg, src/main/packages.c, deferred_configure: it waits for another package.
_WAITS: Final = "dependency problems"
_MAX_WORDS: Final = 300
_MAX_ERRORS: Final = 1000


@dataclass(frozen=True, slots=True)
class PackageError:
    """dpkg gave a package up; ``waits`` when that is for another one that it depends on."""

    package: str
    words: str
    waits: bool


@dataclass(frozen=True, slots=True)
class Work:
    """dpkg began to work on a package, at a second since the epoch."""

    package: str
    at_s: int


def parse_errors(status: str) -> tuple[PackageError, ...]:
    """Read ``APT::Status-Fd``: the packages that dpkg gave up, each once, in its order."""
    found: dict[str, PackageError] = {}
    for line in status.splitlines():
        match = _ERROR.fullmatch(line)
        if match is None or len(found) >= _MAX_ERRORS:
            continue
        words = match["words"].strip()[:_MAX_WORDS]
        error = PackageError(match["name"], words, words.startswith(_WAITS))
        found.setdefault(error.package, error)
    return tuple(found.values())


def parse_log(log: str, zone: str) -> tuple[Work, ...]:
    """Read dpkg's log, whose times are the guest's; ``zone`` is what its ``date +%z`` says."""
    match = _ZONE.fullmatch(zone.strip())
    offset = timedelta()
    if match is not None:
        offset = timedelta(hours=int(match[2]), minutes=int(match[3]))
        offset = -offset if match[1] == "-" else offset
    if abs(offset) >= timedelta(days=1):
        offset = timedelta()
    return tuple(_work(log, timezone(offset)))


def _work(log: str, zone: timezone) -> Iterator[Work]:
    for line in log.splitlines():
        match = _WORK.match(line)
        if match is None:
            continue
        try:
            at = datetime.strptime(match["time"], "%Y-%m-%d %H:%M:%S").replace(tzinfo=zone)
        except ValueError:
            continue  # a script wrote there, and nothing follows from that
        yield Work(match["name"], int(at.timestamp()))


def at_work(works: tuple[Work, ...], second: int) -> tuple[str, ...]:
    """Packages that dpkg worked on in a second; the log is no finer."""
    found: dict[str, None] = {}
    for work, following in zip(works, [*works[1:], None], strict=True):
        if work.at_s <= second and (following is None or second <= following.at_s):
            found[work.package] = None
    return tuple(found)
