"""libvirt's QEMU driver, run by hand: a daemon of our own with a folder of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from typing import TYPE_CHECKING

from tests.conformance.make_sample import MIB, READY, assemble, ram_parts
from tests.conformance.newer import WORK, inside

from ouassister.testing.state_format import Truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


MEMORY_MIB = 64
PRIVATE = ("/etc/libvirt", "/run", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
# libvirt wants its own user to exist, and its package may not have been configured.
USER = "libvirt-qemu"
ACCOUNTS = {
    "passwd": f"{USER}:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n",
    "group": f"{USER}:x:64055:\n",
}
SETTINGS = """
stdio_handler = "file"
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
namespaces = [ ]
cgroup_controllers = [ ]
clear_emulator_capabilities = 0
"""
DOMAIN = f"""
<domain type='qemu'>
  <name>guest</name>
  <memory unit='MiB'>{MEMORY_MIB}</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='{{machine}}'>hvm</type>
    <kernel>{WORK}/guest.bin</kernel>
  </os>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <serial type='file'><source path='{WORK}/serial.log'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""
DEADLINE_S = 60.0


class Libvirt:
    """A running daemon."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self._tree = tree
        self.folder = folder

    def command(self, *argv: str) -> list[str]:
        """Return a command that runs where the daemon runs."""
        files = [f"/etc/{name}" for name in ACCOUNTS]
        return inside(self._tree, self.folder, argv, private=[*PRIVATE, *files])

    def virsh(self, *words: str) -> str:
        """Run one command of virsh."""
        argv = self.command("virsh", "-q", "-c", "qemu:///system", *words)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _truth(self, part: tuple[int, int]) -> Truth:
        flat = self.folder / "memory"
        arguments = {"val": part[0], "size": part[1], "filename": f"{WORK}/{flat.name}"}
        command = json.dumps({"execute": "pmemsave", "arguments": arguments})
        answer = self.virsh("qemu-monitor-command", "guest", command)
        assert "return" in json.loads(answer), answer
        with flat.open("rb") as source:
            truth = Truth.read(part[0], source)
        flat.unlink()
        assert truth.size_bytes == part[1]
        return truth

    @contextlib.contextmanager
    def guest(self, machine: str = "pc") -> Iterator[tuple[Truth, ...]]:
        """Run the guest until it is ready, pause it, and read its memory."""
        assemble(self.folder)
        log = self.folder / "serial.log"
        log.unlink(missing_ok=True)
        (self.folder / "domain.xml").write_text(DOMAIN.format(machine=machine))
        self.virsh("define", f"{WORK}/domain.xml")
        self.virsh("start", "guest")
        wait_until(lambda: log.exists() and READY in log.read_bytes())
        self.virsh("suspend", "guest")

        yield tuple(self._truth(part) for part in ram_parts(MEMORY_MIB * MIB, 1 << 32))
        self.virsh("undefine", "guest", "--managed-save")


@contextlib.contextmanager
def running(tree: Path, folder: Path) -> Iterator[Libvirt]:
    """Run the daemon; with it end all VMs that it started."""
    libvirt = Libvirt(tree, folder)
    settings = folder / "root" / "etc" / "libvirt" / "qemu.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(SETTINGS)
    for name, line in ACCOUNTS.items():
        known = (tree / "etc" / name).read_text()
        lacks = "" if f"\n{USER}:" in known else line
        (folder / "root" / "etc" / name).write_text(known + lacks)
    # A process namespace ends with its first process, which has to reap what others leave.
    first = ["sh", "-c", '"$@" & wait', "sh", "libvirtd"]
    argv = ["unshare", "--pid", "--fork", "--kill-child", *libvirt.command(*first)]
    with (folder / "libvirtd.log").open("wb") as log, subprocess.Popen(argv, stderr=log) as process:
        try:
            socket = folder / "root" / "run" / "libvirt" / "libvirt-sock"
            wait_until(socket.exists)
            yield libvirt
        finally:
            process.kill()


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for something that announces itself in no other way."""
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
