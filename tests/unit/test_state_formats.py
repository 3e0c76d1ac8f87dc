"""The table of formats: each row is told by its first bytes, and the page says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from ouassister.errors import NotSuspendedError, TruncatedStateError, UnsupportedStateError
from ouassister.memory import open_save
from ouassister.state.formats import FORMATS, LIBVIRT, SaveFormat, Support, libvirt_format
from ouassister.state.libvirt_save import FORMATS as LIBVIRT_FORMATS
from ouassister.text import to_text

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "support.md"
REFUSED = [row for row in FORMATS if row.support is Support.REFUSED]


def test_names_are_unique_and_say_something() -> None:
    assert len({row.name for row in FORMATS}) == len(FORMATS)
    for row in FORMATS:
        assert row.title
        assert row.note
        assert row.support is not Support.REFUSED or row.magics or row.name == "cloud-hypervisor"


def test_no_magic_hides_another() -> None:
    magics = [(magic, row.name) for row in FORMATS for magic in row.magics]
    for magic, name in magics:
        others = [other for start, other in magics if magic.startswith(start) and other != name]
        assert others == []


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_refused_format_is_called_by_its_name(row: SaveFormat, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    for magic in row.magics:
        path.write_bytes(magic + bytes(4096))
        with pytest.raises(UnsupportedStateError) as caught:
            open_save(path)
        assert row.title in str(caught.value)
        assert row.note in str(caught.value)
        assert (caught.value.field, caught.value.offset) == ("magic", 0)


@pytest.mark.parametrize("name", ["memory-ranges", "config.json", "state.json"])
def test_cloud_hypervisor_is_told_by_its_folder(name: str, tmp_path: Path) -> None:
    for one in ("memory-ranges", "config.json", "state.json"):
        (tmp_path / one).write_bytes(b'{"snapshots": {}}')
    with pytest.raises(UnsupportedStateError, match="Cloud Hypervisor"):
        open_save(tmp_path / name)
    with pytest.raises(UnsupportedStateError, match="Cloud Hypervisor"):
        open_save(tmp_path)


def test_unknown_file_is_refused_with_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "memory-ranges"  # without the other files of such a folder
    path.write_bytes(b"something else")
    with pytest.raises(UnsupportedStateError, match=r"something else.*of no format"):
        open_save(path)
    with pytest.raises(UnsupportedStateError, match="a folder"):
        open_save(tmp_path)
    with pytest.raises(NotSuspendedError):
        open_save(tmp_path / "nothing")


def test_first_bytes_of_a_format_alone_are_truncated(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    for row in FORMATS:
        if row.support is Support.REFUSED:
            continue
        for magic in row.magics:
            for size in range(1, len(magic) + 1):
                path.write_bytes(magic[:size])
                with pytest.raises(TruncatedStateError):
                    open_save(path)


def test_each_format_of_libvirt_has_its_row() -> None:
    assert [libvirt_format(name) for name in LIBVIRT_FORMATS] == list(LIBVIRT)


def test_page_says_what_the_table_says() -> None:
    lines = PAGE.read_text().splitlines()
    for row in FORMATS:
        assert f"| {row.title} | {row.support} | {row.note} |" in lines, to_text(row.title.encode())
