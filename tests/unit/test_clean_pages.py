"""Which clean pages of files are taken, to hold a view against."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from tests.unit.test_coherent_inodes import inode

from ouassister.kernel import clean_pages
from ouassister.kernel.pagecache import Buffer, CachedPage, Piece

if TYPE_CHECKING:
    from ouassister.kernel.cached_inodes import CachedFileSystem
    from ouassister.kernel.pagecache import PageCache
    from ouassister.kernel.program import Kernel

UPTODATE, DIRTY, LOCKED, UNWRITTEN = 1, 2, 4, 1
PAGE = 4096


class Cache:
    """Pages by the head of their file, and buffers by their page's."""

    dirty, locked, uptodate, buffer_unwritten = DIRTY, LOCKED, UPTODATE, UNWRITTEN

    def __init__(self, **files: list[CachedPage]) -> None:
        self.files = {int(head[1:]): pages for head, pages in files.items()}
        self.states: dict[int, int] = {}

    def pages(self, head: int, *, marked: bool) -> list[CachedPage]:
        assert not marked
        return self.files[head]

    def buffers(self, page: CachedPage) -> list[Buffer]:
        return [Buffer(0, PAGE, self.states[page.buffers], 0)]

    @property
    def real(self) -> PageCache:
        return cast("PageCache", self)


def page(index: int, flags: int = UPTODATE, buffers: int = 0) -> CachedPage:
    return CachedPage(index * PAGE, PAGE, (index + 100) * PAGE, flags, buffers)


def file(number: int, **what: Any) -> Any:  # noqa: ANN401
    return inode(number, **({"head": number, "pages": 1, "size": 1 << 20} | what))


def test_clean_page_is_taken_up_to_the_end_of_the_file() -> None:
    cache = Cache(_12=[page(0), page(1), page(2)])
    taken = clean_pages.sample(cache.real, [file(12, size=PAGE + 10)])
    assert taken == {12: [Piece(0, PAGE, 100 * PAGE), Piece(PAGE, 10, 101 * PAGE)]}


def test_page_that_is_not_settled_is_left() -> None:
    cache = Cache(_12=[page(0, 0), page(1, UPTODATE | DIRTY), page(2, UPTODATE | LOCKED),
                       page(3, buffers=1), page(4, buffers=2)])  # fmt: skip
    cache.states = {1: UNWRITTEN, 2: 0}
    taken = clean_pages.sample(cache.real, [file(12)])
    assert taken == {12: [Piece(4 * PAGE, PAGE, 104 * PAGE)]}


def test_only_files_that_can_be_opened_and_have_their_pages_are_looked_at() -> None:
    inodes = [file(12, links=0), file(13, mode=0o40755), file(14, pages=0), file(15, swap=True)]
    assert clean_pages.sample(Cache().real, inodes) == {}
    assert clean_pages.first(Cache().real, inodes) == {}


def test_files_changed_last_are_taken_within_bounds() -> None:
    heads = {f"_{number}": [page(at) for at in range(200)] for number in range(12, 52)}
    inodes = [file(number, mtime_ns=number % 7, ctime_ns=number) for number in range(12, 52)]
    taken = clean_pages.sample(Cache(**heads).real, inodes)
    assert [*taken] == [*range(51, 51 - 16, -1)]  # 4 MiB by 256 KiB
    assert {len(pieces) for pieces in taken.values()} == {64}


def test_first_page_is_taken_alone() -> None:
    cache = Cache(_12=[page(0), page(1)], _13=[page(1)], _14=[page(0, UPTODATE | DIRTY)], _15=[])
    inodes = [file(12, size=100), file(13), file(14), file(15), file(16, size=0)]
    cache.files[16] = [page(0)]
    assert clean_pages.first(cache.real, inodes) == {12: Piece(0, 100, 100 * PAGE)}


def test_feature_is_read_from_the_super_block_in_memory() -> None:
    words = {100 * PAGE + 1024 + 0x60: b"\x42\x82\0\0"}
    memory = SimpleNamespace(read=lambda at, size: words[at][:size])
    kernel = cast("Kernel", SimpleNamespace(memory=memory))
    one = cast("CachedFileSystem", SimpleNamespace(device_head=1))
    assert clean_pages.has_inline_data(kernel, Cache(_1=[page(0)]).real, one)
    words[100 * PAGE + 1024 + 0x60] = b"\x42\x02\0\0"
    assert not clean_pages.has_inline_data(kernel, Cache(_1=[page(0)]).real, one)
    assert not clean_pages.has_inline_data(kernel, Cache(_1=[page(1)]).real, one)
