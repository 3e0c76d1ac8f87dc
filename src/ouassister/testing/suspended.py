"""Boot an image once, suspend it when it is ready, and clone the sleeping guest for each use.

A clone is a qcow2 overlay over the suspended disk, and a symbolic link to the save file: nothing
of the original is written, not even its times (a hard link would change its ctime, which a fence
compares).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ouassister.errors import (
    DeadlineError,
    HostNotReadyError,
    OUassisterError,
    StateError,
    UsageError,
)
from ouassister.provider import qemu, vmtoml
from ouassister.provider.cmdline import quote
from ouassister.testing.guest import locked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ouassister.provider.qemu import RunningVM
    from ouassister.provider.qga import ExecResult
    from ouassister.testing.guest import GuestImage

_QEMU = "qemu-system-x86_64"
_PROBE_S = 10.0
_BOOT_S = 300.0
_DISK, _SAVE, _CONSOLE = "disk.qcow2", "save.img", "console.log"
# The boot has reached user space; seen on the console without "quiet".
_ALIVE = b"Run /init as init process"
_SETTLED = (
    "until systemctl is-system-running; do"
    "  if systemctl --failed --plain --no-legend | grep .; then exit 1; fi; sleep 0.2; done"
)


def make_suspended(
    image: GuestImage,
    folder: Path,
    *,
    memory_mib: int = 512,
    machine: str = "pc",
    storage: str = "virtio-blk",
    web: bool = True,
    progress: Callable[[str], None] = lambda _line: None,
) -> Path:
    """Boot an overlay of the image until it serves, suspend it; return its ``vm.toml``.

    ``storage`` is the bus of its disk, and of the medium that is plugged in later: "virtio-blk",
    or "virtio-scsi", where plugging in costs the guest neither PCI nor ACPI work. Without ``web``
    the image has no web server to wait for.

    A folder where this was done before, with the same image and hardware, is left as it is.

    Raises:
        DeadlineError: The guest did not come up; its console is in ``console.log``.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    accelerator = probe_accelerator(image)
    command, medium = _command(image, accelerator, machine, memory_mib, storage)
    text = _toml(image.hostname, command, medium)
    done = folder / "vm.toml"
    with locked(folder.with_name(f"{folder.name}.lock")):
        if done.exists() and done.read_text() == text and (folder / _SAVE).exists():
            return done
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        overlay(folder / _DISK, image.disk, "qcow2")
        draft = folder / "vm.toml.part"
        draft.write_text(text)
        progress(f"guest: booting with {accelerator}")
        vm = qemu.start(vmtoml.load(draft))
        try:
            wait_ready(vm, timeout_s=_BOOT_S, web=web)
            progress("guest: ready; suspending it")
            vm.suspend()
        except BaseException:
            with contextlib.suppress(OUassisterError):
                vm.kill()
            raise
        draft.rename(done)
    return done


def clone(vm_toml: Path, folder: Path) -> Path:
    """Make a twin of a suspended VM in ``folder``; return its ``vm.toml``.

    The sockets are the clone's own; a forwarded port is too, since QEMU chooses it.

    Raises:
        UsageError: The VM's command opens a disk in a way that cannot be redirected.
    """
    config = vmtoml.load(vm_toml)
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    command = list(config.command)
    disks = []
    for disk in config.disks:
        path = folder / f"{disk.node}.qcow2"
        overlay(path, disk.path, disk.format)
        old = f"driver={disk.format},node-name={disk.node},file.driver=file,file.filename="
        new = (
            f"driver=qcow2,node-name={disk.node},file.driver=file,file.filename={quote(path.name)}"
        )
        places = [i for i, word in enumerate(command) if word.startswith(old)]
        if len(places) != 1:
            message = f"{vm_toml}: the -blockdev of {disk.node!r} is not spelled '{old}...'"
            raise UsageError(message, hint="clones are for VMs made by make_suspended")
        command[places[0]] = new
        disks.append(replace(disk, path=path, format="qcow2"))
    save = folder / _SAVE
    save.symlink_to(config.save.resolve())
    copy = replace(
        config,
        source=folder / "vm.toml",
        folder=folder,
        name=folder.name,
        save=save,
        command=tuple(command),
        qmp=folder / config.qmp.name,
        agent=folder / config.agent.name if config.agent else None,
        helper=folder / config.helper.name if config.helper else None,
        disks=tuple(disks),
    )
    (folder / "vm.toml").write_text(vmtoml.dump(copy))
    if config.gate_file.exists():  # it sleeps behind a closed gate
        shutil.copyfile(config.gate_file, copy.gate_file)
    return folder / "vm.toml"


