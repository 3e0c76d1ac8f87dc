"""Lists of inodes and dentries that a hostile guest prepared; what counts as unflushed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ouassister.errors import CorruptGuestError
from ouassister.kernel import unflushed
from ouassister.kernel.cached_inodes import CachedFileSystem, CachedInode, InodeCache
from ouassister.kernel.pagecache import Buffer, CachedPage, PageCache, Piece

SB, LIST, SIBLING, ALIAS, CHILDREN = 0x1000, 0x10, 0x20, 0x30, 0x40
SYSTEM = CachedFileSystem(SB, "ext4", 254, 1, bytes(16), 4096, 0, "vda1")
UPTODATE, DIRTY, JOURNALLED, OTHER = 1, 2, 4, 8


def inode(number: int, **what: Any) -> CachedInode:  # noqa: ANN401
    values: dict[str, Any] = {name: 0 for name in CachedInode._fields}
    values |= {"number": number, "address": number << 16, "links": 1, "mode": 0o100644}
    return CachedInode(**(values | what))


class Fake:
    """An inode cache over made-up memory; ``following`` links the list of inodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words: dict[int, int] = {}
        self.following: dict[int, int] = {}
        self.states: dict[int, int] = {}
        self.seconds = 0
        self.dentries: dict[int, tuple[int, int, int, int, bytes, int]] = {}
        self.text: dict[int, bytes] = {}
        cache = object.__new__(InodeCache)
        virtual = SimpleNamespace(read=lambda at, size: self.text[at][:size])
        cache._kernel = SimpleNamespace(virtual=virtual)  # type: ignore[assignment]
        cache._inode_limit = cache._dentry_limit = 100
        cache._inodes = cache._in_list = LIST
        cache._going, cache._dirty_time = 0x70, 0x800
        cache._sibling, cache._alias, cache._children = SIBLING, ALIAS, CHILDREN
        cache._short = 0x38
        cache._inode = SimpleNamespace(read=self._inode)  # type: ignore[assignment]
        cache._dentry = SimpleNamespace(read=self.dentries.__getitem__)  # type: ignore[assignment]
        monkeypatch.setattr(
            "ouassister.kernel.cached_inodes.read_word", lambda _kernel, at: self.words[at]
        )
        self.cache = cache

    def chain(self, *addresses: int, last: int = SB + LIST) -> None:
        nodes = [address + LIST for address in addresses]
        self.words[SB + LIST] = nodes[0]
        self.following = dict(zip(addresses, [*nodes[1:], last], strict=True))

    def _inode(self, address: int) -> tuple[int, ...]:
        state = self.states.get(address, 0)
        times = (self.seconds, 5) * 2 + (self.seconds, 1 << 31 | 6)
        return (0o100644, 0, 0, address >> 16, 1, 0, 0, *times, state, self.following[address],
                0, 1 << 26, 0, 0, 0, 0, 0)  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def test_inodes_are_listed_but_those_that_go(fake: Fake) -> None:
    fake.chain(0x20000, 0x30000, 0x40000)
    fake.states = {0x30000: 0x20, 0x40000: 0x800}
    assert [(one.number, one.lazy) for one in fake.cache.inodes(SYSTEM)] == [(2, False), (4, True)]


def test_flag_in_a_change_time_is_no_time(fake: Fake) -> None:
    fake.seconds = 3
    fake.chain(0x20000)
    (one,) = fake.cache.inodes(SYSTEM)
    assert (one.atime_ns, one.mtime_ns, one.ctime_ns) == (3000000005, 3000000005, 3000000006)


def test_inodes_without_an_end_are_refused(fake: Fake) -> None:
    fake.chain(0x20000, 0x30000, last=0x20000 + LIST)
    with pytest.raises(CorruptGuestError, match="no end"):
        list(fake.cache.inodes(SYSTEM))
    fake.chain(*(at << 16 for at in range(2, 200)))
    with pytest.raises(CorruptGuestError, match="no end"):
        list(fake.cache.inodes(SYSTEM))


@pytest.mark.parametrize("seconds", [1 << 62, -(1 << 62), (1 << 33) + 1])
def test_time_of_no_calendar_is_refused(fake: Fake, seconds: int) -> None:
    fake.chain(0x20000)
    fake.seconds = seconds
    with pytest.raises(CorruptGuestError, match="calendar"):
        list(fake.cache.inodes(SYSTEM))


# --- dentries ---

DIRECTORY = inode(2, alias=0x5000 + ALIAS)


def put_names(fake: Fake, *entries: tuple[int, bytes, int], last: int = 0) -> None:
    """Hash, name and inode of each child."""
    places = [0x6000 + 0x100 * at for at in range(len(entries))]
    fake.words[0x5000 + CHILDREN] = places[0] + SIBLING
    following = [*(place + SIBLING for place in places[1:]), last]
    for place, (hashed, name, number), after in zip(places, entries, following, strict=True):
        fake.text[place + 1] = fake.text[place + 0x38] = name
        short = name.ljust(8, b"\0") if len(name) < 8 else bytes(8)
        at = place + (0x38 if len(name) < 8 else 1)
        fake.dentries[place] = (hashed, len(name), at, number, short, after)


