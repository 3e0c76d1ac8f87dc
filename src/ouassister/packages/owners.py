"""Which package a file belongs to, as the guest's dpkg knows it.

Source: dpkg-query(1), ``--search`` (patterns of glob(7); ``NAME[:ARCH], NAME: PATH``) and
``--listfiles``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ouassister.errors import UpdaterError
from ouassister.shadow.events import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.shadow.session import Shadow

_NAME: Final = re.compile(rb"([a-z0-9][a-z0-9+.-]{0,254})(?::[a-z0-9-]+)?")
_MERGED: Final = (b"/bin/", b"/sbin/", b"/lib")  # links to the same below /usr
_MAX_PATHS: Final = 256
_MAX_BYTES: Final = 64 << 20
_TIMEOUT_S: Final = 120.0
_OUTPUT: Final = "owners"
_EACH: Final = 'for one; do echo ">$one"; dpkg-query --listfiles -- "$one" 2>/dev/null; done; true'


def owners(shadow: Shadow, paths: Iterable[bytes]) -> dict[bytes, tuple[str, ...]]:
    """Ask who owns each path; one that nobody owns is not in the answer."""
    asked = [path for path in dict.fromkeys(paths) if path.startswith(b"/") and b"\n" not in path]
    asked = asked[:_MAX_PATHS]
    if not asked:
        return {}
    patterns = [_escaped(spelled) for path in asked for spelled in _spellings(path)]
    # It ends with 1 when one of them belongs to nobody.
    found = parse_search(_query(shadow, "--search", "--", *patterns, most=1))
    answer = {path: sum((found.get(one, ()) for one in _spellings(path)), ()) for path in asked}
    return {path: names for path, names in answer.items() if names}


def files_of(shadow: Shadow, packages: Iterable[str]) -> frozenset[bytes]:
    """All paths of installed packages, as they are spelled on a merged /usr too."""
    names = tuple(packages)
    if not names:
        return frozenset()
    lines = _query(shadow, "--listfiles", "--", *names, most=1).splitlines()
    return frozenset(_merged({line for line in lines if line.startswith(b"/")}))


def lists_of(shadow: Shadow, packages: Iterable[str]) -> dict[str, frozenset[bytes]]:
    """The paths of each package, as `files_of` spells them; none of one that is not installed."""
    names = tuple(packages)
    argv = ["sh", "-c", _EACH, "ouassister", *names]
    found: dict[str, set[bytes]] = {name: set() for name in names}
    name = ""
    for line in _run(shadow, argv, most=0).splitlines():
        if line.startswith(b">"):
            name = line[1:].decode("ascii", "replace")
        elif line.startswith(b"/") and name in found:
            found[name].add(line)
    return {one: frozenset(_merged(paths)) for one, paths in found.items()}


def status_of(shadow: Shadow) -> bytes:
    """The package database, as dpkg keeps it."""
    return _run(shadow, ["cat", "/var/lib/dpkg/status"], most=0)


def _merged(paths: set[bytes]) -> set[bytes]:
    """The same with what a merged /usr calls them."""
    return paths | {b"/usr" + path for path in paths if path.startswith(_MERGED)}


def parse_search(output: bytes) -> dict[bytes, tuple[str, ...]]:
    """Read ``--search``: names by path. Lines on diversions have other words before the path."""
    found: dict[bytes, tuple[str, ...]] = {}
    for line in output.splitlines():
        names, separator, path = line.partition(b": ")
        matches = [_NAME.fullmatch(name) for name in names.split(b", ")]
        if separator and all(matches):
            told = tuple(match[1].decode("ascii") for match in matches if match is not None)
            found[path] = tuple(dict.fromkeys((*found.get(path, ()), *told)))
    return found


def _query(shadow: Shadow, *words: str, most: int) -> bytes:
    return _run(shadow, ["dpkg-query", *words], most=most)


def _run(shadow: Shadow, argv: list[str], *, most: int) -> bytes:
    status = shadow.run(argv, package_cache=False, output=_OUTPUT, timeout_s=_TIMEOUT_S)
    path = shadow.output_path(_OUTPUT)
    with open_regular(path) as file:
        raw = file.read(_MAX_BYTES)
    if status > most:
        raise UpdaterError(f"the guest's {' '.join(argv[:2])} ended with {status}")
    return raw


def _spellings(path: bytes) -> tuple[bytes, ...]:
    """A path, and what a package calls it that was built before /usr was merged."""
    short = path.removeprefix(b"/usr")
    return (path, short) if short != path and short.startswith(_MERGED) else (path,)


def _escaped(path: bytes) -> str:
    return re.sub(rb"([*?\[\\])", rb"\\\1", path).decode("utf-8", "surrogateescape")
