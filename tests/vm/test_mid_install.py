"""A guest that fell asleep while its own package manager was at work."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.vm.repository import Package, build
from tests.vm.world import NOTHING, World, leftovers

from ouassister.provider import qemu
from ouassister.testing import guest_run
from ouassister.testing.view import build_view, mounted_view

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

# dpkg runs as root and has unpacked the files; its postinst does not come to an end.
MIDDLE = Package(
    "oua-middle",
    "1.0",
    files={"/usr/share/oua-middle/file": "unpacked\n"},
    scripts={"postinst": "touch /run/oua-middle; sleep 600"},
)
_INSTALL = (
    "(setsid apt-get install -y /root/oua-middle.deb >/run/oua-apt.log 2>&1 </dev/null &);"
    " for i in $(seq 600); do [ -e /run/oua-middle ] && exit 0; sleep 0.1; done;"
    " cat /run/oua-apt.log >&2; exit 1"
)
_STATUS = ("-W", "-f", "${Package} ${Version} ${Status}\\n")


@pytest.fixture
def midway(clone: Path, tmp_path: Path) -> Iterator[World]:
    """A guest whose apt-get waits for a dpkg that waits for a postinst."""
    world = World(clone, tmp_path / "home")
    deb = build(MIDDLE, tmp_path)
    with qemu.restore(world.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        vm.qga().write_file("/root/oua-middle.deb", deb.read_bytes())
        guest_run(vm, _INSTALL, timeout_s=120)
        world.config.save.unlink()
        vm.suspend()
    yield world
    if qemu.is_running(world.config):
        qemu.attach(world.config).kill()


def test_install_in_progress_is_told_and_refused(midway: World) -> None:
    before = midway.hashes()
    view = midway.run("inspect").result
    pids = {task["exe"]: task["pid"] for task in view["tasks"] if task["exe"]}
    owners = {lock["path"]: lock["pid"] for lock in view["held_locks"]}
    assert owners["/var/lib/dpkg/lock-frontend"] == pids["/usr/bin/apt-get"]
    assert owners["/var/lib/dpkg/lock"] == pids["/usr/bin/dpkg"]
    working = {one["package"]: one["step"] for one in view["package_manager"] if one["step"]}
    assert working == {"oua-middle": "postinst"}
    script = next(t for t in view["tasks"] if "oua-middle.postinst" in " ".join(t["cmdline"]))
    assert script["parent"] == pids["/usr/bin/dpkg"]

    done = midway.run("update")
    assert (done.status, done.code) == (22, "locked"), done
    message = done.value["error"]["message"]
    assert str(pids["/usr/bin/apt-get"]) in message or str(pids["/usr/bin/dpkg"]) in message
    assert midway.hashes() == before
    assert leftovers(midway.home) == NOTHING


def test_view_of_an_install_in_progress_has_the_half_configured_package(
    midway: World, tmp_path: Path
) -> None:
    image = build_view(midway.toml, tmp_path / "view")
    with mounted_view(image) as tree:
        database = ["dpkg-query", f"--admindir={tree}/var/lib/dpkg", *_STATUS]
        found = subprocess.run(database, capture_output=True, check=True).stdout
        unpacked = (tree / "usr/share/oua-middle/file").read_text()
    assert unpacked == "unpacked\n"
    assert b"oua-middle 1.0 install ok half-configured" in found.splitlines()
    with qemu.restore(midway.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        told = guest_run(vm, ["dpkg-query", *_STATUS]).stdout
        held = json.loads(guest_run(vm, "lslocks -J -o PATH,PID").stdout)
    assert found == told
    assert any(lock["path"] == "/var/lib/dpkg/lock" for lock in held["locks"])
