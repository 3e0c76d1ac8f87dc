"""What runs goes on through a reflection with what it had; and no change set fits another guest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.vm.world import World, with_capture

from ouassister import pipeline
from ouassister.demo.frames import count_frames
from ouassister.errors import TamperedError
from ouassister.provider import qemu, vmtoml
from ouassister.reflect import reflection
from ouassister.store.database import Store
from ouassister.testing import clone as make_clone
from ouassister.testing import guest_run
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.provider.qemu import RunningVM

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

# Each says how far it is, twenty times a second; the names are those of a rule (packages.py) by
# which none of them is restarted.
_BEAT: Final = (
    'open(L, ">>", "/srv/oua/log") if $ARGV[0] eq "log";'
    " for (my $n = 1; ; $n++) {"
    ' open(F, ">", "/run/oua-$ARGV[0].new"); print F $n; close F;'
    ' rename("/run/oua-$ARGV[0].new", "/run/oua-$ARGV[0]");'
    ' syswrite(L, "$n\\n") if $ARGV[0] eq "log"; select(undef, undef, undef, 0.05) }'
)
_START: Final = """
cp /usr/bin/perl /srv/oua/program; : >/srv/oua/log
cp /lib/x86_64-linux-gnu/libutil.so.1 /srv/oua/library.so
systemd-run -q --unit=oua-kept-program /srv/oua/program /srv/oua/beat program
systemd-run -q --unit=oua-kept-library --setenv=LD_PRELOAD=/srv/oua/library.so \
    /usr/bin/perl /srv/oua/beat library
systemd-run -q --unit=oua-kept-log /usr/bin/perl /srv/oua/beat log
for name in program library log; do until [ -s /run/oua-$name ]; do sleep 0.1; done; done; sync
"""
# For each: process, inode that it has in use, inode at the path, how far it is.
_LOOK: Final = """
for name in program library log; do
    pid=$(systemctl show -P MainPID oua-kept-$name)
    case $name in
    program) used=$(stat -Lc %i /proc/$pid/exe) path=program ;;
    library) used=$(grep -m1 -e /srv/oua/ -e /var/lib/ouassister/ /proc/$pid/maps | tr -s ' ' |
        cut -d ' ' -f 5) path=library.so ;;
    log) used=$(stat -Lc %i /proc/$pid/fd/3) path=log ;;
    esac
    echo $name $pid $used $(stat -c %i /srv/oua/$path) $(cat /run/oua-$name)