def test_names_are_told_and_those_of_no_file(fake: Fake) -> None:
    put_names(fake, (1, b"a", 0x70000), (1, b"absent", 0), (0, b"deleted", 0x80000))
    assert list(fake.cache.children(DIRECTORY)) == [(b"a", 0x70000), (b"absent", 0)]
    assert list(fake.cache.children(inode(3))) == []


def test_names_without_an_end_are_refused(fake: Fake) -> None:
    put_names(fake, (1, b"a", 1), (1, b"b", 2), last=0x6000 + SIBLING)
    with pytest.raises(CorruptGuestError, match="no end"):
        list(fake.cache.children(DIRECTORY))
    put_names(fake, *((1, b"a", 1) for _ in range(200)))
    with pytest.raises(CorruptGuestError, match="no end"):
        list(fake.cache.children(DIRECTORY))


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"x" * 256])
def test_name_that_none_can_have_is_refused(fake: Fake, name: bytes) -> None:
    put_names(fake, (1, name, 1))
    with pytest.raises(CorruptGuestError, match="is named"):
        list(fake.cache.children(DIRECTORY))


# --- what is unflushed ---


class Cache:
    """A page cache that is what a test says."""

    uptodate, dirty, buffer_uptodate = UPTODATE, DIRTY, UPTODATE
    buffer_unwritten = DIRTY | JOURNALLED

    def __init__(self, states: tuple[int, ...]) -> None:
        self.states = states

    def buffers(self, page: CachedPage) -> list[Buffer]:
        size = page.size // len(self.states)
        return [Buffer(at * size, size, state, 0) for at, state in enumerate(self.states)]


@pytest.mark.parametrize(
    ("states", "parts"),
    [
        ((UPTODATE,), []),  # what the disk says
        ((UPTODATE | OTHER,), []),
        ((DIRTY,), []),  # never read or written as a whole
        ((UPTODATE | DIRTY,), [(0, 4096)]),
        ((UPTODATE | JOURNALLED,), [(0, 4096)]),
        ((UPTODATE | DIRTY, UPTODATE, UPTODATE | DIRTY, DIRTY), [(0, 1024), (2048, 1024)]),
        ((UPTODATE, UPTODATE | DIRTY, UPTODATE | JOURNALLED, 0), [(1024, 2048)]),
    ],
)
def test_buffers_tell_which_parts_of_a_page_are_unflushed(
    states: tuple[int, ...], parts: list[tuple[int, int]]
) -> None:
    page = CachedPage(8192, 4096, 0x70000, 0, buffers=1)
    found = unflushed._unwritten(cast_cache(states), page, whole=True)
    assert found == [Piece(8192 + at, size, 0x70000 + at) for at, size in parts]


def test_page_without_buffers_counts_as_a_whole_where_it_is_marked() -> None:
    page = CachedPage(8192, 4096, 0x70000, 0, buffers=0)
    assert unflushed._unwritten(cast_cache((0,)), page, whole=False) == []
    assert unflushed._unwritten(cast_cache((0,)), page, whole=True) == [Piece(8192, 4096, 0x70000)]


def cast_cache(states: tuple[int, ...]) -> PageCache:
    return Cache(states)  # type: ignore[return-value]


class Files:
    """A page cache of one page for each head, and the inodes of a file system."""

    uptodate, dirty, locked, buffer_uptodate = UPTODATE, DIRTY, 16, UPTODATE
    buffer_unwritten = DIRTY | JOURNALLED

    def __init__(self, *inodes: CachedInode, state: int = UPTODATE) -> None:
        self._inodes, self._state = inodes, state

    def pages(self, head: int, *, marked: bool) -> list[CachedPage]:
        assert not marked
        return [CachedPage(0, 4096, 0x70000, UPTODATE, buffers=1)] if head else []

    def buffers(self, page: CachedPage) -> list[Buffer]:
        return [Buffer(0, page.size, self._state, 0)]

    def inodes(self, _one: CachedFileSystem) -> tuple[CachedInode, ...]:
        return self._inodes

    def of(self, _one: CachedFileSystem) -> bool:
        return False

    def inode(self, _one: CachedInode) -> bool:
        return False


def collected(files: Files) -> unflushed.Unflushed:
    one: Any = files
    return unflushed._collect(one, SYSTEM, one, one, one)


def test_page_of_a_link_is_unflushed_while_the_journal_has_an_eye_on_it() -> None:
    """It carries no mark, as with data=journal."""
    link = inode(12, mode=0o120777, pages=1, head=1, size=100)
    found = collected(Files(link, state=UPTODATE | JOURNALLED))
    assert found.files == {12: [Piece(0, 4096, 0x70000)]}
    assert collected(Files(link)).files == {}
    file = inode(12, pages=1, head=1, size=100)
    assert collected(Files(file, state=UPTODATE | JOURNALLED)).files == {}


@pytest.mark.parametrize("size", [-1, 1 << 60])
def test_size_that_no_file_has_is_refused(size: int) -> None:
    with pytest.raises(CorruptGuestError, match=f"inode 12 of vda1 has size {size}"):
        collected(Files(inode(12, size=size)))
