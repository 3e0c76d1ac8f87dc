"""One suspended guest for the whole run, cloned for each test that needs one."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need
from tests.vm import packages
from tests.vm.repository import Repository, build
from tests.vm.world import World, use_mirror, use_source

from ouassister.provider import qemu, sockets, vmtoml
from ouassister.testing import clone as make_clone
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def clones(suspended: Path, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Make twins of the suspended guest; what still runs of them at the end is killed."""
    made: list[Path] = []

    def one() -> Path:
        made.append(make_clone(suspended, tmp_path / f"clone{len(made)}"))
        return made[-1]

    yield one
    for path in made:
        kill(vmtoml.load(path))


@pytest.fixture
def clone(clones: Callable[[], Path]) -> Path:
    """The ``vm.toml`` of one fresh twin."""
    return clones()


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    """The tests' own package repository, on loopback."""
    for tool in ("dpkg-deb", "apt-ftparchive"):
        need(tool)
    folder = tmp_path_factory.mktemp("repository")
    for package in packages.AFTER:
        build(package, folder)
    with Repository(folder) as served:
        served.more = packages.HUGE
        served.publish()
        yield served


@pytest.fixture(scope="session")
def prepared(
    suspended: Path, repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A suspended guest that uses the tests' repository and has its old packages. Read only."""
    folder = tmp_path_factory.mktemp("prepared")
    toml = make_clone(suspended, folder / "vm")
    use_mirror(toml, repository.port)
    with qemu.restore(vmtoml.load(toml), links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            use_source(vm, repository.port)
            for package in packages.BEFORE:
                deb = build(package, folder)
                vm.qga().write_file(f"/root/{deb.name}", deb.read_bytes())
                guest_run(vm, f"dpkg -i /root/{deb.name}")
            guest_run(vm, "echo setting=admin >/etc/oua-hello.conf; sync")
            (folder / "vm" / "save.img").unlink()  # a link to the other guest's
            vm.suspend()
        except BaseException:
            vm.kill()
            raise
    return toml


@pytest.fixture
def world(prepared: Path, tmp_path: Path) -> Iterator[World]:
    """A fresh twin of the prepared guest, with its own home."""
    toml = make_clone(prepared, tmp_path / "sleeper")
    yield World(toml, tmp_path / "home")
    kill(vmtoml.load(toml))


def kill(config: vmtoml.VmConfig) -> None:
    try:
        with sockets.connect(config.qmp) as sock:
            os.kill(sockets.peer_pid(sock), signal.SIGKILL)
    except (FileNotFoundError, ConnectionRefusedError):
        return
