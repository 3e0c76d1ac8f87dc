"""Entries of an xarray, values included: what the page cache of a file holds, page by page.

Source: Linux v6.1 ``include/linux/xarray.h`` (``xa_is_node``, ``xa_is_value``, ``xa_is_sibling``),
``lib/xarray.c``.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.kernel.fields import offset
from ouassister.model import VirtAddr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.program import Kernel

_SLOTS: Final = 64  # XA_CHUNK_SIZE without CONFIG_BASE_SMALL
_CHUNK_BITS: Final = 6
_MAX_SHIFT: Final = 60
_INTERNAL: Final = 2
_NODES_ABOVE: Final = 4096


class XArrays:
    """The xarrays of one kernel.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        slots = offset(kernel, "struct xa_node", "slots")
        if offset(kernel, "struct xa_node", "shift") != 0:
            raise AttributeError("struct xa_node has no member shift at its start")
        self._node = struct.Struct(f"<B{slots - 1}x{_SLOTS}Q")
        # No node can be in two places, and none is smaller than this.
        self._budget = kernel.memory.size_bytes // self._node.size

    def entries(self, head: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index, number of indexes, entry) of what an ``xa_head`` leads to, in order.

        An odd entry is a value (``xa_to_value`` shifts it by one), any other a pointer.

        Raises:
            CorruptGuestError: The array contradicts itself.
        """
        if head & 3 == _INTERNAL and head > _NODES_ABOVE:
            yield from self._below(head - _INTERNAL, 0, _MAX_SHIFT + _CHUNK_BITS)
        elif head and head & 3 != _INTERNAL:
            yield 0, 1, head

    def _below(self, node: int, first: int, above: int) -> Iterator[tuple[int, int, int]]:
        self._budget -= 1
        if self._budget < 0:
            raise CorruptGuestError("an xarray has more nodes than there is memory")
        raw = self._kernel.virtual.read(VirtAddr(node), self._node.size)
        shift, *slots = self._node.unpack(raw)
        if shift >= above or shift % _CHUNK_BITS:
            raise CorruptGuestError(f"a node of an xarray at {node:#x} has shift {shift}")
        for index, entry in enumerate(slots):
            if not entry:
                continue
            place = first + (index << shift)
            if entry & 3 == _INTERNAL:
                if entry > _NODES_ABOVE:
                    yield from self._below(entry - _INTERNAL, place, shift)
                continue  # a sibling, or an entry to be tried again
            count = 1
            while index + count < _SLOTS and slots[index + count] == (index << 2 | _INTERNAL):
                count += 1
            yield place, count << shift, entry
