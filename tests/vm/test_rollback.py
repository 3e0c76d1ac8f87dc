"""The last update is taken back in the running guest, and the guest itself says that it is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.vm.world import with_capture

from ouassister import pipeline
from ouassister.demo.frames import count_frames
from ouassister.errors import GateClosedError
from ouassister.provider import qemu
from ouassister.provider.qemu import RunningVM
from ouassister.provider.qga import Qga
from ouassister.reflect import reflection
from ouassister.store.database import Store
from ouassister.testing import guest_run
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.vm.world import World

    from ouassister.model import Action

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

# Packages, their files with owners and times, and the database itself.
_PLACES = (
    "/etc/oua* /etc/systemd/system /usr/bin/oua* /usr/share/oua* /usr/lib/oua*"
    " /lib/systemd/system/oua* /var/lib/dpkg/info/oua* /var/lib/dpkg/status"
    " /var/lib/apt/extended_states"
)
_TELL = (
    "export LC_ALL=C; dpkg-query -W -f '${Package} ${Version} ${db:Status-Abbrev}\\n';"
    f" find {_PLACES} -type d -printf '%p %m %u:%g\\n' | sort;"
    f" find {_PLACES} ! -type d -exec stat -c '%N %F %a %u:%g %s %Y %h' {{}} + | sort;"
    f" find {_PLACES} -type f -exec sha256sum {{}} + | sort"
)
_KNOCK = (
    "perl -e 'use Socket; socket(S, AF_INET, SOCK_DGRAM, 0);"
    ' send(S, "knock", 0, pack_sockaddr_in(9, inet_aton("10.0.2.2")))\' || true'
)


def _out(vm: RunningVM, script: str) -> str:
    return guest_run(vm, script, timeout_s=120).stdout.decode().strip()


def _killing(step: str) -> Callable[..., Any]:
    execute = Qga.execute

    def with_fault(self: Qga, command: str, **arguments: Any) -> Any:  # noqa: ANN401
        if command == "guest-exec":
            arguments["env"] = [f"OUA_KILL_AT={step}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        return execute(self, command, **arguments)

    return with_fault


def test_update_is_taken_back_in_the_running_guest(
    world: World, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    faulty = request.config.rootpath / "build" / "guest" / "applier-faults"
    assert faulty.exists(), "'make guest-tests' builds it"
    capture = with_capture(world)
    before = world.run("run", "--", "sh", "-c", _TELL).result["output"].strip()
    assert "oua-hello 1.0 ii" in before
    assert world.run("update").status == 0
    asleep = world.run("rollback")
    assert (asleep.status, asleep.code) == (20, "rollback-refused")
    assert world.run("resume").status == 0
    with qemu.attach(world.config) as vm:
        assert _out(vm, "oua-hello") == "two"
        shown = "readlink /proc/$(systemctl show -P MainPID oua-{})/exe"
        started = "systemctl show -P ActiveEnterTimestampMonotonic oua-daemon"
        once = int(_out(vm, started))
        guest_run(vm, "cp -a /usr/share/oua-hello/new /root; echo more >>/usr/share/oua-hello/new")

    refused = world.run("rollback")
    assert (refused.status, refused.code) == (20, "rollback-refused"), refused
    assert refused.value["error"]["paths"] == [
        {"path": "/usr/share/oua-hello/new", "reason": "it was written"}
    ]
    assert "/usr/share/oua-hello/new" in refused.stderr
    with qemu.attach(world.config) as vm:
        assert _out(vm, "oua-hello") == "two"
        guest_run(vm, "cp -a /root/new /usr/share/oua-hello/new && rm /root/new")
        frames = count_frames(capture)
        guest_run(vm, _KNOCK)  # the links are up again
        assert count_frames(capture) > frames

    seen: list[tuple[bool, int]] = []
    set_links, act = RunningVM.set_links, reflection.act

    def watched(self: RunningVM, *, up: bool) -> None:
        if up:
            seen.append((up, count_frames(capture)))
        set_links(self, up=up)
        if not up:
            seen.append((up, count_frames(capture)))

    def knocking(vm: RunningVM, actions: tuple[Action, ...]) -> tuple[str, ...]:
        guest_run(vm, _KNOCK)
        return act(vm, actions)

    monkeypatch.setattr(RunningVM, "set_links", watched)
    monkeypatch.setattr(reflection, "act", knocking)
    with Store(world.home) as store:
        with monkeypatch.context() as patch:
            patch.setattr(Qga, "execute", _killing("rollback-rename:5"))
            patch.setattr(reflection, "APPLIER", faulty)
            with pytest.raises(GateClosedError):
                pipeline.rollback(world.config, store, Timeline())
        with qemu.attach(world.config) as vm:
            guest_run(vm, _KNOCK)
        report = pipeline.rollback(world.config, store, Timeline())
    assert (report.result, report.left, report.failed_actions) == ("rolled-back", (), ())
    assert [up for up, _ in seen] == [False, False, True]
    assert len({frames for _, frames in seen}) == 1, "frames while the gate was closed"

    with qemu.attach(world.config) as vm:
        assert _out(vm, _TELL) == before
        assert _out(vm, "oua-hello; dpkg --audit") == "one"
        assert _out(vm, "dpkg --verify oua-daemon oua-hello") == "??5?????? c /etc/oua-hello.conf"
        assert _out(vm, "cat /etc/oua-hello.conf; ls /etc/oua-hello.conf*") == (
            "setting=admin\n/etc/oua-hello.conf"
        )
        # Who ran the new files runs the old ones.
        assert _out(vm, shown.format("daemon")) == "/usr/lib/oua-daemon/sleeper"
        assert int(_out(vm, started)) > once
        assert _out(vm, "ls /var/lib/ouassister; find / -xdev -name '.ouassister-*'") == (
            "applied\nlock"
        )
    status = world.run("status").result[0]
    assert [row["state"] for row in status["changesets"]] == ["rolled-back"]


# A boot that is over as soon as the agent answers: the same kernel and disk, no service.
_INIT: Final = """#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
mount -o remount,rw /; mount -t tmpfs tmpfs /run; modprobe virtio_console
while :; do
    for port in /sys/class/virtio-ports/*; do
        grep -qsx org.qemu.guest_agent.0 $port/name && exec qemu-ga -p /dev/${port##*/}
    done
    sleep 0.1
