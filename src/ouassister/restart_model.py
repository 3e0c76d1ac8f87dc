"""Frozen records of who runs what an update replaces, and what is done in the guest; data only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ouassister.guest_model import GuestPid


class Verdict(StrEnum):
    """What is done about a service that runs replaced files."""

    RESTART = "restart"  # in the guest, behind the closed gate
    LATER = "later"  # by itself, a little after the gate is open: it is what the resume talks to
    ADVISE = "advise"  # said, not done: sessions or other programs would go with it
    EXCLUDED = "excluded"  # by the guest's own needrestart configuration
    APART = "apart"  # in a container: its files are not the guest's


@dataclass(frozen=True, slots=True)
class Exposed:
    """A process that still runs files which the update replaced."""

    pid: GuestPid
    comm: bytes
    files: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Restart:
    """A unit of the service manager, or ``""`` for none, with processes that are exposed."""

    unit: str
    verdict: Verdict
    why: str
    processes: tuple[Exposed, ...]


WRITE_FILE: Final = "write_file"


@dataclass(frozen=True, slots=True)
class Action:
    """Recorded in the shadow, done in the guest after its files are in place.

    ``argv`` starts with the bare name of a program that we chose; every word was checked against
    its alphabet. `WRITE_FILE` is no program but a function of the shell that does them; its words
    are a path, an octal mode, a uid, a gid, and the content in base64.
    """

    argv: tuple[str, ...]

    @property
    def shown(self) -> str:
        """As a person shall see it."""
        return " ".join(self.argv[:2] if self.argv[0] == WRITE_FILE else self.argv)
