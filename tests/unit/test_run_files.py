"""What scripts made in /run becomes actions; the shell of the guest does them."""

from __future__ import annotations

import stat
import time
from typing import TYPE_CHECKING, Any

import pytest

from ouassister.model import WRITE_FILE, TmpfsNode
from ouassister.restart import run_files
from ouassister.shadow import tmpfs_made
from ouassister.shadow.events import Event, Outcome

if TYPE_CHECKING:
    from pathlib import Path


def _node(path: str, mode: int, **more: str | int | None) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "uid": 0,
        "gid": 0,
        "size": 0,
        "mtime_ns": 5,
        "content": None,
        "target": None,
    }
    plain["ruled"] = False
    if stat.S_ISREG(mode):
        plain["content"] = ""
    return {"path": path, "mode": mode, **plain, **more}


def _before(path: bytes, mode: int, uid: int = 0, size: int = 0) -> TmpfsNode:
    return TmpfsNode(path, 7, mode, uid, 0, 1, size, 0, 0, 5, 5, 5, None, (), 0, 0)


def test_folders_files_and_links_are_made_again() -> None:
    nodes = [
        _node("/web", 0o040750, gid=33),
        _node("/web/words", 0o100640, content="YQo=", size=2),
        _node("/web/link", 0o120777, target="words"),
    ]
    actions, notes = run_files.actions_for(nodes, [_before(b"/", 0o040755)])
    assert [action.argv for action in actions] == [
        ("install", "-d", "-m", "0750", "-o", "0", "-g", "33", "/run/web"),
        (WRITE_FILE, "/run/web/words", "0640", "0", "0", "YQo="),
        ("ln", "-sfn", "words", "/run/web/link"),
    ]
    assert notes == ()
    assert actions[1].shown == "write_file /run/web/words"


def test_what_was_there_before_is_left_alone() -> None:
    before = [_before(b"/", 0o040755), _before(b"/web", 0o040755), _before(b"/word", 0o100644)]
    nodes = [_node("/web", 0o040755), _node("/word", 0o100644)]
    assert run_files.actions_for(nodes, before) == ((), ())
    changed = [_node("/web", 0o040700), _node("/word", 0o100644, size=1, content="YQ==")]
    assert len(run_files.actions_for(changed, before)[0]) == 2


def test_what_is_gone_goes_first_and_a_folder_after_what_is_in_it() -> None:
    before = [
        _before(b"/", 0o040755),
        _before(b"/old", 0o040755),
        _before(b"/old/file", 0o100644),
        _before(b"/old/link", 0o120777),
        _before(b"/old/socket", 0o140777),
        _before(b"/old.pid", 0o100644),
        _before(b"/open", 0o041777),
        _before(b"/open/file", 0o100644),
        _before(b"/odd name", 0o100644),
    ]
    gone = {b"/old", b"/old/file", b"/old/link", b"/old/socket", b"/old.pid", b"/open/file",
            b"/odd name", b"/never"}  # fmt: skip
    made = [_node("/new", 0o040755)]
    actions, notes = run_files.actions_for(made, before, gone=gone)
    assert [action.argv for action in actions] == [
        ("rm", "-f", "/run/old/link"),
        ("rm", "-f", "/run/old/file"),
        ("rmdir", "--ignore-fail-on-non-empty", "/run/old"),
        ("install", "-d", "-m", "0755", "-o", "0", "-g", "0", "/run/new"),
    ]
    assert notes == (
        "changed by scripts in memory, and not in the guest: /run/odd name, /run/open/file",
    )
    assert all(map(run_files.is_made, actions))


@pytest.mark.parametrize(
    "node",
    [
        _node("/web.pid", 0o100644),
        _node("/web.lock", 0o100644),
        _node("/socket", 0o140777),
        _node("/pipe", 0o010644),
    ],
)
def test_what_belongs_to_processes_is_not_carried(node: dict[str, Any]) -> None:
    assert run_files.actions_for([node], []) == ((), ())


