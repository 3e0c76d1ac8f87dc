"""One guest for all cases: what they need before was installed, and then it fell asleep."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.cases import benign, canaries, harmful
from tests.conftest import need
from tests.fidelity import twins
from tests.vm.repository import Repository, build
from tests.vm.world import use_mirror

from ouassister.testing import clone, guest_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def alone() -> None:
    """Skip what only ``make case-test`` runs."""
    if not os.environ.get("OUASSISTER_CASES"):
        pytest.skip("'make case-test' runs each case by itself")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[canaries.Canaries]:
    """What of this host must not be reached."""
    with canaries.standing(tmp_path_factory.mktemp("canaries")) as standing:
        yield standing


@pytest.fixture(scope="session")
def repository(
    tmp_path_factory: pytest.TempPathFactory, host: canaries.Canaries
) -> Iterator[Repository]:
    """What the cases offer, on loopback."""
    for tool in ("dpkg-deb", "apt-ftparchive", "gcc"):
        need(tool)
    folder = tmp_path_factory.mktemp("cases")
    for case in benign.CASES.values():
        for package in case.offered:
            build(package, folder)
    for package in harmful.packages(host, folder):
        build(package, folder)
    with Repository(folder) as served:
        served.publish()
        yield served


@pytest.fixture(scope="session")
def sleeper(
    suspended: Path, repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The ``vm.toml`` of a suspended guest in which every case can happen. Read only."""
    folder = tmp_path_factory.mktemp("sleeper")
    toml = clone(suspended, folder / "vm")
    use_mirror(toml, repository.port)
    source = f"deb [trusted=yes] http://127.0.0.1:{repository.port}/ ./\n"
    with twins.again(toml) as vm:
        guest_run(vm, "rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*")
        vm.qga().write_file("/etc/apt/sources.list", source.encode())
        debs = []
        for case in benign.CASES.values():
            for package in case.before:
                deb = build(package, folder)
                debs.append(f"/dev/shm/{deb.name}")  # noqa: S108 - of the guest
                vm.qga().write_file(debs[-1], deb.read_bytes())
        guest_run(vm, f"dpkg -i {' '.join(debs)}", timeout_s=240)
        for case in benign.CASES.values():
            guest_run(vm, case.admin)
        guest_run(vm, f"rm {' '.join(debs)}; {twins.QUIET}", timeout_s=120)
    return toml
