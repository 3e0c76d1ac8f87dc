"""Versions, relations and the package database, held against this host's own dpkg."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from tests.conftest import need

from ouassister.partial import relations, status

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.host

DATABASE: Final = Path("/var/lib/dpkg/status")
_SIGNS: Final = {-1: "lt", 0: "eq", 1: "gt"}
_PIECES: Final = ("0", "1", "9", "10", "010", "a", "Z", "+", "~", ".", "-", "rc", "deb12u")


@pytest.fixture(scope="module")
def raw() -> bytes:
    need("dpkg")
    if not DATABASE.exists():
        pytest.skip("this host has no package database")
    return DATABASE.read_bytes()


def versions(seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(seed)  # noqa: S311 - no secret
    for _ in range(150):
        pair = []
        for _ in range(2):
            epoch = rng.choice(("", "", "", "0:", "1:"))
            pair.append(epoch + "1" + "".join(rng.choices(_PIECES, k=rng.randint(0, 5))) + "1")
        yield pair[0], pair[1]


def test_versions_are_ordered_as_dpkg_does() -> None:
    need("dpkg")
    for one, other in versions(7):
        order = relations.compare(one, other)
        done = subprocess.run(
            ["dpkg", "--compare-versions", one, _SIGNS[order], other],
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, (one, other, order, done.stderr)


def test_database_of_this_host_comes_back_and_holds(raw: bytes) -> None:
    packages = status.parse(raw)
    assert status.dump(packages) == raw
    check = subprocess.run(["dpkg", "--audit"], capture_output=True, check=True)
    if not check.stdout:
        assert relations.broken(packages) == frozenset()


def test_database_with_a_package_put_back_is_clean_to_dpkg(raw: bytes, tmp_path: Path) -> None:
    packages = status.parse(raw)
    name = next(one.name for one in packages if one.is_installed)
    old = next(one.text for one in packages if one.name == name)
    new = raw.replace(b"Version: ", b"Version: 9", 1)
    merged = status.dump(status.without(status.parse(new), {name: old}))
    for folder in ("info", "updates", "triggers"):
        (tmp_path / folder).mkdir()
    (tmp_path / "status").write_bytes(merged)
    dpkg = ["dpkg-query", f"--admindir={tmp_path}", "-W", "-f", "${Package} ${Version}\n"]
    done = subprocess.run(dpkg, capture_output=True, check=True)
    here = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version}\n"], capture_output=True, check=True
    )
    assert done.stdout == here.stdout
    assert done.stderr == b""
