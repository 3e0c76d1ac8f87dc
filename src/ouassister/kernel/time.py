"""What the guest's clocks showed when it was suspended.

Source: Linux v6.1 ``include/linux/timekeeper_internal.h`` (``struct timekeeper``),
``kernel/time/timekeeping.c`` (``ktime_get_boottime_ts64``). ``tk_core`` is an element of an
array since 22c62b9a84b8 ("timekeeping: Introduce auxiliary timekeepers", v6.17).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drgn import ObjectNotFoundError

from ouassister.errors import CorruptGuestError
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from drgn import Object

    from ouassister.kernel.program import Kernel

_SECOND: Final = 1_000_000_000
_YEAR_2500: Final = 16_725_225_600


@dataclass(frozen=True, slots=True)
class Clocks:
    """The clocks at the last tick.

    Attributes:
        realtime_s: ``CLOCK_REALTIME``, whole seconds.
        boottime_ns: ``CLOCK_BOOTTIME``.
        realtime_offset_ns: ``CLOCK_REALTIME`` less ``CLOCK_MONOTONIC``; None when not known.
    """

    realtime_s: int
    boottime_ns: int
    realtime_offset_ns: int | None


def read_clocks(kernel: Kernel) -> Clocks:
    """Read the core timekeeper."""
    with guest_reads("reading the guest's clock"):
        timekeeper = _core(kernel).timekeeper
        seconds = timekeeper.xtime_sec.value_()
        mono = timekeeper.tkr_mono
        shift = mono.shift.value_()
        to_mono = timekeeper.wall_to_monotonic
        offset = to_mono.tv_sec.value_() * _SECOND + to_mono.tv_nsec.value_()
        boottime = (
            seconds * _SECOND
            + (mono.xtime_nsec.value_() >> min(shift, 63))
            + offset
            + timekeeper.offs_boot.value_()
        )
    if not 0 <= seconds < _YEAR_2500 or not 0 <= boottime < _YEAR_2500 * _SECOND:
        raise CorruptGuestError(f"the guest's clock shows {seconds} s, {boottime} ns after boot")
    return Clocks(seconds, boottime, -offset)


def _core(kernel: Kernel) -> Object:
    try:
        return kernel.prog["timekeeper_data"][0]  # TIMEKEEPER_CORE
    except ObjectNotFoundError:
        return kernel.prog["tk_core"]
