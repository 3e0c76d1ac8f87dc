"""A package whose script does not end, in an update of a real guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.vm.world import NOTHING, leftovers

if TYPE_CHECKING:
    from tests.vm.world import World

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def test_script_that_does_not_end_is_named_and_nothing_is_left(world: World) -> None:
    before = world.hashes()
    words = ("--install", "oua-slow", "--install", "oua-extra", "--script-timeout", "3")
    done = world.run("update", *words)
    assert (done.status, done.code) == (32, "deadline"), done
    message = done.value["error"]["message"]
    assert message.startswith("the postinst of oua-slow did not end within 3 s and was killed: ")
    assert leftovers(world.home) == NOTHING
    assert world.hashes() == before
    log = next(world.home.glob("vms/*/last-run.log")).read_text()
    assert "subprocess was killed by signal (Killed)" in log
    # dpkg went on with what does not depend on it.
    assert "Setting up oua-extra" in log


def test_limit_that_is_no_time_is_refused(world: World) -> None:
    done = world.run("update", "--script-timeout", "0")
    assert done.status == 2