@pytest.mark.parametrize(
    "node",
    [
        _node("/a b", 0o100644),
        _node("/x;reboot", 0o040755),
        _node("/x\\x0ay", 0o040755),
        _node("/link", 0o120777, target="-t"),
        _node("/link", 0o120777, target="a'b"),
        _node("/large", 0o100644, content=None, size=1 << 20),
        _node("/open/file", 0o100644),
        _node("/theirs/file", 0o100644),
        _node("/unknown/file", 0o100644),
    ],
)
def test_what_cannot_be_made_safely_is_told(node: dict[str, Any]) -> None:
    before = [_before(b"/open", 0o040777), _before(b"/theirs", 0o040755, uid=1000)]
    actions, notes = run_files.actions_for([node], before)
    assert actions == ()
    assert node["path"] in notes[0]


def test_what_a_rule_makes_is_left_to_it_where_rules_are_followed() -> None:
    nodes = [_node("/web", 0o040755, ruled=True), _node("/other", 0o040755)]
    call = Event(Outcome.DEFERRED, ("systemd-tmpfiles", "--create", "web.conf"))
    assert len(run_files.actions_for(nodes, [], [call])[0]) == 1
    assert len(run_files.actions_for(nodes, [])[0]) == 2


def test_there_are_bounds() -> None:
    many = [_node(f"/{number:04}", 0o040755) for number in range(500)]
    actions, notes = run_files.actions_for(many, [])
    assert len(actions) == 128
    assert notes[0].endswith("and others")
    large = [_node(f"/{number}", 0o100644, content="A" * 5000) for number in range(8)]
    assert len(run_files.actions_for(large, [])[0]) == 3


def test_what_is_younger_is_listed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    (tmp_path / "systemd").mkdir()
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules/a.conf").write_text("# d /run/old/new\nd /var/run/sub/ 0711 - -\nq\n")
    (tmp_path / "rules/b.txt").write_text("d /run/large\n")
    time.sleep(0.02)  # ctime has the kernel's tick
    since_ns = time.time_ns()
    time.sleep(0.02)  # ctime has the kernel's tick: what follows would look older than the mark
    (tmp_path / "old" / "new").write_bytes(b"\x00new\n")
    (tmp_path / "systemd" / "private").touch()
    (tmp_path / "sub").mkdir(mode=0o711)
    (tmp_path / "sub" / "li\nnk").symlink_to("x")
    (tmp_path / "large").write_bytes(bytes((8 << 10) + 1))
    rules = [{"root": str(tmp_path), "path": "/rules"}]
    argument = {"folder": str(tmp_path), "since_ns": since_ns, "apart": ["systemd"]}
    argument |= {"where": "/run", "rules": rules}
    found = {one["path"]: one for one in tmpfs_made.list_made(argument)}
    assert list(found) == ["/large", "/old", "/old/new", "/sub", "/sub/li\\x0ank"]
    assert found["/old/new"]["content"] == "AG5ldwo="
    assert found["/large"]["content"] is None
    assert found["/sub"]["mode"] == 0o040711
    assert [path for path, one in found.items() if one["ruled"]] == ["/sub"]
    assert found["/sub/li\\x0ank"]["target"] == "x"


def test_names_are_all_that_is_there_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x\ny").symlink_to("nowhere")
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "b").touch()
    argument = {"folder": str(tmp_path), "apart": ["apart"]}
    assert tmpfs_made.names(argument) == ["/a", "/a/x\\x0ay"]
    monkeypatch.setattr(tmpfs_made, "_MOST_NODES", 2)
    assert tmpfs_made.names(argument) == ["/a", "/a/x\\x0ay"]
    (tmp_path / "c").touch()
    assert tmpfs_made.names(argument) == []


def test_a_tree_without_end_is_bounded(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(40):
        deep /= "d"
        deep.mkdir()
    for number in range(1100):
        (tmp_path / f"f{number}").touch()
    argument = {"folder": str(tmp_path), "since_ns": 0, "apart": [], "where": "/run", "rules": []}
    found = tmpfs_made.list_made(argument)
    assert len(found) == 1024
    assert max(one["path"].count("/") for one in found) == 16