def overlay(path: Path, backing: Path, backing_format: str) -> None:
    """Create a qcow2 layer whose backing file is never written."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(backing.absolute())]
    made = subprocess.run(
        [*command, "-F", backing_format, str(path)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        raise HostNotReadyError(f"qemu-img cannot create {path}: {made.stderr.strip()}")


def guest_run(
    vm: RunningVM, what: str | Sequence[str], *, timeout_s: float = 60.0, check: bool = True
) -> ExecResult:
    """Run a shell script (a string) or an argument list in the guest, through its agent.

    Raises:
        StateError: ``check`` is set and the exit status is not 0.
    """
    argv = ["/bin/sh", "-c", what] if isinstance(what, str) else what
    result = vm.qga().run(argv, timeout_s=timeout_s)
    if check and result.exit_status != 0:
        detail = result.stderr.decode("utf-8", "replace").strip()[-500:]
        raise StateError(f"{what!r} ended with status {result.exit_status} in the guest: {detail}")
    return result


def wait_ready(vm: RunningVM, *, timeout_s: float, web: bool = True) -> None:
    """Wait until systemd has settled and, with ``web``, nginx answers through the forwarded port.

    Raises:
        DeadlineError: One of them did not happen in time.
        StateError: A unit failed at boot.
    """
    end = time.monotonic() + timeout_s
    vm.qga().sync(timeout_s=timeout_s)
    settled = guest_run(vm, _SETTLED, timeout_s=end - time.monotonic(), check=False)
    if settled.exit_status != 0:
        raise StateError(f"a unit of the guest failed at boot: {settled.stdout[-300:]!r}")
    if web:
        http_get(vm, timeout_s=max(end - time.monotonic(), 1))
    # A sleeper of some hours has long written its boot back; so has this one.
    guest_run(vm, "sync", timeout_s=60)


def http_get(vm: RunningVM, path: str = "/", *, timeout_s: float = 30.0) -> bytes:
    """Fetch a page from the guest's web server, trying until it answers.

    Raises:
        DeadlineError: It did not answer.
    """
    url = f"http://127.0.0.1:{forwarded_port(vm, 80)}{path}"
    end = time.monotonic() + timeout_s
    while True:
        left = end - time.monotonic()
        try:
            with urllib.request.urlopen(url, timeout=max(min(left, 5.0), 0.1)) as reply:
                body: bytes = reply.read(1 << 20)
                return body
        except OSError as error:
            if left <= 0:
                raise DeadlineError(f"the guest's web server did not answer at {url}") from error
            time.sleep(0.05)


def forwarded_port(vm: RunningVM, guest_port: int) -> int:
    """The loopback port that QEMU's user network forwards to a port of the guest.

    The command asks for port 0, so that the kernel chooses one and clones never collide.
    """
    table = vm.qmp.execute_with("human-monitor-command", {"command-line": "info usernet"})
    for line in str(table).splitlines():
        match = re.search(r"TCP\[HOST_FORWARD]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)", line)
        if match and int(match[2]) == guest_port:
            return int(match[1])
    raise UsageError(f"the VM's command forwards no port to {guest_port}")


def probe_accelerator(image: GuestImage) -> str:
    """``kvm`` where this host's KVM boots the image to user space, else ``tcg``.

    The answer is kept beside the image until the host's kernel changes.
    """
    answer = image.disk.with_name("accelerator.json")
    host = f"{os.uname().release} {os.uname().version} {os.access('/dev/kvm', os.R_OK | os.W_OK)}"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(answer.read_text())
        if known.get("host") == host:
            return "kvm" if known.get("kvm") is True else "tcg"
    boots = os.access("/dev/kvm", os.R_OK | os.W_OK) and _boots_under_kvm(image)
    answer.write_text(json.dumps({"host": host, "kvm": boots}))
    return "kvm" if boots else "tcg"


def _boots_under_kvm(image: GuestImage) -> bool:
    argv = [_QEMU, "-machine", "pc", "-accel", "kvm", "-cpu", "max", "-m", "512", "-nodefaults"]
    argv += ["-display", "none", "-no-reboot", "-serial", "stdio"]
    argv += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append"]
    process = subprocess.Popen(
        [*argv, "console=ttyS0 panic=-1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None  # noqa: S101 - PIPE was asked for
    os.set_blocking(process.stdout.fileno(), False)
    seen = b""
    end = time.monotonic() + _PROBE_S
    try:
        while _ALIVE not in seen and process.poll() is None and time.monotonic() < end:
            seen += process.stdout.read(1 << 16) or b""
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return _ALIVE in seen


def _command(
    image: GuestImage, accelerator: str, machine: str, memory_mib: int, storage: str
) -> tuple[list[str], str]:
    """The guest's hardware, and the bus of its medium.

    Devices sit at fixed addresses of a versioned machine, since a save loads only into the same.
    Paths of the guest's own folder are relative, so that a clone's are too.
    """
    bus = "pcie.0" if machine == "q35" else "pci.0"
    accel = "kvm" if accelerator == "kvm" else "tcg,tb-size=256"
    command = [_QEMU, "-machine", _versioned(machine), "-accel", accel, "-cpu", "max"]
    command += ["-m", str(memory_mib), "-smp", "2", "-nodefaults", "-display", "none"]
    command += ["-serial", f"file:{_CONSOLE}", "-kernel", str(image.kernel)]
    command += ["-initrd", str(image.initrd), "-append", image.cmdline]
    disk = f"driver=qcow2,node-name=disk0,file.driver=file,file.filename={_DISK}"
    command += ["-blockdev", disk, "-device"]
    medium = ""
    if storage == "virtio-scsi":
        command += [f"virtio-scsi-pci,id=scsi0,bus={bus},addr=4", "-device"]
        command.append("scsi-hd,drive=disk0,id=sd0,bus=scsi0.0")
        medium = "scsi0.0"
    elif storage == "virtio-blk":
        command.append(f"virtio-blk-pci,drive=disk0,id=vd0,bus={bus},addr=4")
        if machine == "q35":
            # Nothing can be plugged into pcie.0 itself.
            command += ["-device", "pcie-root-port,id=medium,bus=pcie.0,addr=8,chassis=1"]
            medium = "medium"
    else:
        raise UsageError(f"storage {storage!r} is neither virtio-blk nor virtio-scsi")
    # Router advertisements would be frames of QEMU itself on a link that is closed.
    net = "user,id=net0,ipv6=off,hostfwd=tcp:127.0.0.1:0-:80"
    command += ["-netdev", net, "-device", f"virtio-net-pci,netdev=net0,id=nic0,bus={bus},addr=3"]
    command += ["-device", f"virtio-rng-pci,bus={bus},addr=5"]
    command += ["-device", f"virtio-serial-pci,id=serial0,bus={bus},addr=6"]
    command += ["-chardev", "socket,id=qga,path=qga.sock,server=on,wait=off"]
    command += ["-device", "virtserialport,bus=serial0.0,chardev=qga,name=org.qemu.guest_agent.0"]
    return command, medium


def _versioned(machine: str) -> str:
    """The machine that an alias stands for today: a save loads only into the same version."""
    if shutil.which(_QEMU) is None:
        raise HostNotReadyError(f"{_QEMU} is not installed")
    told = subprocess.run([_QEMU, "-machine", "help"], capture_output=True, text=True, check=True)
    match = re.search(rf"^{re.escape(machine)}\s.*\(alias of (\S+)\)", told.stdout, re.MULTILINE)
    return match[1] if match else machine


def _toml(name: str, command: list[str], medium: str) -> str:
    config = vmtoml.VmConfig(
        Path("/"),
        Path("/"),
        name,
        Path("/", _SAVE),
        tuple(command),
        Path("/qmp.sock"),
        Path("/qga.sock"),
        (vmtoml.Disk("disk0", Path("/", _DISK), "qcow2"),),
        (vmtoml.Net("nic0", "net0"),),
        medium,
    )
    return vmtoml.dump(config)
