"""From a save file to what its kernel knows: one `GuestView`.

Source: the modules it calls; each cites its own.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, TypeVar

from ouassister.errors import (
    CorruptGuestError,
    OUassisterError,
    StateError,
    UnsupportedError,
    UnsupportedGuestError,
    UnsupportedStateError,
)
from ouassister.kernel import e820, mounts, system, tasks, vmcoreinfo
from ouassister.kernel.program import Image, Kernel, guest_reads
from ouassister.kernel.reader import GuestReader
from ouassister.kernel.time import Clocks, read_clocks
from ouassister.kernel.uts import read_uts
from ouassister.model import GuestView

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.guest_model import Subject
    from ouassister.memory import SaveFile

T = TypeVar("T")
U = TypeVar("U")

_MAX_NOTES: Final = 16  # VMCOREINFO look-alikes to try
# A guest of 512 MiB or 4 GiB takes 33 thousand reads; one with many files in tmpfs more.
_MIN_READS: Final = 4 << 20
_BYTES_PER_READ: Final = 1024
_NO_CLOCK: Final = Clocks(0, 0, None)


class Guest:
    """A guest's kernel together with what could not be learnt.

    Attributes:
        kernel: The kernel.
        degraded: What this kernel does not tell, ``"what: why"`` each.
    """

    def __init__(self, kernel: Kernel, degraded: list[str]) -> None:
        self.kernel = kernel
        self.degraded = degraded

    def ask(self, what: str, question: Callable[[], T], otherwise: U) -> T | U:
        """Ask; when this kernel cannot tell, note it and go on with ``otherwise``."""
        try:
            return question()
        except UnsupportedGuestError as error:
            self.degraded.append(f"{what}: {error.message}")
            return otherwise


def open_guest(save: SaveFile) -> Guest:
    """Find the kernel in a save file and prove the layout of its memory.

    Raises:
        UnsupportedGuestError: There is no kernel that can be read.
        CorruptGuestError: There is one, and it contradicts itself.
        UnsupportedStateError: Memory whose layout cannot be proven.
    """
    problems: list[OUassisterError] = []
    candidates = save.candidates()
    notes = vmcoreinfo.Notes(candidates[0])
    for memory in candidates:
        for note in itertools.islice(notes.find(memory), _MAX_NOTES):
            try:
                image, degraded = _prove(save, Image(memory, note))
                return Guest(Kernel(image), degraded)
            except (StateError, UnsupportedError) as error:
                problems.append(error)
    if not problems:
        raise UnsupportedGuestError(
            "there is no Linux kernel in this memory that describes itself (no VMCOREINFO)",
            hint="a Linux guest with CONFIG_CRASH_CORE is needed; was the guest booted at all?",
        )
    # A wrong candidate only ever reads nonsense; what a right one says is worth more.
    raise min(problems, key=lambda error: isinstance(error, StateError))


def _prove(save: SaveFile, image: Image) -> tuple[Image, list[str]]:
    """Return the kernel's image under the layout that its own memory map tells."""
    try:
        ranges = e820.ram_ranges(image.virtual, image.symbols)
    except UnsupportedGuestError as error:
        # Without the map, only memory that is one piece in every usual machine is taken.
        if image.memory.hole != save.memory.hole:
            raise UnsupportedStateError(
                "length of pc.ram", 0, save.ram_bytes, "the guest does not tell its memory map"
            ) from error
        save.proven(image.memory)
        return image, [f"memory map: {error.message}"]
    hole = e820.hole_start(ranges, save.ram_bytes)
    if hole is None:
        raise UnsupportedStateError(
            "length of pc.ram", 0, save.ram_bytes, "the guest's memory map does not fit it"
        )
    if hole == image.memory.hole:
        save.proven(image.memory)
        return image, []
    proven = Image(save.layout(hole), image.note)
    if e820.hole_start(e820.ram_ranges(proven.virtual, proven.symbols), save.ram_bytes) != hole:
        raise CorruptGuestError("the guest has two memory maps")
    save.proven(proven.memory)
    return proven, []


def introspect(save: SaveFile, want: frozenset[Subject] = frozenset()) -> GuestView:
    """Read what the sleeping kernel knows.

    Args:
        save: The open save file.
        want: What the view shall contain beside the basics; each takes its time.

    Raises:
        UnsupportedGuestError: The kernel cannot be read at all.
        CorruptGuestError: The guest's memory contradicts itself.
        PageAbsentError: A page that is needed was never saved.
    """
    return look(open_guest(save), save, want)


def look(guest: Guest, save: SaveFile, want: frozenset[Subject] = frozenset()) -> GuestView:
    """`introspect` for a kernel that was found already."""
    bound = _MIN_READS + save.ram_bytes // _BYTES_PER_READ
    with guest.kernel.virtual.bounded(bound), guest_reads("looking at the guest's kernel"):
        return _look(guest, save, want)


def add(guest: Guest, save: SaveFile, view: GuestView, want: frozenset[Subject]) -> GuestView:
    """Let a view that `look` made contain more; raises as `introspect`."""
    bound = _MIN_READS + save.ram_bytes // _BYTES_PER_READ
    with guest.kernel.virtual.bounded(bound), guest_reads("looking at the guest's kernel"):
        return GuestReader(guest).fill(view, want)


def _look(guest: Guest, save: SaveFile, want: frozenset[Subject]) -> GuestView:
    kernel = guest.kernel
    processes = tasks.leaders(kernel)
    init = processes.get(1)
    if init is None:
        raise CorruptGuestError("the guest has no process 1")
    namespace = mounts.read_namespace(kernel, init)
    clocks = guest.ask("clock", lambda: read_clocks(kernel), _NO_CLOCK)
    view = GuestView(
        uts=read_uts(kernel),
        boot_id=guest.ask("boot id", lambda: system.boot_id(kernel), ""),
        suspended_at_s=clocks.realtime_s,
        uptime_s=clocks.boottime_ns // 1_000_000_000,
        cpus=guest.ask("processors", lambda: system.online_cpus(kernel), 0),
        memory_bytes=save.ram_bytes,
        tasks=tasks.read_tasks(kernel, processes),
        mounts=mounts.read_mounts(kernel, namespace),
        degraded=tuple(guest.degraded),
    )
    return GuestReader(guest).fill(view, want) if want else view
