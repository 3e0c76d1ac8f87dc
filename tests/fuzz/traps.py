"""Targets that break each limit: the engine has to tell."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from tests.fuzz.engine import Target

from ouassister.errors import CorruptGuestError, InternalError

if TYPE_CHECKING:
    from random import Random


class Trap(Target):
    """A case is a number."""

    cpu_s = 0.5
    memory_mib = 64

    def make(self, random: Random) -> bytes:
        """See `Target`."""
        return b"%d" % random.getrandbits(32)

    def run(self, case: bytes) -> None:
        """Refuse, as a good reader may."""
        raise CorruptGuestError(case.decode())


class Raises(Trap):
    """Raises what is none of our errors."""

    def run(self, case: bytes) -> None:
        """See `Target`."""
        [][int(case)]


class Confesses(Trap):
    """Calls a guest's doing a defect of ours."""

    def run(self, case: bytes) -> None:
        """See `Target`."""
        raise InternalError(case.decode())


class Hangs(Trap):
    """Goes round in a circle."""

    def run(self, case: bytes) -> None:
        """See `Target`."""
        while case:
            pass


class Swells(Trap):
    """Takes as much as it is told to."""

    def run(self, case: bytes) -> None:
        """See `Target`."""
        bytearray(1 << 27)


class Crashes(Trap):
    """Reads where nothing is."""

    def run(self, case: bytes) -> None:
        """See `Target`."""
        ctypes.string_at(len(case))


TRAPS: Final[dict[str, type[Trap]]] = {
    "trap-none": Trap,
    "trap-raises": Raises,
    "trap-confesses": Confesses,
    "trap-hangs": Hangs,
    "trap-swells": Swells,
    "trap-crashes": Crashes,
}