done
"""


def _look(vm: RunningVM) -> dict[str, list[int]]:
    lines = guest_run(vm, _LOOK, timeout_s=120).stdout.decode().splitlines()
    return {name: list(map(int, words)) for name, *words in map(str.split, lines)}


def _goes_on(vm: RunningVM, name: str, beat: int) -> None:
    guest_run(vm, f"until [ $(cat /run/oua-{name}) -gt {beat} ]; do sleep 0.05; done", timeout_s=60)


def test_what_runs_goes_on_with_what_it_had_and_is_the_new_one_when_it_is_restarted(
    world: World,
) -> None:
    with qemu.restore(world.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        vm.qga().write_file("/run/beat", _BEAT.encode())
        guest_run(vm, "mkdir /srv/oua; mv /run/beat /srv/oua/beat")
        guest_run(vm, _START, timeout_s=120)
        before = _look(vm)
        world.config.save.unlink()
        vm.suspend()
    update = world.run("update", "--install", "oua-renews", "--install", "oua-relogs")
    assert update.status == 0, update
    modes = {one["name"]: one["mode"] for one in update.result["modes"]}
    assert modes == {"oua-renews": "emulated", "oua-relogs": "staged"}  # the log is held open
    resumed = world.run("resume")
    assert resumed.status == 0, resumed
    with qemu.attach(world.config) as vm:
        after = _look(vm)
        for name, (pid, used, at_path, beat) in after.items():
            old_pid, old_used, old_at_path, old_beat = before[name]
            assert (pid, used) == (old_pid, old_used), name  # the same process, the old inode
            assert old_used == old_at_path != at_path, name  # a new one is there
            _goes_on(vm, name, max(beat, old_beat))
        guest_run(vm, "systemctl restart oua-kept-program oua-kept-library oua-kept-log")
        for name, (pid, used, at_path, beat) in _look(vm).items():
            assert pid != after[name][0], name
            assert used == at_path == after[name][2], name
            _goes_on(vm, name, beat)


def _attested(vm: RunningVM) -> str:
    raw = guest_run(vm, ["cat", "/var/lib/ouassister/attestation.json"]).stdout
    changeset: str = json.loads(raw)["changeset"]
    return changeset


def test_change_set_is_for_one_suspension_of_one_guest_and_twins_share_nothing_of_ours(
    world: World, prepared: Path, tmp_path: Path
) -> None:
    twin = World(make_clone(prepared, tmp_path / "twin"), tmp_path / "twin-home")
    ids = []
    for one in (world, twin):
        update = one.run("update", "--install", "oua-extra")
        assert update.status == 0, update
        ids.append(update.result["changeset_id"])
    assert ids[0] != ids[1]
    resumed = twin.run("resume")
    assert resumed.status == 0, resumed
    with qemu.attach(twin.config) as vm:
        assert _attested(vm) == ids[1]
        vm.kill()

    text = world.toml.read_text()
    twins = replace(world.config, save=twin.config.save.with_name("save.img.resumed"))
    world.toml.write_text(vmtoml.dump(twins))  # as if it slept in the other's save file
    resumed = world.run("resume")
    assert (resumed.status, resumed.code) == (21, "stale"), resumed
    assert "made for other files" in resumed.value["error"]["message"]
    world.toml.write_text(text)

    with qemu.restore(world.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        assert guest_run(vm, "ls /var/lib/ouassister", check=False).stdout == b""
        half = "mkdir -m 700 /var/lib/ouassister; : >/var/lib/ouassister/journal-0123456789ab"
        guest_run(vm, half)  # not even synced
        world.config.save.unlink()
        vm.suspend()
    resumed = world.run("resume")
    assert (resumed.status, resumed.code) == (21, "stale"), resumed
    assert not qemu.is_running(world.config)
    update = world.run("update", "--install", "oua-extra")
    assert (update.status, update.code) == (20, "state"), update
    assert "half done" in update.value["error"]["message"]


def test_medium_with_one_bit_flipped_leaves_the_guest_as_it_was_and_the_gate_closed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = with_capture(world)
    assert world.run("update").status == 0
    make_medium = reflection.make_medium

    def flipped(*arguments: Any) -> reflection.Medium:  # noqa: ANN401
        medium = make_medium(*arguments)
        raw = bytearray(medium.path.read_bytes())
        raw[raw.index(b"added by 2.0")] ^= 1  # of a file that is staged late
        medium.path.write_bytes(raw)
        return medium

    monkeypatch.setattr(reflection, "make_medium", flipped)
    with Store(world.home) as store, pytest.raises(TamperedError, match="content on the medium"):
        pipeline.resume(world.config, store, Timeline())
    with qemu.attach(world.config) as vm:
        assert guest_run(vm, "oua-hello; dpkg --audit").stdout == b"one\n"
        left = "find / -xdev -name '.ouassister-*'; ls /var/lib/ouassister /etc/systemd"
        told = guest_run(vm, left).stdout.decode().split()
        assert "lock" in told
        assert not {"system.control", "boot-applier", "boot-medium", "applied"} & set(told)
        assert not [word for word in told if ".ouassister-" in word or "journal-" in word]
        guest_run(vm, ["/bin/bash", "-c", "echo knock >/dev/udp/10.0.2.2/9"], check=False)
    assert count_frames(capture) == 0