done
"""


def test_what_diverged_is_left_what_is_kept_is_forgotten_and_a_booted_kernel_refused(
    world: World,
) -> None:
    new = "/usr/share/oua-hello/new"
    assert world.run("update", "--install", "oua-hello").status == 0
    assert world.run("resume").status == 0
    with qemu.attach(world.config) as vm:
        guest_run(vm, f"echo more >>{new}")
    left = world.run("rollback", "--leave-diverged")
    assert (left.status, left.result["result"]) == (11, "rolled-back"), left
    assert left.result["left"] == [{"path": new, "reason": "it was written"}]
    with qemu.attach(world.config) as vm:
        assert _out(vm, f"oua-hello; cat {new}; dpkg --audit") == "one\nadded by 2.0\nmore"
        assert _out(vm, "dpkg-query -W -f '${Version}' oua-hello") == "1.0"
        vm.qga().write_file("/root/init", _INIT.encode())
        guest_run(vm, f"rm {new}; chmod 755 /root/init")

    assert world.run("suspend").status == 0
    assert world.run("update", "--install", "oua-kernel").status == 0
    resumed = world.run("resume")
    assert (resumed.status, resumed.result["reboot_needed"]) == (12, True), resumed
    kept = "ls -d /var/lib/ouassister/old-* /var/lib/ouassister/undo-* 2>/dev/null | wc -l"
    with qemu.attach(world.config) as vm:
        assert _out(vm, kept) == "2"
    forgotten = world.run("rollback", "--forget")
    assert (forgotten.status, forgotten.result["result"]) == (0, "forgotten"), forgotten
    refused = world.run("rollback")
    assert (refused.status, refused.code) == (20, "rollback-refused"), refused
    assert "[no-undo]" in refused.value["error"]["message"]
    with qemu.attach(world.config) as vm:
        assert _out(vm, kept) == "0"
        assert _out(vm, "dpkg-query -W -f '${Version}' oua-kernel; sync") == "1.0"
        vm.kill()

    command = [f"{w} init=/root/init" if "root=" in w else w for w in world.config.command]
    with qemu.start(replace(world.config, command=tuple(command))) as vm:
        vm.qga().ping(timeout_s=120)
    refused = world.run("rollback")
    assert (refused.status, refused.code) == (20, "rollback-refused"), refused
    assert (
        "was booted since the update, which brought a kernel" in refused.value["error"]["message"]
    )
    with qemu.attach(world.config) as vm:
        assert _out(vm, "test -e /boot/vmlinuz-9.9.9-1-cloud-amd64; echo $?") == "0"
