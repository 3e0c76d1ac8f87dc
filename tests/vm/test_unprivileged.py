"""A user without rights updates a guest of his own, as docs/how-to/unprivileged.md tells."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from tests.conftest import lacking
from tests.vm.user import User, give_guest, take_ids, temporary_user
from tests.vm.world import NOTHING, leftovers

from ouassister.errors import StateError
from ouassister.provider import qemu, vmtoml
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

_REMOVE = ("unshare", "--map-root-user", "--map-auto", "rm", "-r")  # as the page tells


@pytest.fixture
def user() -> Iterator[User]:
    with temporary_user() as one:
        yield one


def test_user_plans_updates_and_resumes_a_guest(user: User, prepared: Path) -> None:
    capabilities = user.run(["sh", "-c", "grep ^Cap /proc/self/status; id -G"]).stdout.split()
    assert capabilities[1::2][:3] == ["0" * 16] * 3, capabilities
    toml = give_guest(user, prepared)
    checks = user.ouassister("doctor").result
    missing = [f"{one['name']}: {one['detail']}" for one in checks if not one["ok"]]
    if missing:
        lacking(f"this host is not ready for users: {missing}")
    found = {one["name"]: one["detail"] for one in checks}
    assert found["subordinate ids"] == f"from {user.ids[0]}"

    plan = user.ouassister("plan", str(toml))
    assert plan.status == 0, plan
    seen = user.ouassister("run", str(toml), "--", "sh", "-c", "id -u; cat /etc/shadow | wc -l")
    assert seen.status == 0, seen
    assert seen.result["output"].split()[0] == "0"
    update = user.ouassister("update", str(toml), "--plan", plan.result["plan_id"])
    assert update.status == 0, update
    changed = {change["name"]: change["new"] for change in update.result["changes"]}
    assert changed == {"oua-daemon": "2.0", "oua-hello": "2.0", "oua-library": "1.0"}
    user.await_no_processes()
    assert leftovers(user.state) == NOTHING

    resumed = user.ouassister("resume", str(toml))
    try:
        assert resumed.status == 0, resumed
        assert resumed.result["result"] == "applied"
        with qemu.attach(vmtoml.load(toml)) as vm:
            assert vm.pid is not None
            owner = os.stat(f"/proc/{vm.pid}").st_uid  # noqa: PTH116
            assert owner == user.uid
            script = (
                "oua-hello; cat /etc/oua-hello.conf; dpkg --audit;"
                " dpkg-query -W -f '${Version} ${db:Status-Abbrev}\n' 'oua-*';"
                " stat -c '%u:%g %a %n' /usr/bin/oua-hello /usr/share/oua-hello /etc/shadow;"
                " find / -xdev \\( -nouser -o -nogroup \\) -print;"
                " find / -xdev -name '.ouassister-*' -print"
            )
            told = guest_run(vm, script, timeout_s=120).stdout.decode().splitlines()
            assert [line.strip() for line in told] == [
                *("two", "setting=admin", "2.0 ii", "2.0 ii", "1.0 ii"),
                "0:0 755 /usr/bin/oua-hello",
                "0:0 755 /usr/share/oua-hello",
                "0:42 640 /etc/shadow",
            ]
            os.kill(vm.pid, signal.SIGKILL)
    finally:
        _kill(toml)
    user.await_no_processes()
    cache = str(user.state / "vms")
    strange = [
        line for line in user.foreign() if not line.startswith(cache) or "/cache" not in line
    ]
    assert strange == []
    removed = user.run([*_REMOVE, str(user.state)])
    assert removed.returncode == 0, removed
    assert not user.state.exists()
    assert user.foreign() == []


def _kill(toml: Path) -> None:
    try:
        with qemu.attach(vmtoml.load(toml)) as vm:
            vm.kill()
    except StateError:  # it does not run
        return


def test_user_without_subordinate_ids_is_told_how_to_get_them(user: User, prepared: Path) -> None:
    toml = give_guest(user, prepared)
    take_ids(user)
    done = user.ouassister("update", str(toml))
    assert (done.status, done.code) == (2, "host-not-ready"), done
    assert user.name in done.value["error"]["message"]
    assert "usermod --add-subuids" in done.value["error"]["hint"]
    assert leftovers(user.state) == NOTHING
