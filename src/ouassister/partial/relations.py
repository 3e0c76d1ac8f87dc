"""Is a database of packages consistent: versions and relations, as Debian Policy has them.

Sources: deb-version(7) for the order of versions; Debian Policy 7 for relations: ``Depends`` and
``Pre-Depends`` want one of some alternatives, ``Breaks`` and ``Conflicts`` none, ``Provides`` may
stand in where no version is asked for, or with its own. Architectures are not told apart: what is
compared are databases of one guest, of which two are known to be good.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.partial.status import StatusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ouassister.partial.status import Package

_WANTS: Final = ("pre-depends", "depends")
_FORBIDS: Final = ("conflicts", "breaks")
_STEP: Final = 10  # of work, about as much as a character
_MOST_WORK: Final = 3_000_000  # the database of a server with 800 packages takes 170,000
_RELATION: Final = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9+.-]*)(?::[a-z0-9-]+)?"
    r"(?:\s*\(\s*(?P<sign><<|<=|=|>=|>>)\s*(?P<version>[^\s)]+)\s*\))?(?:\s*\[[^\]]*\])?"
)
_SIGNS: Final = {
    "<<": (-1,),
    "<=": (-1, 0),
    "=": (0,),
    ">=": (0, 1),
    ">>": (1,),
}


@dataclass(frozen=True, slots=True)
class Broken:
    """A relation of a package that does not hold."""

    package: str
    field: str
    words: str


def broken(packages: Iterable[Package]) -> frozenset[Broken]:
    """All relations of installed packages that do not hold.

    Raises:
        StatusError: There are more than any guest has.
    """
    work = _Work()
    installed = [package for package in packages if package.is_installed]
    there: dict[str, list[tuple[str, str, bool]]] = {}  # provider, version, by its own name
    for package in installed:
        version = package.fields.get("version", "")
        there.setdefault(package.name, []).append((package.name, version, True))
        for match in _alternatives(package.fields.get("provides", "").replace(",", "|")):
            provided = (package.name, match["version"] or "", False)
            there.setdefault(match["name"], []).append(provided)
    found = set()
    for package in installed:
        for field in _WANTS:
            for words in _clauses(package, field):
                if not any(_fits(match, there, work) for match in _alternatives(words)):
                    found.add(Broken(package.name, field, words))
        for field in _FORBIDS:
            for words in _clauses(package, field):
                if any(_fits(match, there, work, package.name) for match in _alternatives(words)):
                    found.add(Broken(package.name, field, words))
    return frozenset(found)


def names(words: str) -> frozenset[str]:
    """The packages that a relation speaks of."""
    return frozenset(match["name"] for match in _alternatives(words))


def _clauses(package: Package, field: str) -> Iterator[str]:
    words = package.fields.get(field, "")
    return (clause.strip() for clause in words.split(",") if clause.strip())


def _alternatives(words: str) -> Iterator[re.Match[str]]:
    for word in words.split("|"):
        match = _RELATION.fullmatch(word.strip())
        if match is not None:
            yield match


class _Work:
    """What may be looked at; a guest could have written a database that takes for ever."""

    def __init__(self) -> None:
        self._left = _MOST_WORK

    def add(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise StatusError("the package database has more relations than any")


def _fits(
    match: re.Match[str],
    there: dict[str, list[tuple[str, str, bool]]],
    work: _Work,
    but: str = "",
) -> bool:
    work.add(len(match[0]))
    for provider, version, real in there.get(match["name"], ()):
        work.add(_STEP + len(version))
        if provider == but:
            continue
        if match["sign"] is None:
            return True
        # A provided name without a version has none that could fit.
        if (real or version) and compare(version, match["version"]) in _SIGNS[match["sign"]]:
            return True
    return False


def compare(one: str, other: str) -> int:
    """Order two versions: -1, 0 or 1."""
    if one == other:
        return 0
    first, second = _parts(one), _parts(other)
    if first[0] != second[0]:
        return -1 if first[0] < second[0] else 1
    return _order(first[1], second[1]) or _order(first[2], second[2])


def _parts(version: str) -> tuple[int, str, str]:
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, dash, revision = rest.rpartition("-")
    if not dash:
        upstream, revision = rest, ""
    return int(epoch) if re.fullmatch("[0-9]{1,9}", epoch) else 0, upstream, revision


def _order(one: str, other: str) -> int:
    """Dpkg's verrevcmp (lib/dpkg/version.c): text and numbers in turn."""
    while one or other:
        texts = [re.match(r"[^0-9]*", part) for part in (one, other)]
        left, right = (match[0] if match else "" for match in texts)
        for at in range(max(len(left), len(right))):
            weights = [_weight(text[at : at + 1]) for text in (left, right)]
            if weights[0] != weights[1]:
                return -1 if weights[0] < weights[1] else 1
        one, other = one[len(left) :], other[len(right) :]
        numbers = [re.match(r"[0-9]*", part) for part in (one, other)]
        left, right = (match[0] if match else "" for match in numbers)
        one, other = one[len(left) :], other[len(right) :]
        sizes = [(len(digits), digits) for digits in (left.lstrip("0"), right.lstrip("0"))]
        if sizes[0] != sizes[1]:
            return -1 if sizes[0] < sizes[1] else 1
    return 0


def _weight(char: str) -> int:
    """A tilde before the end, the end before letters, letters before all else."""
    if char == "~":
        return -1
    if not char:
        return 0
    return ord(char) if char.isalpha() else ord(char) + 256
