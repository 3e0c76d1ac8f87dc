"""What udev knew of file systems becomes a cache that the real blkid(8) answers from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ouassister.shadow import blkid

if TYPE_CHECKING:
    from pathlib import Path

KNOWN = "S:disk/by-uuid/13b7\nE:ID_FS_LABEL=root\nE:ID_FS_UUID=13b7-57\nE:ID_FS_TYPE=ext4\n"


def cache(root: Path, **data: str) -> str:
    for folder in ("run/udev/data", "run/ouassister", "dev/block"):
        (root / folder).mkdir(parents=True)
    (root / "dev/block/254:1").symlink_to("../vda1")
    (root / "dev/block/254:2").symlink_to("../../etc/passwd")
    for name, text in data.items():
        (root / "run/udev/data" / name.replace("_", ":")).write_text(text)
    blkid.write(os.fsencode(root))
    return (root / "run/ouassister/blkid.tab").read_text()


def test_file_system_that_udev_knows_is_in_the_cache(tmp_path: Path) -> None:
    told = cache(tmp_path, b254_1=KNOWN, b254_0="E:ID_PART_TABLE_TYPE=gpt\n", n2=KNOWN)
    tags = 'LABEL="root" UUID="13b7-57" TYPE="ext4"'
    assert told == f'<device DEVNO="0xfe01" TIME="1.0" {tags}>/dev/vda1</device>\n'


@pytest.mark.parametrize(
    "text", ["", "E:ID_FS_TYPE=<x>\n", 'E:ID_FS_TYPE="\n', "E:ID_FS_TYPE=\xff\n", "ID_FS_TYPE=a\n"]
)
def test_words_that_are_odd_are_left_out(tmp_path: Path, text: str) -> None:
    assert cache(tmp_path, b254_1=text) == ""


def test_devices_without_a_plain_node_are_left_out(tmp_path: Path) -> None:
    assert cache(tmp_path, b254_2=KNOWN, b254_3=KNOWN) == ""


def test_what_would_block_or_lead_away_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "run/udev/data").mkdir(parents=True)
    (tmp_path / "known").write_text(KNOWN)
    (tmp_path / "run/udev/data/b254:1").symlink_to(tmp_path / "known")
    os.mkfifo(tmp_path / "run/udev/data/b254:9")
    for folder in ("run/ouassister", "dev/block"):
        (tmp_path / folder).mkdir(parents=True)
    for number in (1, 9):
        (tmp_path / f"dev/block/254:{number}").symlink_to("../vda1")
    blkid.write(os.fsencode(tmp_path))
    assert (tmp_path / "run/ouassister/blkid.tab").read_text() == ""


def test_guest_without_udev_has_an_empty_cache(tmp_path: Path) -> None:
    (tmp_path / "run/ouassister").mkdir(parents=True)
    blkid.write(os.fsencode(tmp_path))
    assert (tmp_path / "run/ouassister/blkid.tab").read_text() == ""
