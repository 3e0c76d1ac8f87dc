"""What the host must have, each with the purpose that it serves."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ouassister.disk import ext4_view
from ouassister.errors import OUassisterError
from ouassister.provider import libvirt_python, sockets
from ouassister.shadow import cgroups, ids
from ouassister.store.database import home

_TOOLS: Final = (
    ("qemu-system-x86_64", "qemu-system-x86", "runs and restores VMs"),
    ("qemu-img", "qemu-utils", "the private copy of a disk"),
    ("qemu-storage-daemon", "qemu-system-common", "serves the private copy as a file"),
    ("e2fsck", "e2fsprogs", "proves that the copy is sound"),
    ("mcopy", "mtools", "reads the guest's EFI system partition"),
)
_USER_TOOLS: Final = (("newuidmap", "uidmap", "maps subordinate ids for a user"),)
# The daemon for all drivers, and the one for QEMU alone (libvirt, daemons.rst).
_DAEMONS: Final = (Path("/run/libvirt/libvirt-sock"), Path("/run/libvirt/virtqemud-sock"))
_MIN_FREE: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    ok: bool
    name: str
    purpose: str
    detail: str


def check_host() -> tuple[Check, ...]:
    """Look at everything; nothing is changed."""
    tools = _TOOLS + (() if os.geteuid() == 0 else _USER_TOOLS)
    checks = [_tool(*tool) for tool in tools]
    checks.append(_ext4_view())
    checks += [_machine(), _fuse(), _namespaces(), _overlayfs(), _ids(), _groups(), _libvirt()]
    checks.append(_free(home()))
    return tuple(checks)


def _tool(name: str, package: str, purpose: str) -> Check:
    path = shutil.which(name)
    return Check(path is not None, name, purpose, path or f"apt-get install {package}")


def _ext4_view() -> Check:
    purpose = "mounts it without the host's kernel parsing it"
    built = os.access(ext4_view.PROGRAM, os.X_OK)
    detail = str(ext4_view.PROGRAM) if built else "make (installs what it needs)"
    return Check(built, "ext4-view", purpose, detail)


def _machine() -> Check:
    machine = platform.machine()
    ok = machine == "x86_64"
    return Check(ok, "x86-64", "system call numbers of the shadow", machine)


def _fuse() -> Check:
    device = Path("/dev/fuse")
    purpose = "mounts of the private copy"
    if not device.exists():
        return Check(ok=False, name="/dev/fuse", purpose=purpose, detail="modprobe fuse")
    if not os.access(device, os.R_OK | os.W_OK):
        return Check(ok=False, name="/dev/fuse", purpose=purpose, detail="chmod 0666 /dev/fuse")
    return Check(ok=True, name="/dev/fuse", purpose=purpose, detail="open to this user")


def _namespaces() -> Check:
    limit = int(Path("/proc/sys/user/max_user_namespaces").read_text())
    switch = Path("/proc/sys/kernel/unprivileged_userns_clone")
    closed = os.geteuid() != 0 and switch.exists() and switch.read_text().strip() == "0"
    ok = limit > 0 and not closed
    detail = f"{limit} allowed" if ok else "sysctl kernel.unprivileged_userns_clone=1"
    return Check(ok, "user namespaces", "the guest's ids without rights on the host", detail)


def _overlayfs() -> Check:
    known = "\toverlay\n" in Path("/proc/filesystems").read_text()
    module = Path(f"/lib/modules/{platform.release()}/kernel/fs/overlayfs").exists()
    detail = "in the kernel" if known else "a module" if module else "modprobe overlay"
    return Check(known or module, "overlayfs", "keeps what the update changes apart", detail)


def _ids() -> Check:
    purpose = "the guest's users on the host"
    try:
        chosen = ids.choose()
    except OUassisterError as error:
        return Check(ok=False, name="subordinate ids", purpose=purpose, detail=error.hint)
    return Check(True, "subordinate ids", purpose, f"from {chosen.base_uid}")


def _groups() -> Check:
    """They are not required: other limits stand in for them."""
    found = ", ".join(f"{one.controller} (version {one.version})" for one in cgroups.find())
    lacking = "none may be made here; limits for each user of the guest stand in"
    purpose = "bounds what the guest's programs take"
    return Check(ok=True, name="control groups", purpose=purpose, detail=found or lacking)


def _libvirt() -> Check:
    """It is not required: VMs of plain QEMU do without."""
    purpose = "VMs that are libvirt domains"
    asks = libvirt_python.installed()
    if not asks:
        detail = "not installed (apt-get install python3-libvirt libvirt-clients); a vm.toml needs"
        return Check(ok=True, name="libvirt", purpose=purpose, detail=f"{detail} none")
    answering = [str(path) for path in _DAEMONS if _listens(path)]
    detail = f"{asks[0]}; " + (
        f"{answering[0]} answers" if answering else "no system daemon answers"
    )
    return Check(ok=True, name="libvirt", purpose=purpose, detail=detail)


def _listens(path: Path) -> bool:
    try:
        sockets.connect(path, timeout_s=1).close()
    except OSError:
        return False
    return True


def _free(folder: Path) -> Check:
    place = folder
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    purpose = "lists, archives, the union layer"
    return Check(free >= _MIN_FREE, "free space", purpose, f"{free >> 20} MiB in {folder}")
