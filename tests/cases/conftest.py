"""One guest for all cases: what they need before was installed, and then it fell asleep."""

from __future__ import annotations

import os
import subprocess
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

    from ouassister.provider.qemu import RunningVM


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
                debs.append(_given(vm, deb))
        fetched = {name for case in benign.CASES.values() for name in case.fetched}
        debs += [_given(vm, deb) for deb in _fetch(fetched, folder / "fetched")]
        guest_run(vm, f"dpkg -i {' '.join(debs)}", timeout_s=240)
        for case in benign.CASES.values():
            guest_run(vm, case.admin)
        guest_run(vm, f"rm {' '.join(debs)}; {twins.QUIET}", timeout_s=120)
    return toml


def _fetch(names: set[str], folder: Path) -> list[Path]:
    """Download packages of Debian, from where the host has its own."""
    folder.mkdir()
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *sorted(names)]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return sorted(folder.glob("*.deb"))


def _given(vm: RunningVM, deb: Path) -> str:
    """Put a package into the guest's memory; returns its name there."""
    place = f"/dev/shm/{deb.name}"  # noqa: S108 - of the guest
    vm.qga().write_file(place, deb.read_bytes())
    return place
