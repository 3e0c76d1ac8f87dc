"""Records what programs write below /proc/sys, as what the guest's sysctl(8) shall do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ouassister.shadow.events import Event, Outcome, encode
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VALUES: Final = "values"
"""The file of records, among the outputs of a shadow: no program of the guest reaches it."""
_MAX_BYTES: Final = 1 << 20


def recorder(path: Path) -> Callable[[str, bytes], None]:
    """Return what `Procfs.serve` calls; it appends to a file that no program of the guest reaches.

    A file that is full says so in its last line, once.
    """

    def wrote(name: str, value: bytes) -> None:
        words = ("sysctl", "-w", f"{name}={to_text(value)}")
        with path.open("ab") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _MAX_BYTES:
                file.write(encode(Event(Outcome.DEFERRED, words)))
                if file.tell() >= _MAX_BYTES:
                    file.write(
                        encode(Event(Outcome.LOST, (), detail="more values below /proc/sys"))
                    )

    return wrote
