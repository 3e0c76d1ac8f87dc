"""What a kernel can say: texts among its constants, where no type tells what a function prints.

Source: Linux ``include/asm-generic/vmlinux.lds.h`` (``RO_DATA``: ``__start_rodata``,
``__end_rodata``); a format is a string that ends with a NUL, alone or as the end of a longer one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.kernel.fields import variable
from ouassister.model import VirtAddr

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel

SYMBOLS: Final = ("__start_rodata", "__end_rodata")
_MAX_SIZE: Final = 64 << 20
_PIECE: Final = 1 << 20


def has_text(kernel: Kernel, text: bytes) -> bool:
    """Tell whether a text is among the kernel's constants.

    Raises:
        UnsupportedGuestError: The kernel does not tell where they lie.
        CorruptGuestError: They take more than a kernel has.
        PageAbsentError: Some of them were never saved.
    """
    start, end = (variable(kernel, name) for name in SYMBOLS)
    if not 0 < end - start <= _MAX_SIZE:
        raise CorruptGuestError(f"the kernel's constants take {end - start} bytes")
    wanted, before = text + b"\0", b""
    for at in range(start, end, _PIECE):
        piece = before + kernel.virtual.read(VirtAddr(at), min(_PIECE, end - at))
        if wanted in piece:
            return True
        before = piece[-len(wanted) :]
    return False
