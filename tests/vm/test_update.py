"""The main job: a sleeping guest is updated, and the guest itself says that it is."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from ouassister.provider import qemu
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from tests.vm.world import World

    from ouassister.provider.qemu import RunningVM

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def _out(vm: RunningVM, script: str) -> str:
    return guest_run(vm, script, timeout_s=120).stdout.decode().strip()


def test_upgrade_offline_is_true_in_the_resumed_guest(world: World) -> None:
    before = world.hashes()
    update = world.run("update")
    assert update.status == 0, update
    changed = {change["name"]: change["new"] for change in update.result["changes"]}
    assert changed == {"oua-daemon": "2.0", "oua-hello": "2.0", "oua-library": "1.0"}
    assert update.result["deletions"] >= 1
    due = {one["unit"]: one["verdict"] for one in update.result["restarts"]}
    assert due == {
        "oua-daemon.service": "restart",
        "oua-kept.service": "excluded",
        "oua-script.service": "restart",
    }
    assert update.result["notes"] == []
    assert world.hashes() == before

    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    assert resumed.result["result"] == "applied"
    with qemu.attach(world.config) as vm:
        assert _out(vm, "oua-hello") == "two"
        assert _out(vm, "readlink /usr/share/oua-hello/becomes-link") == "new"
        assert _out(vm, "cat /usr/share/oua-hello/becomes-link") == "added by 2.0"
        assert _out(vm, "ls /usr/share/oua-hello") == "becomes-link\nnew"
        # The administrator's file stays; the package's lies beside it.
        assert _out(vm, "cat /etc/oua-hello.conf") == "setting=admin"
        assert _out(vm, "cat /etc/oua-hello.conf.dpkg-dist") == "setting=two"
        assert _out(vm, "dpkg --audit") == ""
        assert _out(
            vm, "dpkg-query -W -f '${Package} ${Version} ${db:Status-Abbrev}\\n' 'oua-*'"
        ) == ("oua-daemon 2.0 ii \noua-hello 2.0 ii \noua-library 1.0 ii")
        # Only the file that the administrator had changed differs from its package.
        verified = _out(vm, "dpkg --verify oua-daemon oua-hello oua-library")
        assert verified == "??5?????? c /etc/oua-hello.conf"
        # Who ran replaced files runs the new ones, but for the one that a rule keeps.
        shown = "readlink /proc/$(systemctl show -P MainPID oua-{})/exe"
        sleeper = "/usr/lib/oua-daemon/sleeper"
        assert _out(vm, shown.format("daemon")) == sleeper
        assert _out(vm, shown.format("kept")).startswith("/var/lib/ouassister/old-")
        started = "systemctl show -P ActiveEnterTimestampMonotonic oua-{}"
        assert int(_out(vm, started.format("script"))) > int(_out(vm, started.format("kept")))
        assert _out(vm, "find / -xdev -name '.ouassister-*' -print") == ""
    again = world.run("resume")
    assert (again.status, again.code) == (10, "nothing-pending")


def test_what_only_memory_knows_is_updated_and_survives(world: World) -> None:
    """Nothing of this is on the disk when the guest is suspended, its package database included."""
    with qemu.restore(world.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        guest_run(
            vm,
            "sync; echo 0 >/proc/sys/vm/dirty_writeback_centisecs;"
            " echo setting=late >/etc/oua-hello.conf; rm /usr/share/oua-hello/gone;"
            " mkdir /srv/late; echo late >/srv/late/file; mv /usr/bin/oua-hello /usr/bin/oua-old;"
            " echo 'oua-nothing hold' | dpkg --set-selections; echo late >>/var/lib/dpkg/available",
            timeout_s=60,
        )
        world.config.save.unlink()
        vm.suspend()
    before = world.hashes()
    seen = world.run("run", "--", "sh", "-c", "cat /srv/late/file /etc/oua-hello.conf")
    assert seen.status == 0, seen
    assert seen.result["output"] == "late\nsetting=late\n"
    update = world.run("update")
    assert update.status == 0, update
    assert world.hashes() == before
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    with qemu.attach(world.config) as vm:
        assert _out(vm, "cat /srv/late/file /etc/oua-hello.conf") == "late\nsetting=late"
        assert _out(vm, "oua-hello") == "two"
        assert _out(vm, "ls /usr/bin/oua-old") == "/usr/bin/oua-old"
        assert _out(vm, "tail -n1 /var/lib/dpkg/available") == "late"
        assert _out(vm, "dpkg --audit; find / -xdev -name '.ouassister-*' -print") == ""


def test_scripts_see_the_guest_and_recorded_actions_happen_after_resume(world: World) -> None:
    update = world.run("update", "--install", "oua-service")
    assert update.status == 0, update
    actions = [action["argv"] for action in update.result["actions"]]
    assert actions == [
        ["systemctl", "daemon-reload"],
        ["systemctl", "start", "oua-service.service"],
    ]
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    assert resumed.result["failed_actions"] == []
    with qemu.attach(world.config) as vm:
        assert _out(vm, "systemctl is-active oua-service") == "active"
        assert _out(vm, "cat /var/lib/oua-service.log") == "started"
        assert _out(vm, "cat /usr/share/oua-service.release") == _out(vm, "uname -r")


def test_run_shows_the_sleeping_guest_and_keeps_nothing(world: World) -> None:
    script = "uname -a; hostname; dpkg -l; cat /etc/machine-id; echo kept >/etc/motd; echo $?"
    before = world.hashes()
    told = []
    for _ in range(2):
        done = world.run("run", "--", "sh", "-c", f"cat /etc/motd; {script}")
        assert done.status == 0, done
        told.append(done)
    assert world.hashes() == before
    status = world.run("run", "--", "sh", "-c", "exit 7")
    assert status.status == 7


def test_program_in_the_shadow_prints_what_the_live_guest_prints(world: World) -> None:
    script = "uname -a; uname -n; dpkg -l; cat /etc/os-release /etc/machine-id;"
    script += " ls -n --time-style=+%s /usr/bin; stat -f -c '%T %s %l' /proc /proc/"
    command = [word for word in world.command("run", "--", "sh", "-c", script) if word != "--json"]
    shadow = subprocess.run(
        command, env=world.environment, capture_output=True, text=True, check=True
    ).stdout
    with qemu.restore(world.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        live = guest_run(vm, f"export LC_ALL=C.UTF-8; {script}", timeout_s=120).stdout.decode()
    assert shadow == live


def test_plan_says_what_update_does_and_changes_nothing(world: World) -> None:
    plan = world.run("plan", "--install", "oua-extra")
    assert plan.status == 0, plan
    assert [change["name"] for change in plan.result["changes"]] == ["oua-extra"]
    assert [archive["package"] for archive in plan.result["archives"]] == ["oua-extra"]
    done = world.run("update", "--plan", plan.result["plan_id"])
    assert done.status == 0, done
    assert done.result["changes"] == plan.result["changes"]
    assert world.run("discard").status == 0
    assert world.run("resume").code == "nothing-pending"


def test_update_of_a_current_guest_has_nothing_to_do(world: World) -> None:
    assert world.run("update").status == 0
    assert world.run("resume").status == 0
    assert world.run("suspend").status == 0
    done = world.run("update")
    assert done.status == 10, done
    assert done.result["changeset_id"] == ""
