"""A tmpfs that is made again in the sandbox is the one that it was made from."""

# ruff: noqa: S108 - /tmp is the guest's

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import lacking

pytestmark = pytest.mark.host

INSIDE = Path(__file__).with_name("tmpfs_inside.py")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if os.geteuid() != 0:
        lacking("only root can mount the tmpfs that is the oracle")
    folder = tmp_path_factory.mktemp("tmpfs")
    for above in (folder, *folder.parents):  # other ids come through
        if above == Path(tempfile.gettempdir()):
            break
        above.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(INSIDE), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _lost(path: str, before: dict[str, Any]) -> dict[str, Any]:
    """What a user namespace cannot have, and what the shadow lays over."""
    node = dict(before)
    node["xattrs"] = [one for one in node["xattrs"] if not one[0].startswith("trusted.")]
    if node["device"]:
        node["device"], node["mode"] = 0, "c" + node["mode"][1:]
    node["owner"] = [one if one < 65536 else 65534 for one in node["owner"]]
    return node


def test_everything_is_as_it_was(told: dict[str, Any]) -> None:
    source = {path: _lost(path, node) for path, node in told["source"].items()}
    assert len(source) > 780
    differing = {
        path: (node, told["rebuilt"].get(path))
        for path, node in source.items()
        if told["rebuilt"].get(path) != node
    }
    assert differing == {}
    assert source.keys() == told["rebuilt"].keys()
    for name in ("/fifo", "/socket", "/hole", "/char", "/block", "/magic", "/d/hard"):
        assert name in source


def test_what_is_lost_is_named(told: dict[str, Any]) -> None:
    assert told["notes"] == [
        "/run/..hidden: its owner is above 65535, and another in the view",
        "/run/a-first: attribute trusted.x is not in the view",
        "/run/block and 1 more: a device, which leads nowhere in the view",
        "/full/larger: left out of the view: No space left on device",
    ]
    assert told["written"] == [
        "/run/ouassister of the guest is hidden by one of ours",
        "/tmp is not wholly in the view: it is odd",
    ]


def test_file_for_which_there_is_no_room_is_left_out_whole(told: dict[str, Any]) -> None:
    assert [*told["full"]] == ["/", "/fits"]


def test_nodes_do_not_act(told: dict[str, Any]) -> None:
    assert told["connect"] == "ECONNREFUSED"
    assert told["fifo"] == "ENXIO"
    assert [told[name] for name in ("char", "block", "nothing")] == ["EACCES"] * 3  # nodev


def test_limits_are_the_guests(told: dict[str, Any]) -> None:
    assert told["limits"] == [8 << 20, 2000]
    assert told["places"] == [
        ["/run", True],
        ["/mnt", False],
        ["/tmp", False],
        ["/full", False],
        ["/tmp/in/it", False],
    ]


def test_tmpfs_that_cannot_be_read_has_its_mount_points(told: dict[str, Any]) -> None:
    assert [*told["damaged"]] == ["/", "/in", "/in/it"]
    assert told["damaged"]["/in"]["mode"] == "drwxr-xr-x"


def test_links_of_the_guest_are_not_followed_by_mounts(told: dict[str, Any]) -> None:
    for name in ("moved", "magic", "up"):
        assert told[f"target/{name}"] == "ELOOP"
        assert told[f"part/{name}"] == "ELOOP"
    assert told["cover"] == "ELOOP"


def test_part_is_mounted_as_the_guest_has_it(told: dict[str, Any]) -> None:
    assert told["written to"] == "EROFS"
    wanted = os.ST_RDONLY | os.ST_NOEXEC | os.ST_NOSUID | os.ST_NODEV
    assert told["flags"] & wanted == wanted


def test_filling_writes_over_nothing(told: dict[str, Any]) -> None:
    assert told["over another"] == "refused"


def test_a_usual_run_takes_little_time(told: dict[str, Any]) -> None:
    assert told["seconds"] < 0.5  # of a processor, for 790 files; some 0.04
