"""Reads /sys and /dev from a guest's memory; one that its kernel does not tell is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.kernel.program import guest_reads
from ouassister.shadow.devices import collect as devices
from ouassister.shadow.served import snapshot
from ouassister.shadow.sysfs.collect import collect as collect_sysfs
from ouassister.shadow.trees.handover import Trees

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.kernel import GuestReader
    from ouassister.shadow.served.snapshot import Node

_MAX_NOTES: Final = 20
_PROBLEMS: Final = (UnsupportedGuestError, CorruptGuestError, PageAbsentError)


def collect(reader: GuestReader) -> Trees:
    """Read both trees; one that this kernel does not tell is named in the notes."""
    notes: list[str] = []
    names: dict[tuple[bool, int, int], bytes] = {}

    def read_devices() -> tuple[list[Node], list[str]]:
        nodes, left_out = devices.collect(reader)
        names.update(devices.names_of(nodes))
        return nodes, left_out

    dev = _ask("/dev has only what every program needs", read_devices, notes)
    system = _ask("/sys is empty", lambda: collect_sysfs(reader, names), notes)
    return Trees(system, dev, tuple(notes))


def _ask(
    otherwise: str, question: Callable[[], tuple[list[Node], list[str]]], notes: list[str]
) -> bytes | None:
    try:
        with guest_reads("reading the guest's /sys and /dev"):
            nodes, left_out = question()
        raw = snapshot.encode(nodes)
    except _PROBLEMS as error:
        notes.append(f"{otherwise}: {error.message}")
        return None
    except ValueError as error:  # a guest's names
        notes.append(f"{otherwise}: {error}")
        return None
    notes += _few(left_out)
    return raw


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - _MAX_NOTES
    return lines if more <= 0 else [*lines[:_MAX_NOTES], f"and {more} more of this kind"]
