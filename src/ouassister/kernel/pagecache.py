"""Pages that the page cache holds for a file or a block device, and their buffers.

Source: Linux v6.1 ``include/linux/xarray.h``, ``lib/xarray.c`` (``xas_load``),
``include/linux/pagemap.h`` (marks), ``include/linux/page-flags.h``,
``include/linux/buffer_head.h``, ``include/linux/jbd2.h`` (``enum jbd_state_bits``). Folios since
7b230db3b8d3 ("mm: Introduce struct folio", v5.16), pages before; ``flags`` is a structure since
53fbef56e07d ("mm: introduce memdesc_flags_t", v6.18).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from drgn import sizeof

from ouassister.errors import CorruptGuestError
from ouassister.kernel.fields import Fields, labels, offset, read_word, variable
from ouassister.kernel.program import guest_reads
from ouassister.model import VirtAddr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.program import Kernel

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
_INTERNAL: Final = 2  # the two low bits of an entry; 0: pointer, 1 and 3: value
_NODES_ABOVE: Final = 4096  # internal entries below are siblings and the like
_SMALLEST_NODE: Final = 512  # 64 pointers
_MAX_INDEX: Final = 1 << 51  # MAX_LFS_FILESIZE
_MAX_FOLIO_PAGES: Final = 1 << 11  # MAX_PAGECACHE_ORDER is 11 with 2 MiB huge pages (v6.12)


class Piece(NamedTuple):
    """Bytes in memory that belong at an offset of a file or of a device."""

    offset: int
    size: int
    physical: int


class CachedPage(NamedTuple):
    """A page, or a folio of several: where in the file it belongs and where its bytes are.

    Attributes:
        position: Offset in the file or device, in bytes.
        size: In bytes.
        physical: Guest-physical address.
        flags: ``enum pageflags``, as bits.
        buffers: Address of the first buffer head; 0 when there is none.
    """

    position: int
    size: int
    physical: int
    flags: int
    buffers: int


class Buffer(NamedTuple):
    """One block within a page; ``state`` holds ``enum bh_state_bits``, as bits."""

    offset: int  # in its page
    size: int
    state: int
    block: int  # on the device, once it is mapped


class PageCache:
    """Reads one kernel's page cache.

    Args:
        kernel: The kernel.

    Attributes:
        dirty: Bits of ``CachedPage.flags`` that say: not yet on the disk.
        uptodate: Bit that says: all of the page was read or written.
        locked: Bit that says: somebody is at work on the page.
        buffer_uptodate: Bit of ``Buffer.state``.
        buffer_unwritten: Bits of ``Buffer.state`` that say: not yet on the disk, or on its way.
        buffer_journalled: Bit that says: a journal has an eye on it.

    Raises:
        UnsupportedGuestError: This kernel's page cache is laid out otherwise.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._read = kernel.virtual.read
        # No page is in two files: whoever walks more pages than there are walks in circles.
        self._budget = kernel.memory.size_bytes >> PAGE_SHIFT
        self._nodes = kernel.memory.size_bytes // _SMALLEST_NODE  # and no node in two trees
        with guest_reads("reading the layout of the page cache"):
            self._page_size = sizeof(kernel.type("struct page"))
            self._vmemmap = read_word(kernel, variable(kernel, "vmemmap_base"))
            self._page = _page_fields(kernel)
            self._buffer = Fields(kernel, "struct buffer_head", "b_state", "b_this_page",
                                  "b_blocknr", "b_size")  # fmt: skip
            self._layout_of_nodes()
            flag = labels(kernel.type("enum pageflags"))
            state = labels(kernel.type("enum bh_state_bits"))
        self.uptodate = 1 << flag["PG_uptodate"]
        self.locked = 1 << flag["PG_locked"]
        self.dirty = 1 << flag["PG_dirty"] | 1 << flag["PG_writeback"]
        self._private = 1 << flag["PG_private"]
        self.buffer_uptodate = 1 << state["BH_Uptodate"]
        # The journal's own bits follow the block layer's: BH_JBD is the first.
        self.buffer_journalled = 1 << state["BH_PrivateStart"]
        self.buffer_unwritten = (
            1 << state["BH_Dirty"] | 1 << state["BH_Lock"]
            | 1 << state["BH_Async_Write"] | self.buffer_journalled
        )  # fmt: skip

    def _layout_of_nodes(self) -> None:
        kernel = self._kernel
        node = kernel.type("struct xa_node")
        slots, marks = offset(kernel, node, "slots"), offset(kernel, node, "marks")
        # 64 slots (XA_CHUNK_SIZE without CONFIG_BASE_SMALL), and three marks for each.
        if (offset(kernel, node, "shift"), marks, node.size) != (0, slots + 512, slots + 536):
            raise AttributeError("struct xa_node has no member of 64 slots")
        self._node = struct.Struct(f"<B{slots - 1}x64Q3Q")

    def pages(self, head: int, *, marked: bool) -> Iterator[CachedPage]:
        """Yield the pages below an xarray's head, in the order of their place.

        Args:
            head: ``xa_head``.
            marked: Only pages with a mark: dirty, under write-back, or on the way there.

        Raises:
            CorruptGuestError: The tree contradicts itself.
        """
        if head & 3 == _INTERNAL and head > _NODES_ABOVE:
            yield from self._below(head - _INTERNAL, 0, 64, marked)
        elif head and not head & 3:
            yield self._describe(head, 0, 1)

    def _below(self, node: int, first: int, above: int, marked: bool) -> Iterator[CachedPage]:
        """Yield what is below a node that starts at page ``first``."""
        self._nodes -= 1
        if self._nodes < 0:
            raise CorruptGuestError("the page cache has more nodes than there is memory")
        shift, *rest = self._node.unpack(self._read(VirtAddr(node), self._node.size))
        if shift >= above or shift % 6:
            raise CorruptGuestError(f"a node of the page cache at {node:#x} has shift {shift}")
        slots, marks = rest[:64], rest[64] | rest[65] | rest[66]
        for index, entry in enumerate(slots):
            if not entry or entry & 1 or (marked and not marks >> index & 1):
                continue
            place = first + (index << shift)
            if entry & 3 == _INTERNAL:
                if entry > _NODES_ABOVE:
                    yield from self._below(entry - _INTERNAL, place, shift, marked)
                continue  # a sibling, or an entry to be tried again
            # A folio of several pages: entries behind the first refer to it (xa_mk_sibling).
            sibling = index << 2 | _INTERNAL
            behind = index + 1
            while behind < 64 and slots[behind] == sibling:
                behind += 1
            yield self._describe(entry, place, (behind - index) << shift)

    def _describe(self, page: int, index: int, count: int) -> CachedPage:
        self._budget -= count
        if self._budget < 0 or count > _MAX_FOLIO_PAGES:
            raise CorruptGuestError("the page cache holds more pages than there is memory")
        frame, rest = divmod(page - self._vmemmap, self._page_size)
        flags, private = self._page.read(page)
        if frame < 0 or rest or index >= _MAX_INDEX:
            raise CorruptGuestError(f"the page cache holds {page:#x}, which is no page")
        return CachedPage(
            index << PAGE_SHIFT, count << PAGE_SHIFT, frame << PAGE_SHIFT, flags,
            private if flags & self._private else 0,
        )  # fmt: skip

    def buffers(self, page: CachedPage) -> Iterator[Buffer]:
        """Yield the buffers of a page, in their order.

        Raises:
            CorruptGuestError: The buffers do not cover the page.
        """
        at, address = 0, page.buffers
        while address and at < page.size:
            state, following, block, size = self._buffer.read(address)
            if not 512 <= size <= page.size - at or size & (size - 1):
                raise CorruptGuestError(f"a buffer at {address:#x} has {size} bytes")
            yield Buffer(at, size, state, block)
            at += size
            address = following
            if address == page.buffers:
                break
        if page.buffers and (at != page.size or address != page.buffers):
            raise CorruptGuestError(
                f"the buffers of the page at {page.physical:#x} do not cover it"
            )


def _page_fields(kernel: Kernel) -> Fields:
    for kind in ("struct folio", "struct page"):
        for flags in ("flags.f", "flags"):
            try:
                return Fields(kernel, kind, flags, "private")
            except (AttributeError, LookupError):
                continue
    raise AttributeError("struct page has no member flags")
