"""A package whose script does not end, in an update of a real guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.vm.world import NOTHING, leftovers

if TYPE_CHECKING:
    from tests.vm.world import World

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def test_script_that_does_not_end_is_killed_and_its_package_is_staged(world: World) -> None:
    before = world.hashes()
    words = ("--install", "oua-slow", "--install", "oua-extra", "--script-timeout", "3")
    why = "the postinst of oua-slow did not end within 3 s and was killed while the guest slept"
    refused = world.run("update", *words, "--no-staging")
    assert (refused.status, refused.code) == (31, "needs-staging"), refused
    assert refused.value["error"]["message"] == f"oua-slow: {why}"
    log = next(world.home.glob("vms/*/last-run.log")).read_text()
    assert "subprocess was killed by signal (Killed)" in log
    # dpkg went on with what does not depend on it.
    assert "Setting up oua-extra" in log
    # The archives were fetched before: they are known all the same.
    done = world.run("update", *words)
    assert done.status == 0, done
    modes = {one["name"]: (one["mode"], one["reason"]) for one in done.result["modes"]}
    assert modes == {"oua-slow": ("staged", why), "oua-extra": ("emulated", "")}
    assert leftovers(world.home) == NOTHING
    assert world.hashes() == before


def test_limit_that_is_no_time_is_refused(world: World) -> None:
    done = world.run("update", "--script-timeout", "0")
    assert done.status == 2


def test_programs_that_the_stand_in_starts_have_limits_too(world: World) -> None:
    """A package may bring a systemctl of its own, and the service manager's stand-in starts it."""
    script = (
        "mv /usr/bin/systemctl /usr/bin/real; ulimit -f;"
        " printf '#!/bin/sh\\nulimit -f >>/root/limits\\nexec /usr/bin/real \"$@\"\\n'"
        " >/usr/bin/systemctl; chmod 755 /usr/bin/systemctl;"
        " /usr/bin/real disable ssh.service >/dev/null 2>&1; cat /root/limits"
    )
    done = world.run("run", "--", "sh", "-c", script)
    assert done.status == 0, done
    own, *others = done.result["output"].split()
    assert own.isdigit()
    assert others
    assert set(others) == {own}


def test_download_that_no_disk_has_room_for_is_named(world: World) -> None:
    done = world.run("update", "--install", "oua-huge")
    assert (done.status, done.code) == (31, "work-disk-full"), done
    assert "no room for archives" in done.value["error"]["message"]
    assert leftovers(world.home) == NOTHING
