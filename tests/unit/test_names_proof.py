"""What the sleeping kernel has cached by name is held against what is mounted."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from ouassister.disk import names_proof
from ouassister.errors import CorruptGuestError
from ouassister.kernel.cached_names import CachedName

if TYPE_CHECKING:
    from pathlib import Path


def known(mounted: Path, path: str, **other: int) -> CachedName:
    found = os.lstat(mounted / path.lstrip("/"))
    one = CachedName(
        os.fsencode(path), found.st_ino, found.st_mode, found.st_uid, found.st_gid, found.st_nlink,
        found.st_size, found.st_mtime_ns, found.st_ctime_ns,
    )  # fmt: skip
    return one._replace(**other)  # type: ignore[arg-type]


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    folder = tmp_path / "mounted"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "file").write_text("hello\n")
    (folder / "link").symlink_to("a")
    return folder


def prove(mounted: Path, *names: CachedName, root: bytes = b"/") -> int:
    file = mounted.with_name("names")
    names_proof.write(file, names, root)
    return names_proof.prove({"mounted": str(mounted), "names": str(file)})["names"]


def test_what_is_as_memory_says(mounted: Path) -> None:
    names = [known(mounted, path) for path in ("/", "/a", "/a/file", "/link")]
    gone = [CachedName(b"/gone", 0), CachedName(b"/a/file/below", 0)]
    folder = known(mounted, "/a", size=99)  # a directory's is not told alike
    assert prove(mounted, *names, *gone, folder) == 7


@pytest.mark.parametrize(
    "what", ["number", "mode", "uid", "gid", "links", "size", "mtime_ns", "ctime_ns"]
)
def test_attribute_that_is_another_one(mounted: Path, what: str) -> None:
    right = known(mounted, "/a/file")
    wrong = right._replace(**{what: getattr(right, what) + 1})
    with pytest.raises(
        CorruptGuestError, match=r"do not agree: /a/file: \w+ \d+ in memory, \d+ on"
    ):
        prove(mounted, wrong)


def test_name_that_should_not_be_or_is_not(mounted: Path) -> None:
    here = known(mounted, "/a/file")
    with pytest.raises(CorruptGuestError, match="/link: absent in memory, inode"):
        prove(mounted, CachedName(b"/link", 0))
    for path in (b"/gone", b"/a/file/x"):
        with pytest.raises(CorruptGuestError, match="in memory, absent on the disk"):
            prove(mounted, here._replace(path=path))


def test_few_are_told(mounted: Path) -> None:
    here = known(mounted, "/a/file")
    with pytest.raises(CorruptGuestError) as caught:
        prove(mounted, *(here._replace(path=b"/%d" % number) for number in range(9)))
    assert caught.value.message.count("absent") == 3


def test_names_of_a_part_are_relative_to_it(mounted: Path) -> None:
    names = [
        known(mounted, "/a")._replace(path=b"/@data"),
        known(mounted, "/a/file")._replace(path=b"/@data/file"),
        CachedName(b"/@data2", 0),
        CachedName(b"/elsewhere/\xff", 0),
    ]
    assert prove(mounted / "a", *names, root=b"/@data") == 2


def test_odd_names_survive(mounted: Path) -> None:
    name = b'odd\n\xff"name'
    (mounted / os.fsdecode(name)).touch()
    file = mounted.with_name("names")
    names_proof.write(file, [known(mounted, "/" + os.fsdecode(name))], b"/")
    assert len(json.loads(file.read_text())) == 9
    assert names_proof.prove({"mounted": str(mounted), "names": str(file)}) == {"names": 1}
