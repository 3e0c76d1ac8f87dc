"""What apt-get prints, read into records.

Source: apt-get(8), option ``-s`` and ``--print-uris``; the formats are apt's documented interface
for scripts and unchanged since apt 0.8. Everything here came from the guest's own apt, so each
word is checked against the alphabet of Debian Policy before it goes anywhere else.
"""

from __future__ import annotations

import re
import urllib.parse
from typing import TYPE_CHECKING, Final

from ouassister.errors import UpdaterError
from ouassister.model import Archive, LeftOut, PackageChange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Debian Policy 5.6.1 (names), 5.6.12 (versions), 5.6.8 (architectures).
_NAME: Final = r"[a-z0-9][a-z0-9+.-]{0,254}"
_VERSION: Final = r"[A-Za-z0-9.+:~-]{1,255}"
_ARCH: Final = r"[a-z0-9-]{1,64}"
# A minus at the end asks apt-get to remove the package (apt-get(8), "install").
PACKAGE: Final = re.compile(rf"{_NAME}(?::{_ARCH})?(?:={_VERSION})?(?<!-)")

_INSTALL: Final = re.compile(
    rf"Inst (?P<name>{_NAME})(?::{_ARCH})? (?:\[(?P<old>{_VERSION})\] )?"
    rf"\((?P<new>{_VERSION}) .*?\[(?P<arch>{_ARCH})\]"
)
_REMOVE: Final = re.compile(
    rf"(?:Remv|Purg) (?P<name>{_NAME})(?::(?P<arch>{_ARCH}))? \[(?P<old>{_VERSION})\]"
)
_URI: Final = re.compile(
    r"'(?P<url>[^']+)' (?P<file>[A-Za-z0-9][^/ ]*) (?P<size>[0-9]{1,18})"
    r" (?P<digest>SHA(?:256|512):[0-9a-f]+)"
)
_KEPT_BACK: Final = "The following packages have been kept back:"
_UNMET: Final = (
    "The following packages have unmet dependencies:",
    "Unsatisfied dependencies:",  # apt 3
)
_BROKEN: Final = re.compile(rf" (?P<name>{_NAME})(?::{_ARCH})? : ")
_NOT_FOUND: Final = re.compile(
    rf"^E: (?:Unable to locate package (?P<unknown>{_NAME}(?::{_ARCH})?)"
    rf"|Package '(?P<gone>{_NAME}(?::{_ARCH})?)' has no installation candidate"
    rf"|Version '{_VERSION}' for '(?P<version>{_NAME}(?::{_ARCH})?)' was not found)$",
    re.MULTILINE,
)


def parse_changes(output: str) -> tuple[PackageChange, ...]:
    """Read ``apt-get -s``: one record for each ``Inst`` and ``Remv`` line, in apt's order.

    Raises:
        UpdaterError: Such a line cannot be read.
    """
    changes = []
    for line in output.splitlines():
        if line.startswith("Inst "):
            match = _INSTALL.match(line)
            if match is None:
                raise UpdaterError(f"apt-get simulated a line that cannot be read: {line[:200]!r}")
            old = match["old"] or ""
            changes.append(PackageChange(match["name"], match["arch"], old, match["new"]))
        elif line.startswith(("Remv ", "Purg ")):
            match = _REMOVE.match(line)
            if match is None:
                raise UpdaterError(f"apt-get simulated a line that cannot be read: {line[:200]!r}")
            changes.append(PackageChange(match["name"], match["arch"] or "", match["old"], ""))
    return tuple(changes)


def same_changes(changes: tuple[PackageChange, ...], output: str) -> bool:
    """Whether another simulation changes the same, in whichever order."""
    try:
        return set(parse_changes(output)) == set(changes)
    except UpdaterError:
        return False


def parse_archives(output: str) -> tuple[Archive, ...]:
    """Read ``apt-get --print-uris``; file names have no folder in them.

    Raises:
        UpdaterError: Such a line cannot be read, or has no digest of the SHA-2 family.
    """
    archives = []
    for line in output.splitlines():
        if not line.startswith("'"):
            continue
        match = _URI.fullmatch(line.strip())
        if match is None:
            raise UpdaterError(f"apt-get named an archive that cannot be read: {line[:200]!r}")
        name = urllib.parse.unquote(match["file"]).split("_")[0]
        archives.append(
            Archive(name, match["url"], match["file"], int(match["size"]), match["digest"])
        )
    return tuple(archives)


def parse_kept_back(output: str) -> tuple[LeftOut, ...]:
    """Read the packages that an upgrade keeps back."""
    left_out: list[LeftOut] = []
    inside = False
    for line in output.splitlines():
        if line == _KEPT_BACK:
            inside = True
        elif inside and line.startswith("  "):
            # With APT::Get::Show-Versions there is "(OLD => NEW)" behind each name.
            names = [word for word in line.split() if PACKAGE.fullmatch(word)]
            left_out += [LeftOut(name, "kept back by the guest's apt") for name in names]
        else:
            inside = False
    return tuple(left_out)


def missing_packages(output: str) -> tuple[str, ...]:
    """Names that apt-get does not find, or finds no candidate for."""
    return tuple(match[match.lastgroup or 0] for match in _NOT_FOUND.finditer(output))


def broken_packages(output: str) -> tuple[str, ...]:
    """Names of packages whose dependencies apt-get cannot fulfil."""
    names: list[str] = []
    inside = False
    for line in output.splitlines():
        if line in _UNMET:
            inside = True
        elif inside and line.startswith(" "):
            match = _BROKEN.match(line)
            if match is not None:  # further lines of one package are indented more
                names.append(match["name"])
        else:
            inside = False
    return tuple(dict.fromkeys(names))


def unreachable_indexes(output: str) -> tuple[str, ...]:
    """Addresses that ``apt-get update`` failed to fetch, as its ``Err:`` lines name them."""
    found = re.findall(r"^Err:\d+ (\S+ \S+)", output, re.MULTILINE)
    return tuple(dict.fromkeys(found))


def reached_indexes(output: str) -> bool:
    """Whether ``apt-get update`` fetched a list, or found it unchanged."""
    return re.search(r"^(?:Get|Hit):\d+ ", output, re.MULTILINE) is not None


def error_lines(output: str, *, most: int = 3) -> str:
    """The lines that tell what went wrong, joined; the last lines when none is marked."""
    marked = [line for line in output.splitlines() if line.startswith(("E: ", "dpkg: error"))]
    lines = marked[-most:] or [line for line in output.splitlines() if line.strip()][-most:]
    return "; ".join(line.removeprefix("E: ").strip() for line in lines) or "no message"


def progress(lines: Iterable[str]) -> Iterator[str]:
    """Keep what is worth telling while apt and dpkg work."""
    for line in lines:
        if line.startswith(("Get:", "Unpacking ", "Setting up ", "Processing triggers ")):
            yield line.removesuffix(" ...")
