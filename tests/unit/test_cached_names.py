"""Names that the kernel has cached, as a hostile guest would have them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError
from ouassister.kernel import cached_names
from ouassister.kernel.cached_inodes import CachedFileSystem, CachedInode
from ouassister.kernel.cached_names import CachedName, collect

if TYPE_CHECKING:
    from collections.abc import Callable

Children = dict[int, list[tuple[bytes, int]]]
DIRECTORY, FILE = 0o40755, 0o100644


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[CachedName]]:
    """Collect over made-up inodes, whose number is also their address."""

    def ask(modes: dict[int, int], children: Children, fstype: str = "xfs") -> list[CachedName]:
        guest = FakeGuest()
        guest.struct("super_block", ("s_root", "p"))
        guest.struct("dentry", ("d_inode", "p"))
        super_block = guest.put("super_block", s_root=guest.put("dentry", d_inode=100))
        values: dict[str, Any] = {name: 0 for name in CachedInode._fields}
        inodes = [
            CachedInode(**values)._replace(address=at, number=at, mode=mode, size=5)
            for at, mode in modes.items()
        ]
        cache = SimpleNamespace(
            inodes=lambda _one: inodes, children=lambda one: children.get(one.number, [])
        )
        monkeypatch.setattr(cached_names, "InodeCache", lambda _kernel: cache)
        one = CachedFileSystem(super_block, fstype, 254, 1, bytes(16), 4096, 0, "vda1")
        return collect(guest.kernel, one)

    return ask


def test_names_are_paths(names: Callable[..., list[CachedName]]) -> None:
    children: Children = {100: [(b"d", 101), (b"gone", 0), (b"going", 999)], 101: [(b"f", 102)]}
    found = names({100: DIRECTORY, 101: DIRECTORY, 102: FILE}, children)
    told = [(one.path, one.number, one.mode, one.size) for one in found]
    assert told == [
        (b"/", 100, DIRECTORY, 5),
        (b"/d", 101, DIRECTORY, 5),
        (b"/gone", 0, 0, 0),
        (b"/d/f", 102, FILE, 5),
    ]


def test_folder_that_stands_for_a_subvolume_is_left_out(
    names: Callable[..., list[CachedName]],
) -> None:
    modes, children = {100: DIRECTORY, 2: DIRECTORY}, {100: [(b"sub", 2)]}
    assert [one.path for one in names(modes, children, "btrfs")] == [b"/"]
    assert [one.path for one in names(modes, children)] == [b"/", b"/sub"]


def test_directory_in_two_places_is_refused(names: Callable[..., list[CachedName]]) -> None:
    with pytest.raises(CorruptGuestError, match="directory 101 is in two places"):
        names({100: DIRECTORY, 101: DIRECTORY}, {100: [(b"a", 101)], 101: [(b"b", 101)]})


def test_root_that_is_no_inode_is_refused(names: Callable[..., list[CachedName]]) -> None:
    with pytest.raises(CorruptGuestError, match="the root of vda1 is none of its inodes"):
        names({101: DIRECTORY}, {})


def test_very_many_names_and_long_paths_are_bounded(
    names: Callable[..., list[CachedName]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_names, "_MAX_NAMES", 3)
    modes = {number: DIRECTORY for number in range(100, 110)}
    children: Children = {number: [(b"x", number + 1)] for number in range(100, 109)}
    assert len(names(modes, children)) == 3
    monkeypatch.setattr(cached_names, "_MAX_PATH", 4)
    assert [one.path for one in names(modes, children)] == [b"/", b"/x", b"/x/x"]
