"""Frozen record of what each package of an update is made of, so that one can be left out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stanza:
    """A package as the guest's dpkg has it, as text; empty for one that it does not know."""

    package: str
    text: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """What a package's script called and what is to be done in the guest."""

    package: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Portions:
    """What belongs to which package of a change set.

    Attributes:
        owners: For each entry, in its order, the packages that dpkg says it belongs to.
        writers: For each entry that has no owner, those that were at work when it was written.
        stanzas: Of each package that changes.
        calls: In their order.
    """

    owners: tuple[tuple[str, ...], ...]
    writers: tuple[tuple[str, ...], ...]
    stanzas: tuple[Stanza, ...]
    calls: tuple[Call, ...]
