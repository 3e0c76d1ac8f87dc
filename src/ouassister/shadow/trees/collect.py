"""Reads /sys and /dev from a guest's memory; one that its kernel does not tell is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.kernel.program import guest_reads
from ouassister.shadow.devices import collect as devices
from ouassister.shadow.sysfs.collect import collect as collect_sysfs
from ouassister.shadow.trees.handover import Trees

if TYPE_CHECKING:
    from ouassister.kernel import GuestReader
    from ouassister.shadow.served.snapshot import Node

_MAX_NOTES: Final = 20
_PROBLEMS: Final = (UnsupportedGuestError, CorruptGuestError, PageAbsentError)


def collect(reader: GuestReader) -> Trees:
    """Read both trees; one that this kernel does not tell is named in the notes."""
    notes: list[str] = []
    nodes: list[Node] | None = None
    tree: list[Node] | None = None
    try:
        with guest_reads("reading the guest's /dev"):
            nodes, left_out = devices.collect(reader)
        notes += _few(left_out)
    except _PROBLEMS as error:
        notes.append(f"/dev has only what every program needs: {error.message}")
    try:
        with guest_reads("reading the guest's /sys"):
            tree, left_out = collect_sysfs(reader, devices.names_of(nodes or ()))
        notes += _few(left_out)
    except _PROBLEMS as error:
        notes.append(f"/sys is empty: {error.message}")
    return Trees(tree, nodes, tuple(notes))


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - _MAX_NOTES
    return lines if more <= 0 else [*lines[:_MAX_NOTES], f"and {more} more of this kind"]
