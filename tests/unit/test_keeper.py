"""The folders that a shadow shares with the guest's root: nothing leads out of them."""

from __future__ import annotations

import os
import socket
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

from ouassister.disk.layout import Layout, Volume
from ouassister.errors import UpdaterError
from ouassister.model import Uts
from ouassister.shadow import keeper, session
from ouassister.shadow.session import Shadow, ShadowSpec

if TYPE_CHECKING:
    from pathlib import Path


def prepare(folder: Path) -> None:
    values: dict[str, Any] = dict.fromkeys(one.name for one in fields(keeper.Configuration))
    values |= {"base_uid": os.geteuid(), "base_gid": os.getegid()}
    values["layout"] = Layout((Volume("vda1", 254, 1, "ext4", ()),), ())
    values |= {"work": str(folder / "work"), "cache": str(folder / "cache")}
    keeper._prepare_folders(keeper.Configuration(**values))


def test_folders_are_made_and_made_again(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "cache/apt/archives/bcc.deb").touch()
    prepare(tmp_path)
    assert (tmp_path / "cache/apt/archives/bcc.deb").exists()
    assert (tmp_path / "cache/lists/partial").is_dir()
    assert (tmp_path / "work/log").is_dir()
    assert (tmp_path / "work/upper/0").is_dir()


@pytest.mark.parametrize("place", ["lists/partial", "apt/archives", "apt/archives/partial"])
def test_link_that_an_earlier_run_left_is_not_followed(tmp_path: Path, place: str) -> None:
    prepare(tmp_path)
    host = tmp_path / "host"
    host.mkdir()
    before = host.stat()
    left = tmp_path / "cache" / place
    left.rename(tmp_path / "moved")
    left.symlink_to(host)
    prepare(tmp_path)
    assert not left.is_symlink()
    assert left.is_dir()
    assert list(host.iterdir()) == []
    assert host.stat().st_ctime_ns == before.st_ctime_ns


def test_file_in_the_place_of_a_folder_goes(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "cache/lists/partial").rmdir()
    (tmp_path / "cache/lists/partial").touch()
    prepare(tmp_path)
    assert (tmp_path / "cache/lists/partial").is_dir()


def shadow(folder: Path) -> Shadow:
    """The host's side alone; nothing runs."""
    ours, theirs = socket.socketpair()
    theirs.close()
    spec = ShadowSpec(folder, folder, (), Layout((), ()), Uts("", "", "", "", "", ""), ())
    (spec.shared / "log").mkdir(parents=True)
    with ours:
        return Shadow(ours, spec, folder)


def test_log_of_a_program_is_read_as_text(tmp_path: Path) -> None:
    one = shadow(tmp_path)
    (one.spec.shared / "log" / "audit").write_bytes(b"\xff ok\n")
    assert one.read_log("audit") == "\\xff ok\n"


@pytest.mark.parametrize("kind", ["link", "pipe", "nothing", "too much"])
def test_log_that_no_shell_would_have_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    one = shadow(tmp_path)
    path = one.spec.shared / "log" / "audit"
    if kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "too much":
        monkeypatch.setattr(session, "_MAX_LOG", 1 << 20)
        path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(UpdaterError, match="a program in the shadow"):
        one.read_log("audit")
