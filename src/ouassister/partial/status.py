"""Dpkg's database of packages as text: stanzas that are taken out and put in whole.

Source: dpkg's lib/dpkg/dump.c and parse.c: ``/var/lib/dpkg/status`` is stanzas in RFC 822 style
with an empty line after each; a line that begins with a blank goes on with its field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PATH: Final = b"/var/lib/dpkg/status"
OLD_PATH: Final = b"/var/lib/dpkg/status-old"
_FIELD: Final = re.compile(rb"([A-Za-z0-9][A-Za-z0-9-]*):[ \t]*(.*)")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.-]{0,254}")


class StatusError(ValueError):
    """It is not what dpkg writes, or not so simple that a package could be left out."""


@dataclass(frozen=True, slots=True)
class Package:
    """One stanza. Fields have small letters, and their lines joined."""

    name: str
    text: bytes
    fields: dict[str, str]

    @property
    def is_installed(self) -> bool:
        """Wholly; what waits for triggers is not."""
        return self.fields.get("status", "").split()[-1:] == ["installed"]

    @property
    def is_settled(self) -> bool:
        """Nothing of it is left to be done."""
        return self.fields.get("status", "").split()[-1:] in (
            ["installed"],
            ["config-files"],
            ["not-installed"],
        )


def parse(raw: bytes) -> tuple[Package, ...]:
    """Read all stanzas.

    Raises:
        StatusError: Something else is between them.
    """
    return tuple(_package(text) for text in raw.split(b"\n\n") if text.strip(b"\n"))


def one(packages: Iterable[Package], name: str) -> Package | None:
    """The package of that name; None for none.

    Raises:
        StatusError: It is there for more than one architecture.
    """
    found = [package for package in packages if package.name == name]
    if len(found) > 1:
        raise StatusError(f"{name} is there for more than one architecture")
    return found[0] if found else None


def without(packages: Iterable[Package], old: Mapping[str, bytes]) -> tuple[Package, ...]:
    """Put back what some packages were.

    Args:
        packages: Of the new database.
        old: For each package that is left out its stanza of the old one; empty when it had none.

    Raises:
        StatusError: One of them is there for more than one architecture.
    """
    before = tuple(packages)
    now = {name: one(before, name) for name in old}
    back = {name: _package(text) if text else None for name, text in old.items()}
    result = [back.get(package.name, package) for package in before]
    result += [package for name, package in back.items() if now[name] is None]
    return tuple(package for package in result if package is not None)


def dump(packages: Iterable[Package]) -> bytes:
    """Write it as dpkg does."""
    return b"".join(package.text + b"\n\n" for package in packages)


def _package(text: bytes) -> Package:
    text = text.strip(b"\n")
    lines: dict[str, list[str]] = {}
    last = ""
    for line in text.split(b"\n"):
        if line[:1] in (b" ", b"\t") and last:
            lines[last].append(line.strip().decode("utf-8", "replace"))
            continue
        match = _FIELD.fullmatch(line)
        if match is None:
            raise StatusError("a line of the package database is no field")
        last = match[1].decode("ascii").lower()
        if last in lines:
            raise StatusError(f"a package has two fields {last}")
        lines[last] = [match[2].decode("utf-8", "replace")]
    fields = {name: " ".join(parts) for name, parts in lines.items()}
    name = fields.get("package", "")
    if not _NAME.fullmatch(name):
        raise StatusError("a package of the database has no name")
    return Package(name, text, fields)
