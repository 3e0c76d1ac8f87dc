"""What cannot be emulated is installed by the guest's own dpkg, before the gate opens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.vm import packages
from tests.vm.repository import build
from tests.vm.world import with_capture

from ouassister import pipeline
from ouassister.demo.frames import count_frames
from ouassister.provider import qemu
from ouassister.provider.qemu import RunningVM
from ouassister.store.database import Store
from ouassister.testing import guest_run
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vm.world import World

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


# Of sh(1), which is dash, there is no such network.
KNOCK = ["/bin/bash", "-c", "echo knock >/dev/udp/10.0.2.2/9"]


def _out(vm: RunningVM, script: str) -> str:
    return guest_run(vm, script, timeout_s=120).stdout.decode().strip()


def _modes(update: dict[str, list[dict[str, str]]]) -> dict[str, tuple[str, str]]:
    return {one["name"]: (one["mode"], one["reason"]) for one in update["modes"]}


def test_what_needs_the_live_guest_is_staged_with_its_dependents_and_the_rest_is_emulated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = with_capture(world)
    before = world.hashes()
    wish = [
        word
        for name in ("user", "early", "keys", "asks", "once", "extra", "stops")
        for word in ("--install", f"oua-{name}")
    ]
    update = world.run("update", *wish)
    assert update.status == 0, update
    modes = _modes(update.result)
    for name in ("extra", "once", "stops"):
        assert modes[f"oua-{name}"] == ("emulated", "")
    assert modes["oua-live"][0] == "staged"
    assert "post-installation script subprocess returned error" in modes["oua-live"][1]
    assert modes["oua-user"][0] == "staged"
    assert "oua-live" in modes["oua-user"][1]
    assert modes["oua-early"][0] == "staged"
    assert modes["oua-asks"][0] == "staged"
    assert "connect tcp:80" in modes["oua-asks"][1]
    assert modes["oua-keys"][0] == "staged"
    assert "keyctl" in modes["oua-keys"][1]
    assert world.hashes() == before
    # Of the rounds that failed nothing is left in what travels; the report has what was tried.
    assert [action["argv"] for action in update.result["actions"]] == [
        ["write_file", "/run/oua-once", "0644", "0", "0"],
        ["systemctl", "stop", "nginx.service"],
        ["systemctl", "start", "nginx.service"],
    ]
    assert [note for note in update.result["notes"] if "keyctl" in note]

    plan = world.run("plan", *wish)
    guessed = {one["name"]: one["reason"] for one in plan.result["predicted"]}
    staged = ("oua-live", "oua-user", "oua-early", "oua-keys", "oua-asks")
    assert guessed.keys() == set(staged)
    assert all("it was staged for" in reason for reason in guessed.values())

    frames: list[int] = []
    set_links = RunningVM.set_links

    def counted(vm: RunningVM, *, up: bool) -> None:
        if up:
            frames.append(count_frames(capture))
        set_links(vm, up=up)

    with Store(world.home) as opened, monkeypatch.context() as patch:
        patch.setattr(RunningVM, "set_links", counted)
        resumed = pipeline.resume(world.config, opened, Timeline())
    assert frames == [0]
    assert resumed.failed_actions == ()
    states = {one.name: (one.version, one.status) for one in resumed.staged}
    assert states == dict.fromkeys(staged, ("1.0", "installed"))
    with qemu.attach(world.config) as vm:
        shown = _out(vm, "dpkg-query -W -f '${Package} ${db:Status-Abbrev}\\n' 'oua-*'")
        assert {
            f"oua-{name} ii" for name in ("early", "extra", "keys", "live", "once", "user")
        } <= {line.strip() for line in shown.splitlines()}
        assert _out(vm, "dpkg --audit; dpkg --verify oua-extra oua-keys oua-live oua-user") == ""
        assert _out(vm, "cat /var/lib/oua-asks") == "answered"
        # Nobody has seen the question, which a star would tell; the next who is there is asked.
        assert _out(vm, "debconf-show oua-asks") == "oua-asks/colour: blue"
        assert _out(vm, "cat /var/lib/oua-live.log") == "configured"
        assert _out(vm, "apt-mark showauto 'oua-*'") == "oua-live"
        assert _out(vm, "oua-user; oua-extra") == "user\nextra"
        assert _out(vm, "ls -d /var/cache/ouassister /run/ouassister-*.sh 2>/dev/null; true") == ""


def test_package_that_fails_everywhere_leaves_the_gate_closed_with_the_words_of_dpkg(
    world: World,
) -> None:
    capture = with_capture(world)
    update = world.run("update", "--install", "oua-broken")
    assert update.status == 0, update
    assert _modes(update.result)["oua-broken"][0] == "staged"  # all of it
    for _ in range(2):  # a resume that takes it up again finds the same
        resumed = world.run("resume")
        assert (resumed.status, resumed.code) == (41, "gate-closed"), resumed
        message = resumed.value["error"]["message"]
        assert "(oua-broken)" in message
        assert "post-installation script subprocess returned error exit status 3" in message
        assert "broken on purpose" in message
    with qemu.attach(world.config) as vm:
        assert _out(vm, "dpkg-query -W -f '${db:Status-Status}' oua-broken") == "half-configured"
        guest_run(vm, KNOCK, check=False)
        # Somebody mends it; the next resume goes on and opens the gate.
        mend = "rm /var/lib/dpkg/info/oua-broken.postinst; dpkg --configure oua-broken"
        guest_run(vm, f"{mend}; rm -r /var/cache/ouassister", timeout_s=60)
    assert count_frames(capture) == 0
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    assert resumed.result["staged"][0]["status"] == "installed"


def test_package_that_writes_what_a_process_holds_open_is_staged_and_restarted_once(
    world: World, tmp_path: Path
) -> None:
    deb = build(packages.store("1.0"), tmp_path)
    with qemu.restore(world.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        vm.qga().write_file(f"/root/{deb.name}", deb.read_bytes())
        # As images for containers have it: archives go as soon as they are installed.
        clean = 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };'
        guest_run(vm, f"echo '{clean}' >/etc/apt/apt.conf.d/oua-clean")
        guest_run(vm, f"dpkg -i /root/{deb.name}; sync", timeout_s=60)
        world.config.save.unlink()
        vm.suspend()
    update = world.run("update")
    assert update.status == 0, update
    modes = _modes(update.result)
    assert {name for name, (mode, _reason) in modes.items() if mode == "emulated"} == {
        "oua-daemon",
        "oua-hello",
        "oua-library",
    }
    mode, reason = modes["oua-store"]
    assert mode == "staged"
    assert "/srv/oua-store" in reason
    assert "keeper" in reason
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    with qemu.attach(world.config) as vm:
        assert _out(vm, "cat /srv/oua-store") == "1.0\n2.0"
        assert _out(vm, "cat /var/lib/oua-store.starts") == "started\nstarted"
        assert _out(vm, "systemctl is-active oua-store") == "active"
        assert _out(vm, "oua-hello; dpkg --audit") == "two"
        main = "readlink /proc/$(systemctl show -P MainPID oua-store)/exe"
        assert _out(vm, main) == "/usr/lib/oua-store/keeper"
