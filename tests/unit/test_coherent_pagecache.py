"""Page cache trees that a hostile guest prepared: every walk ends, and says why."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from ouassister.errors import CorruptGuestError
from ouassister.kernel.pagecache import CachedPage, PageCache

if TYPE_CHECKING:
    from collections.abc import Callable


NODE = 0xFFFF_8880_0000_1000
VMEMMAP = 0xFFFF_EA00_0000_0000
PRIVATE, DIRTY = 1 << 13, 1 << 4
SIZE = 40 + 512 + 24


class Fake:
    """Kernel memory with tree nodes, pages and buffer heads, and a cache that reads them."""

    def __init__(self, budget: int = 1 << 20) -> None:
        self.memory: dict[int, bytes] = {}
        self.pages: dict[int, tuple[int, int]] = {}
        self.heads: dict[int, tuple[int, int, int, int]] = {}
        cache = object.__new__(PageCache)
        cache._read = lambda address, size: self.memory[address][:size]
        cache._budget = budget
        cache._nodes = 100
        cache._page_size, cache._vmemmap = 64, VMEMMAP
        cache._node = struct.Struct("<B39x64Q3Q")
        cache._private = PRIVATE
        cache._page = cast("Callable[..., object]", SimpleNamespace(
            read=lambda at: self.pages.get(at, (DIRTY, 0))))  # type: ignore[assignment]  # fmt: skip
        cache._buffer = SimpleNamespace(read=self.heads.__getitem__)  # type: ignore[assignment]
        self.cache = cache

    def node(self, address: int, shift: int, slots: dict[int, int], marks: int = 0) -> int:
        values = [slots.get(at, 0) for at in range(64)]
        self.memory[address] = struct.pack("<B39x64Q3Q", shift, *values, marks, 0, 0)
        return address + 2

    def walk(self, head: int, *, marked: bool = False) -> list[CachedPage]:
        return list(self.cache.pages(head, marked=marked))


def page(frame: int) -> int:
    return VMEMMAP + 64 * frame


def test_one_page_needs_no_tree() -> None:
    (found,) = Fake().walk(page(7))
    assert (found.position, found.size, found.physical) == (0, 4096, 7 << 12)
    assert Fake().walk(0) == []


def test_pages_come_with_their_place() -> None:
    fake = Fake()
    low = fake.node(NODE + 0x1000, 0, {0: page(1), 63: page(2)})
    head = fake.node(NODE, 6, {2: low})
    assert [(one.position >> 12, one.physical >> 12) for one in fake.walk(head)] == [
        (128, 1),
        (191, 2),
    ]


def test_only_marked_pages_are_visited() -> None:
    fake = Fake()
    low = fake.node(NODE + 0x1000, 0, {0: page(1), 5: page(2)}, marks=1 << 5)
    head = fake.node(NODE, 6, {0: low, 1: 0xDEAD_0002}, marks=1)
    assert [one.physical >> 12 for one in fake.walk(head, marked=True)] == [2]


def test_folio_of_several_pages_is_one() -> None:
    fake = Fake()
    sibling = 4 << 2 | 2
    head = fake.node(NODE, 0, {4: page(16), 5: sibling, 6: sibling, 7: sibling, 8: page(3)})
    first, second = fake.walk(head)
    assert (first.position >> 12, first.size >> 12) == (4, 4)
    assert (second.position >> 12, second.size >> 12) == (8, 1)


def test_folio_that_fills_a_node_below_is_one() -> None:
    fake = Fake()
    (found,) = fake.walk(fake.node(NODE, 6, {1: page(64)}))
    assert (found.position >> 12, found.size >> 12) == (64, 64)


def test_shadow_entries_and_retries_are_skipped() -> None:
    fake = Fake()
    assert fake.walk(fake.node(NODE, 0, {0: 0x1235, 1: 256 << 2 | 2, 2: 257 << 2 | 2})) == []


@pytest.mark.parametrize("shift", [6, 5, 60, 66])
def test_node_that_contains_itself_is_refused(shift: int) -> None:
    fake = Fake()
    head = fake.node(NODE, shift, {0: NODE + 2})
    with pytest.raises(CorruptGuestError, match="shift"):
        fake.walk(head)


def test_tree_with_more_pages_than_memory_is_refused() -> None:
    fake = Fake(budget=100)
    low = fake.node(NODE + 0x1000, 0, dict.fromkeys(range(64), page(1)))
    head = fake.node(NODE, 6, dict.fromkeys(range(64), low))
    with pytest.raises(CorruptGuestError, match="more pages than there is memory"):
        fake.walk(head)


@pytest.mark.parametrize("entry", [VMEMMAP - 64, VMEMMAP + 4])
def test_entry_that_is_no_page_is_refused(entry: int) -> None:
    with pytest.raises(CorruptGuestError, match="no page"):
        Fake().walk(entry)


def test_page_behind_the_end_of_all_files_is_refused() -> None:
    fake = Fake()
    low = NODE
    for shift in range(0, 60, 6):
        entry = page(1) if shift == 0 else low + 2
        low = fake.node(NODE + shift * 0x1000, shift, {63: entry}) - 2
    with pytest.raises(CorruptGuestError, match="no page"):
        fake.walk(low + 2)


# --- buffers ---


def buffered(fake: Fake, heads: dict[int, tuple[int, int, int, int]]) -> CachedPage:
    fake.pages[page(1)] = (DIRTY | PRIVATE, min(heads))
    fake.heads.update(heads)
    return next(fake.cache.pages(page(1), marked=False))


def test_buffers_cover_their_page() -> None:
    fake = Fake()
    ring = {at: (at, 1 + at % 4, 70 + at, 1024) for at in range(1, 5)}
    found = list(fake.cache.buffers(buffered(fake, ring)))
    assert [(one.offset, one.state, one.block) for one in found] == [
        (0, 1, 71), (1024, 2, 72), (2048, 3, 73), (3072, 4, 74)]  # fmt: skip


@pytest.mark.parametrize(
    "heads",
    [
        {1: (0, 1, 0, 2048)},  # the ring is too short
        {1: (0, 2, 0, 2048), 2: (0, 2, 0, 2048)},  # does not come back
        {1: (0, 2, 0, 2048), 2: (0, 0, 0, 2048)},  # ends
        {1: (0, 1, 0, 0)},
        {1: (0, 1, 0, 3000)},
        {1: (0, 1, 0, 8192)},
    ],
)
def test_buffers_that_do_not_cover_their_page_are_refused(
    heads: dict[int, tuple[int, int, int, int]],
) -> None:
    fake = Fake()
    one = buffered(fake, heads)
    with pytest.raises(CorruptGuestError, match="buffer"):
        list(fake.cache.buffers(one))
