"""A disk of a VM, as its owner describes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk: a block node and the file below it.

    ``declared`` are the backing files and their formats, where the description names them too.
    """

    node: str
    path: Path
    format: str
    serial: str = ""
    guest: str = ""
    declared: tuple[tuple[Path, str], ...] | None = None
