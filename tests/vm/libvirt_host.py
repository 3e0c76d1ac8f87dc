"""A libvirtd of the tests' own, in namespaces where its folders are private; a domain in it.

Whatever libvirt the host has is neither used nor seen; with the daemon end all domains.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conformance.libvirt import ACCOUNTS, PRIVATE, SETTINGS, USER, wait_until
from tests.conftest import need
from tests.vm.world import World

from ouassister.errors import HostNotReadyError
from ouassister.provider.virsh import DEFAULT, Virsh
from ouassister.provider.virsh_agent import VirshAgent
from ouassister.testing import overlay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.testing import GuestImage

_PORTS = 8
SAVES = "var/lib/libvirt/qemu/save"
UP, DOWN, SSH_CARD = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:03"


@dataclass(frozen=True, slots=True)
class Inside(Virsh):
    """virsh, where the daemon runs."""

    folder: Path
    pid: int

    def enter(self) -> list[str]:
        """What runs a command there."""
        target = ["nsenter", "-t", str(self.pid), "-m", "-p", "--"]
        return [*target, "env", f"--chdir={self.folder}"]

    def command(self) -> list[str]:
        """See `Virsh`."""
        return [*self.enter(), *Virsh.command(self)]

    def restart(self, settings: str) -> None:
        """Have the daemon read other settings of QEMU's driver; domains run on."""
        root = self.folder / "root"
        (root / "etc" / "libvirt" / "qemu.conf").write_text(settings)
        pid = (root / "run" / "libvirtd.pid").read_text().strip()
        subprocess.run([*self.enter(), "kill", pid], check=True)

        def is_another() -> bool:
            try:
                return (root / "run" / "libvirtd.pid").read_text().strip() not in ("", pid)
            except FileNotFoundError:
                return False

        wait_until(is_another)
        wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            return self.ask("list").ok
        except HostNotReadyError:
            return False

    @property
    def managed(self) -> Path:
        """Where libvirt keeps managed saves, as it is seen from outside."""
        return self.folder / "root" / SAVES


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Inside]:
    """Run libvirtd with its state below ``folder``."""
    for tool in ("libvirtd", "virsh", "nsenter", "unshare"):
        need(tool)
    root = folder / "root"
    lines = ["set -e", "mount -t proc proc /proc"]
    for name in PRIVATE:
        (root / name.lstrip("/")).mkdir(parents=True)
        lines += [f"mkdir -p {name}", f"mount --bind {root}{name} {name}"]
    (root / "etc" / "libvirt" / "qemu.conf").write_text(SETTINGS)
    for name, line in ACCOUNTS.items():
        known = Path("/etc", name).read_text()
        lacks = "" if f"\n{USER}:" in known else line
        (root / "etc" / name).write_text(known + lacks)
        lines.append(f"mount --bind {root}/etc/{name} /etc/{name}")
    # A process namespace ends with its first process, which has to reap what others leave.
    lines.append("while :; do libvirtd & wait $!; done")
    argv = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
    argv += ["sh", "-c", "\n".join(lines)]
    with (folder / "libvirtd.log").open("wb") as log, subprocess.Popen(argv, stderr=log) as process:
        try:
            wait_until((root / "run" / "libvirt" / "libvirt-sock").exists)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            yield Inside(DEFAULT, folder, int(children.split()[0]))
        finally:
            os.kill(process.pid, signal.SIGKILL)


