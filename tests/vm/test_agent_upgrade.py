"""The guest agent itself is upgraded, and ended in the middle of what it was asked to do."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need
from tests.vm import lost_channel, packages
from tests.vm.repository import Repository, build
from tests.vm.world import use_mirror, with_capture

from ouassister.errors import ChannelError
from ouassister.provider import qemu
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vm.world import World

    from ouassister.provider.qemu import RunningVM

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

AGENT = "qemu-guest-agent"
# All that is of the package, and what dpkg knows of it.
_PACK = f"""cd /; dpkg -L {AGENT} | while read -r path; do
	[ -d "$path" ] || echo ".$path"; done >/tmp/list
ls -d ./var/lib/dpkg/info/{AGENT}.* >>/tmp/list
dpkg-query -s {AGENT} >/tmp/status; tar -C / -cf - -T /tmp/list tmp/status"""
# Whoever restarts that service restarts the agent, with all that it has started.
_TIED = "mkdir -p /etc/systemd/system/{0}.d; printf '[Unit]\\nPartOf=oua-script.service\\n' >{1}"


def _repack(raw: bytes, folder: Path, version: str) -> None:
    """Build the package of the guest's own agent with another version, and other bytes in it."""
    tree = folder / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-x", "-C", str(tree)], input=raw, check=True)
    info, control = tree / "var" / "lib" / "dpkg" / "info", tree / "DEBIAN"
    control.mkdir(mode=0o755)
    for one in info.glob(f"{AGENT}.*"):
        name = one.name.removeprefix(f"{AGENT}.")
        if name in ("postinst", "prerm", "postrm", "preinst", "conffiles"):
            one.rename(control / name)
    status = (tree / "tmp" / "status").read_text().splitlines()
    dropped = ("Status:", "Version:", "Conffiles:", "Installed-Size:", " /")
    lines = [line for line in status if not line.startswith(dropped)]
    (control / "control").write_text("\n".join([*lines, f"Version: {version}", ""]))
    subprocess.run(["rm", "-r", str(tree / "var" / "lib" / "dpkg"), str(tree / "tmp")], check=True)
    with (tree / "usr" / "sbin" / "qemu-ga").open("ab") as program:
        program.write(b"newer")
    deb = folder / f"{AGENT}_9_amd64.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(deb)], check=True, capture_output=True)
    subprocess.run(["rm", "-r", str(tree)], check=True)


def _out(vm: RunningVM, script: str) -> bytes:
    """Ask the guest, whose agent is started anew at some moment."""
    try:
        return guest_run(vm, script).stdout
    except ChannelError:
        return guest_run(vm, script).stdout


def test_agent_that_is_upgraded_and_ends_among_the_actions_costs_nothing_of_the_update(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in ("dpkg-deb", "apt-ftparchive"):
        need(tool)
    folder = tmp_path / "repository"
    folder.mkdir()
    with Repository(folder) as repository:
        with qemu.restore(world.config, links_up=False) as vm:
            vm.qga()
            vm.cont()
            _repack(guest_run(vm, _PACK).stdout, folder, "9:9-9")
            unit = f"{AGENT}.service"
            guest_run(vm, _TIED.format(unit, f"/etc/systemd/system/{unit}.d/tied.conf"))
            source = f"deb [trusted=yes] http://127.0.0.1:{repository.port}/ ./\n"
            vm.qga().write_file("/etc/apt/sources.list", source.encode())
            guest_run(vm, "systemctl daemon-reload; sync", timeout_s=120)
            world.config.save.unlink()
            vm.suspend()
        build(next(one for one in packages.AFTER if one.name == "oua-daemon"), folder)
        repository.publish()
        use_mirror(world.toml, repository.port)
        capture = with_capture(world)
        update = world.run("update")
    assert update.status == 0, update
    assert {one["name"] for one in update.result["changes"]} == {AGENT, "oua-daemon"}
    assert [one["mode"] for one in update.result["modes"]] == ["emulated"] * 2
    last = update.result["actions"][-1]["argv"]
    assert last[0] == "systemd-run"  # that of the agent itself is put off
    assert last[-1] == unit

    lost_channel.resume(world, capture, monkeypatch)
    with qemu.attach(world.config) as vm:
        assert _out(vm, f"dpkg-query -W -f '${{Version}}' {AGENT}; dpkg --audit") == b"9:9-9"
        assert b"(deleted)" not in _out(
            vm, f"readlink /proc/$(systemctl show -P MainPID {unit})/exe"
        )
        assert _out(vm, "ls -d /run/ouassister-apart-* 2>/dev/null; true") == b""
