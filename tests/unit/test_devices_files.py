"""The shadow's /dev: the guest's nodes, and what programs make beside them."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from ouassister.shadow.devices import filesystem
from ouassister.shadow.devices.collect import NODES, names_of
from ouassister.shadow.devices.filesystem import DevFiles
from ouassister.shadow.served.snapshot import Node

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER, LINK = stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777
DISK = Node(0, b"vda", stat.S_IFBLK | 0o660, 0, 6, 1, 2, 0, os.makedev(254, 0), 10**9)
GUEST = [
    Node(0, b"", FOLDER, links=3, number=1),
    DISK,
    Node(0, b"disk", FOLDER, links=2, number=3),
    Node(2, b"root", LINK, number=4, size=6, content=b"../vda"),
    Node(0, b"null", stat.S_IFCHR | 0o666, number=5, device=os.makedev(1, 3)),
]


@pytest.fixture
def files() -> DevFiles:
    return DevFiles(GUEST, lambda: (1000, 100))


def refused(call: Callable[..., Any], *arguments: object) -> int | None:
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return None


def listed(files: DevFiles, path: str) -> set[str]:
    return {name for name, _, _ in files.readdir(path, 0)} - {".", ".."}


def test_nodes_have_type_number_mode_and_owner(files: DevFiles) -> None:
    one = files.getattr("/vda")
    assert (one["st_mode"], one["st_rdev"]) == (stat.S_IFBLK | 0o660, os.makedev(254, 0))
    assert (one["st_uid"], one["st_gid"], one["st_mtime"]) == (0, 6, 10**9)
    assert files.readlink("/disk/root") == "../vda"
    assert listed(files, "/") == {"vda", "disk", "null"}


def test_no_device_is_opened(files: DevFiles) -> None:
    """The kernel does not ask at all; if it did, this is the answer."""
    assert refused(files.open, "/vda", os.O_RDONLY) == errno.ENXIO
    assert refused(files.open, "/null", os.O_RDWR) == errno.ENXIO


def test_no_device_is_made(files: DevFiles) -> None:
    mode = stat.S_IFBLK | 0o600
    assert refused(files.mknod, "/sda", mode, os.makedev(8, 0)) == errno.EPERM
    assert files.mknod("/pipe", stat.S_IFIFO | 0o600, 0) == 0
    assert stat.S_ISFIFO(files.getattr("/pipe")["st_mode"])


def test_files_are_made_written_and_removed(files: DevFiles) -> None:
    files.create("/new", 0o640)
    assert files.write("/new", b"hello", 3, 0) == 5
    assert files.read("/new", 100, 0, 0) == b"\0\0\0hello"
    one = files.getattr("/new")
    assert (one["st_uid"], one["st_gid"], one["st_size"]) == (1000, 100, 8)
    assert one["st_mode"] == stat.S_IFREG | 0o640
    files.truncate("/new", 4)
    files.link("/disk/other", "/new")
    assert files.getattr("/new")["st_nlink"] == 2
    files.unlink("/new")
    assert files.read("/disk/other", 100, 0, 0) == b"\0\0\0h"
    assert refused(files.getattr, "/new") == errno.ENOENT
    assert refused(files.create, "/disk/other", 0o600) == errno.EEXIST


def test_folders_and_links(files: DevFiles) -> None:
    files.mkdir("/a", 0o711)
    files.symlink("/a/b", "../vda")
    assert (files.getattr("/a")["st_nlink"], files.getattr("/")["st_nlink"]) == (2, 4)
    assert refused(files.rmdir, "/a") == errno.ENOTEMPTY
    assert refused(files.unlink, "/a") == errno.EISDIR
    files.rename("/a/b", "/c")
    files.rmdir("/a")
    assert (files.readlink("/c"), files.getattr("/")["st_nlink"]) == ("../vda", 3)
    assert listed(files, "/") == {"vda", "disk", "null", "c"}


def test_rename_over_another(files: DevFiles) -> None:
    files.create("/a", 0o600)
    files.create("/b", 0o600)
    files.write("/a", b"a", 0, 0)
    files.rename("/a", "/b")
    assert files.read("/b", 10, 0, 0) == b"a"
    files.mkdir("/d", 0o700)
    assert refused(files.rename, "/b", "/d") == errno.EISDIR
    assert refused(files.rename, "/d", "/b") == errno.ENOTDIR
    assert refused(files.rename, "/d", "/disk") == errno.ENOTEMPTY
    files.rename("/b", "/b")
    files.mkdir("/e", 0o700)
    files.rename("/d", "/e")
    assert files.getattr("/")["st_nlink"] == 4


def test_mode_owner_and_time_of_a_node_can_be_set(files: DevFiles) -> None:
    files.chmod("/vda", 0o600)
    files.chown("/vda", -1, 44)
    files.utimens("/vda", (5, 7))
    one = files.getattr("/vda")
    assert (one["st_mode"], one["st_uid"], one["st_gid"]) == (stat.S_IFBLK | 0o600, 0, 44)
    assert one["st_mtime"] == 7
    files.utimens("/vda", (0, (1 << 30) - 2))
    assert files.getattr("/vda")["st_mtime"] == 7
    files.utimens("/vda", (0, (1 << 30) - 1))
    assert files.getattr("/vda")["st_mtime"] > 10**18


def test_attributes_are_those_of_users(files: DevFiles) -> None:
    files.setxattr("/vda", "user.a", b"1", 0)
    assert files.getxattr("/vda", "user.a") == b"1"
    assert list(files.listxattr("/vda")) == ["user.a"]
    files.removexattr("/vda", "user.a")
    assert refused(files.getxattr, "/vda", "user.a") == errno.ENODATA
    assert refused(files.removexattr, "/vda", "user.a") == errno.ENODATA
    assert refused(files.setxattr, "/vda", "trusted.a", b"1", 0) == errno.EOPNOTSUPP


def test_what_it_takes_has_a_bound(files: DevFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    files.create("/a", 0o600)
    assert refused(files.truncate, "/a", filesystem.MAX_BYTES + 1) == errno.ENOSPC
    files.truncate("/a", filesystem.MAX_BYTES)
    assert refused(files.write, "/a", b"x", filesystem.MAX_BYTES, 0) == errno.ENOSPC
    files.unlink("/a")
    files.create("/b", 0o600)
    files.truncate("/b", filesystem.MAX_BYTES)
    monkeypatch.setattr(filesystem, "MAX_FILES", 6)
    assert refused(files.create, "/c", 0o600) == errno.ENOSPC
    assert refused(files.mkdir, "/" + "x" * 256, 0o600) == errno.ENAMETOOLONG


def test_names_of_devices_are_the_ones_that_they_alone_have() -> None:
    twice = DISK._replace(parent=2, name=b"copy")
    assert names_of(GUEST) == {(True, 254, 0): b"vda", (False, 1, 3): b"null"}
    assert names_of([*GUEST, twice]) == {(False, 1, 3): b"null"}
    below = GUEST[4]._replace(parent=2, name=b"event0", device=os.makedev(13, 64))
    assert names_of([*GUEST, below])[(False, 13, 64)] == b"disk/event0"


def test_nodes_that_programs_need_are_the_kernels() -> None:
    assert {name.decode(): number for name, number in NODES.items()} == {
        "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9),
        "tty": (5, 0), "ptmx": (5, 2),
    }  # fmt: skip
