"""Real packages that are staged; ``make staging-test`` runs this, with guests of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from tests.fidelity.twins import sleeping
from tests.vm.world import World

from ouassister.provider import qemu, sockets, vmtoml
from ouassister.testing import clone, guest_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ouassister.provider.qemu import RunningVM

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif("OUASSISTER_STAGING" not in os.environ, reason="'make staging-test' does"),
]

_ASK = "mariadb -N -e 'SELECT word FROM oua.kept; SELECT VERSION()'"
_VERSION = "dpkg-query -W -f '${Version} ${db:Status-Status}' "


def _out(vm: RunningVM, script: str) -> str:
    return guest_run(vm, script, timeout_s=300).stdout.decode().strip()


@pytest.fixture
def asleep(tmp_path: Path) -> Iterator[Callable[[str, str], World]]:
    """Make a guest with an outdated package, prepare it by a script, and let it sleep."""
    worlds: list[World] = []

    def make(package: str, script: str) -> World:
        base = sleeping("bookworm", (package,), outdated=True)
        world = World(clone(base, tmp_path / "sleeper"), tmp_path / "home")
        worlds.append(world)
        with qemu.restore(world.config, links_up=False) as vm:
            vm.qga()
            vm.cont()
            guest_run(vm, f"{script}; sync", timeout_s=300)
            world.config.save.unlink()
            vm.suspend()
        return world

    yield make
    for world in worlds:
        try:
            with sockets.connect(vmtoml.load(world.toml).qmp) as sock:
                os.kill(sockets.peer_pid(sock), 9)
        except (FileNotFoundError, ConnectionRefusedError):
            continue


def _modes(update: dict[str, list[dict[str, str]]]) -> dict[str, tuple[str, str]]:
    return {one["name"]: (one["mode"], one["reason"]) for one in update["modes"]}


def _new(update: dict[str, Any], name: str) -> str:
    found: str = next(one["new"] for one in update["changes"] if one["name"] == name)
    return found


def test_script_that_does_not_end_is_staged_and_the_rest_is_emulated(world: World) -> None:
    """With a limit for each call that a busy machine keeps."""
    wish = ("--timeout", "45", "--install", "oua-slow", "--install", "oua-extra")
    update = world.run("update", *wish)
    assert update.status == 0, update
    modes = _modes(update.result)
    assert modes == {
        "oua-extra": ("emulated", ""),
        "oua-slow": ("staged", "it did not end in time while the guest slept"),
    }
    refused = world.run("update", "--no-staging", *wish)
    assert (refused.status, refused.code) == (32, "deadline"), refused
    assert "oua-slow: it did not end in time" in refused.value["error"]["message"]


def test_running_database_is_staged_with_what_asks_it_and_keeps_its_data(
    asleep: Callable[[str, str], World],
) -> None:
    """Scripts ask the server, which sleeps, and some go on without its answer."""
    world = asleep(
        "mariadb-server",
        'systemctl start mariadb && mariadb -e "CREATE DATABASE oua;'
        " CREATE TABLE oua.kept (word TEXT); INSERT INTO oua.kept VALUES ('kept')\"",
    )
    wish = [f"--install={name}" for name in ("mariadb-server", "rsyslog-mysql", "bc")]
    plan = world.run("plan", *wish)
    guessed = {one["name"]: one["reason"] for one in plan.result["predicted"]}
    assert "/var/lib/mysql/" in guessed["mariadb-server"]
    before = world.hashes()
    update = world.run("update", *wish)
    assert update.status == 0, update
    modes = _modes(update.result)
    print(modes, update.result["phases"])
    assert modes["bc"] == ("emulated", "")
    for name in ("mariadb-server", "rsyslog-mysql"):
        assert modes[name][0] == "staged"
        assert "connect /run/mysqld/mysqld.sock" in modes[name][1]
    assert world.hashes() == before
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    print(resumed.result["phases"], resumed.result["online_s"])
    with qemu.attach(world.config) as vm:
        new = _new(update.result, "mariadb-server")
        assert _out(vm, f"{_VERSION} mariadb-server") == f"{new} installed"
        assert _out(vm, "dpkg --audit; systemctl is-active mariadb") == "active"
        word, version = _out(vm, _ASK).splitlines()
        assert word == "kept"
        assert version.partition("-")[0] in new
        assert "SystemEvents" in _out(vm, "mariadb -N -e 'SHOW TABLES FROM Syslog'")
