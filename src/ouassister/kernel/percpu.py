"""Variables that each processor has a copy of.

Source: Linux v6.1 ``include/asm-generic/percpu.h`` (``__per_cpu_offset``), ``kernel/cpu.c``
(``__cpu_possible_mask``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.kernel.fields import read_word, variable
from ouassister.model import VirtAddr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.program import Kernel

_MAX_CPUS: Final = 8192


def each_cpu(kernel: Kernel, name: str) -> Iterator[int]:
    """Yield the address of each possible processor's copy of a variable.

    Raises:
        UnsupportedGuestError: This kernel has no such variable.
        CorruptGuestError: No processor is possible.
    """
    base = variable(kernel, name)
    offsets = variable(kernel, "__per_cpu_offset")
    mask = variable(kernel, "__cpu_possible_mask")
    size = kernel.type("struct cpumask").size or 0
    possible = int.from_bytes(kernel.virtual.read(VirtAddr(mask), min(size, _MAX_CPUS // 8)),
                              "little")  # fmt: skip
    if not possible:
        raise CorruptGuestError("the guest has no possible processor")
    for cpu in range(possible.bit_length()):
        if possible >> cpu & 1:
            yield (base + read_word(kernel, offsets + cpu * 8)) % (1 << 64)
