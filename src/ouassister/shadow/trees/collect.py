"""Reads /sys and /dev from a guest's memory; one that its kernel does not tell is left out."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.kernel.program import guest_reads
from ouassister.shadow.devices import collect as devices
from ouassister.shadow.served import snapshot
from ouassister.shadow.sysfs.collect import collect as collect_sysfs
from ouassister.shadow.sysfs.collect import collect_first as collect_sysfs_first
from ouassister.shadow.trees.handover import Tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.kernel import GuestReader
    from ouassister.shadow.served.snapshot import Node

_MAX_NOTES: Final = 20
_PROBLEMS: Final = (UnsupportedGuestError, CorruptGuestError, PageAbsentError)


def collect_devices(reader: GuestReader) -> Tree:
    """Read /dev; a kernel that does not tell is named in the notes."""
    return _ask("/dev has only what every program needs", lambda: devices.collect(reader))


def collect_system_first(reader: GuestReader) -> Tree:
    """Read the part of /sys that each program's mounts and libraries ask for."""
    first = _ask("", lambda: (collect_sysfs_first(reader), []))
    return Tree(first.raw)  # why there is none is told with the rest


def collect_system(reader: GuestReader) -> Tree:
    """Read /sys, likewise."""
    names: dict[tuple[bool, int, int], bytes] = {}
    with contextlib.suppress(*_PROBLEMS):  # told by `collect_devices`
        names.update(devices.names_of(devices.collect(reader)[0]))
    return _ask("/sys is empty", lambda: collect_sysfs(reader, names))


def _ask(otherwise: str, question: Callable[[], tuple[list[Node], list[str]]]) -> Tree:
    try:
        with guest_reads("reading the guest's /sys and /dev"):
            nodes, left_out = question()
        raw = snapshot.encode(nodes)
    except _PROBLEMS as error:
        return Tree(None, (f"{otherwise}: {error.message}",))
    except ValueError as error:  # a guest's names
        return Tree(None, (f"{otherwise}: {error}",))
    return Tree(raw, tuple(_few(left_out)))


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - _MAX_NOTES
    return lines if more <= 0 else [*lines[:_MAX_NOTES], f"and {more} more of this kind"]
