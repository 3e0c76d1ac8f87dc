"""What packages do to a system comes out the same asleep and awake."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import pytest
from tests.cases import benign, service_calls
from tests.cases.conftest import alone
from tests.fidelity import compare, twins

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vm.repository import Repository

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]


def _update(sleeper: Path, folder: Path, repository: Repository, *cases: str) -> twins.Pair:
    wish = tuple(name for case in cases for name in benign.CASES[case].wish)
    shown = (service_calls.ANSWERS,) if "systemctl" in cases else ()
    pair = twins.update_both(sleeper, folder, twins.Wish(wish, repository.port, shown=shown))
    print("seconds", pair.seconds)
    return pair


def _differences(pair: twins.Pair) -> str:
    found, _used = compare.differences(pair.theirs, pair.ours, pair.since_s, compare.load())
    if not found:
        return ""
    texts = [
        line
        for name in pair.theirs.texts
        for line in difflib.unified_diff(
            pair.theirs.texts[name].splitlines(), pair.ours.texts[name].splitlines(), "twin", "ours"
        )
    ]
    told = "\n".join([*found, *texts, *pair.update["notes"]])
    print(told)
    return told


def test_all_that_packages_do_in_one_update_makes_twins(
    sleeper: Path, tmp_path: Path, repository: Repository
) -> None:
    pair = _update(sleeper, tmp_path, repository, *benign.CASES)
    wished = {name for case in benign.CASES.values() for name in case.wish}
    assert wished <= {one["name"] for one in pair.update["changes"]}
    # The comparison saw what the cases do.
    assert "./usr/bin/oua-diverted.distrib" in pair.theirs.nodes
    assert "./usr/share/oua-calls.answers" in pair.theirs.nodes
    assert any(line.startswith("oua-edit") for line in pair.theirs.tables["alternatives"])
    assert any(line.startswith("_oua:") for line in pair.theirs.tables["users"])
    assert "oua-confined (enforce)" in pair.theirs.tables["profiles"]
    assert any(path.endswith(".0/oua-confined") for path in pair.theirs.nodes)  # the cache
    assert _differences(pair) == ""
    assert pair.staged == {}


@pytest.mark.parametrize("name", benign.CASES)
def test_one_case_makes_twins(
    name: str, sleeper: Path, tmp_path: Path, repository: Repository
) -> None:
    alone()
    pair = _update(sleeper, tmp_path, repository, name)
    assert _differences(pair) == ""
    assert pair.staged == {}
