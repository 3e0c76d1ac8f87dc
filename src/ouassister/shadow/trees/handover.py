"""What is handed over of /sys and /dev."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.shadow.served import snapshot

if TYPE_CHECKING:
    from pathlib import Path

SYS: Final = "sys"
DEV: Final = "dev"
_NOTES: Final = "trees.json"


@dataclass(frozen=True, slots=True)
class Trees:
    """What memory tells of /sys and /dev; None where it tells nothing.

    Attributes:
        system: The files of /sys, as `ouassister.shadow.served.snapshot.encode` makes it.
        devices: The files of /dev, likewise.
        notes: What is not there or not told, for the user.
    """

    system: bytes | None = None
    devices: bytes | None = None
    notes: tuple[str, ...] = ()


def write(folder: Path, trees: Trees) -> None:
    """Write a file for each, and one for the notes.

    Args:
        folder: Exists; private to the run.
        trees: What is known.
    """
    for name, raw in ((SYS, trees.system), (DEV, trees.devices)):
        if raw is not None:
            snapshot.write(folder / name, raw)
    (folder / _NOTES).write_text(json.dumps(trees.notes))


def read_notes(folder: Path) -> tuple[str, ...]:
    """Read the notes that `write` wrote."""
    return tuple(map(str, json.loads((folder / _NOTES).read_text(encoding="utf-8"))))
