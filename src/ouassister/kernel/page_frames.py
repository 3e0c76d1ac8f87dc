"""From a ``struct page`` of a file to its bytes.

Source: Linux v6.1 ``arch/x86/include/asm/pgtable_64.h`` (``vmemmap``), ``include/linux/mm_types.h``
(``struct page``, ``struct folio``). ``flags`` is a structure since 53fbef56e07d ("mm: introduce
memdesc_flags_t", v6.18). An entry of a page cache is the first page of a folio, whose index tells
which of its pages is meant; of a large one, kernels before 6b24ca4a1a8d ("mm: Use multi-index
entries in the page cache", v5.17) keep one entry for each page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.kernel.fields import Fields, constant, read_word, variable
from ouassister.model import PhysAddr

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel

PAGE_SIZE: Final = 4096
_MAX_FOLIO_PAGES: Final = 1 << 18  # 1 GiB


class PageFrames:
    """The pages of one kernel.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._vmemmap = read_word(kernel, variable(kernel, "vmemmap_base"))
        self._size: int = kernel.type("struct page").size or 0
        try:
            self._page = Fields(kernel, "struct page", "flags.f", "mapping", self._index(kernel))
        except AttributeError:
            self._page = Fields(kernel, "struct page", "flags", "mapping", self._index(kernel))
        self._uptodate = 1 << constant(kernel, "pageflags", "PG_uptodate")

    @staticmethod
    def _index(kernel: Kernel) -> str:
        """``index`` is ``__folio_index`` in pages since acc53a0b4c15 (v6.16)."""
        old = kernel.type("struct page").has_member("index")
        return "index" if old else "__folio_index"

    def read(self, page: int, mapping: int, index: int) -> bytes | None:
        """Return page ``index`` of a file, given the entry of its page cache.

        None when the page was allocated and never filled: such a page reads as zeros.

        Args:
            page: ``struct page *`` or ``struct folio *``.
            mapping: The ``struct address_space *`` it must belong to.
            index: Which page of the file.

        Raises:
            CorruptGuestError: The page does not belong there.
            PageAbsentError: It was never saved.
        """
        flags, owner, first = self._page.read(page)
        number, rest = divmod(page - self._vmemmap, self._size)
        within = index - first
        if owner != mapping or rest or number < 0 or not 0 <= within < _MAX_FOLIO_PAGES:
            raise CorruptGuestError(f"the page cache has a foreign page at {page:#x}")
        if not flags & self._uptodate:
            return None
        return self._kernel.memory.read(PhysAddr((number + within) * PAGE_SIZE), PAGE_SIZE)