def domain(image: GuestImage, folder: Path, port: int, machine: str = "q35") -> str:
    """The XML of a domain with two interfaces, one of them down; the other's frames are kept.

    A third one, which libvirt knows nothing of, is for ssh alone.
    A q35 has so many root ports that one is left for the medium.
    """
    ports = ""
    if machine == "q35":
        ports = "<controller type='pci' index='0' model='pcie-root'/>"
        ports += "<controller type='pci' model='pcie-root-port'/>" * _PORTS
    frames = f"filter-dump,id=frames,netdev=hostnet0,file={folder}/frames.pcap"
    network = "user,id=mgmt,restrict=on,ipv6=off,net=10.77.0.0/24,hostfwd=tcp:127.0.0.1:0-:22"
    card = f"virtio-net-pci,id=mgmt0,netdev=mgmt,mac={SSH_CARD}"
    # The last bus, so that the guest calls the others eth0 and eth1.
    last = "pcie-root-port,id=mgmt-port,bus=pcie.0,addr=0x1c,chassis=99"
    card += ",bus=mgmt-port" if machine == "q35" else ",bus=pci.0,addr=0x1c"
    bridge = f"<qemu:arg value='-device'/><qemu:arg value='{last}'/>" if machine == "q35" else ""
    return f"""
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{image.hostname}</name>
  <metadata><o:vm xmlns:o='urn:ouassister:vm:1' local-mirrors='127.0.0.1:{port}'
    quarantine='{DOWN}'/></metadata>
  <memory unit='MiB'>512</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{image.kernel}</kernel><initrd>{image.initrd}</initrd>
    <cmdline>{image.cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {ports}
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='{folder}/disk.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='user'><mac address='{UP}'/><model type='virtio'/></interface>
    <interface type='user'>
      <mac address='{DOWN}'/><model type='virtio'/><link state='down'/>
    </interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='unix'><target type='virtio' name='org.ouassister.0'/></channel>
    <serial type='file'><source path='{folder}/console.log'/></serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-object'/><qemu:arg value='{frames}'/>
    <qemu:arg value='-netdev'/><qemu:arg value='{network}'/>
    {bridge}
    <qemu:arg value='-device'/><qemu:arg value='{card}'/>
  </qemu:commandline>
</domain>
"""


@dataclass(frozen=True)
class Sleeper(World):
    """A domain that sleeps, and the command line beside its libvirtd."""

    virsh: Inside = None  # type: ignore[assignment]  # a field with a default comes before it
    words: tuple[str, ...] = ()
    program: tuple[str, ...] = ("-m", "ouassister")

    @property
    def folder(self) -> Path:
        return self.virsh.folder

    @property
    def save(self) -> Path:
        return self.virsh.managed / f"{self.toml}.save"

    def command(self, verb: str, *words: str) -> list[str]:
        vm = [] if verb == "list" else [*self.words, str(self.toml)]
        program = [sys.executable, *self.program]
        return [*self.virsh.enter(), *program, verb, "--json", *vm, *words]

    def python(self, script: str) -> str:
        """Run a script beside the daemon; returns what it printed."""
        argv = [*self.virsh.enter(), sys.executable, "-c", script]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def guest(self, script: str) -> str:
        """Run a script in the guest that is awake."""
        agent: Any = VirshAgent(self.virsh, str(self.toml))
        done = agent.run(["/bin/sh", "-c", script], timeout_s=120)
        assert done.exit_status == 0, done
        return str(done.stdout.decode().strip())

    def state(self) -> str:
        return self.virsh.run("domstate", str(self.toml)).strip()

    def fall_asleep(self, kept: Path) -> None:
        """Be the domain that was suspended: its disk a fresh layer, its save a copy."""
        self.virsh.ask("destroy", str(self.toml))
        for name in ("disk.qcow2", "frames.pcap"):
            (self.folder / name).unlink(missing_ok=True)
        overlay(self.folder / "disk.qcow2", kept / "base.qcow2", "qcow2")
        shutil.copyfile(kept / "save", self.save)

    def hashes(self) -> dict[str, str]:
        found = {}
        for path in (self.save, self.folder / "disk.qcow2", self.folder / "kept" / "base.qcow2"):
            done = subprocess.run(["sha256sum", str(path)], capture_output=True, check=True)
            found[path.name] = done.stdout.split()[0].decode()
        return found
