"""What the demo proves in the updated guest, each by the guest's own programs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.testing import guest_run, http_get

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.model import Changeset, GuestView
    from ouassister.provider.qemu import RunningVM

_STATUS: Final = b"/var/lib/dpkg/status"
_COMPILE: Final = (
    "cd /tmp && printf 'int main() { return 42; }\\n' >demo.c && bcc -ansi -c -o demo.o demo.c"
    " && objdump86 demo.o && test -s demo.o"
)


@dataclass(frozen=True, slots=True)
class Proof:
    """One statement and what was seen."""

    statement: str
    holds: bool
    seen: str


def prove(vm: RunningVM, view: GuestView, changeset: Changeset, package: str) -> tuple[Proof, ...]:
    """Ask the guest; its answers are compared with what its memory said before."""
    proofs = []
    if package == "bcc":
        compiled = guest_run(vm, _COMPILE, check=False)
        seen = compiled.stdout.decode("utf-8", "replace").strip().splitlines()[:1]
        proofs.append(Proof("bcc compiles a program", compiled.exit_status == 0, " ".join(seen)))
    for command in ("dpkg --audit", "dpkg --verify"):
        done = guest_run(vm, command, timeout_s=300, check=False)
        text = done.stdout.decode("utf-8", "replace").strip()
        clean = done.exit_status == 0 and not text
        proofs.append(Proof(f"{command} is clean", clean, text[:200] or "no output"))
    wanted = {entry.path: entry.sha256 for entry in changeset.entries}[_STATUS]
    database = guest_run(vm, ["cat", _STATUS.decode()]).stdout
    found = hashlib.sha256(database).hexdigest()
    proofs.append(
        Proof("the package database is the updated one", found == wanted, f"sha256 {found[:16]}")
    )
    page = http_get(vm, timeout_s=30)
    proofs.append(Proof("nginx answers", b"nginx" in page, f"{len(page)} bytes"))
    before = min(int(task.pid) for task in view.tasks if task.comm == b"nginx")
    pid = int(guest_run(vm, "cat /run/nginx.pid").stdout)
    proofs.append(Proof("nginx has its pid from before", pid == before, f"{before}, now {pid}"))
    boot = guest_run(vm, "cat /proc/sys/kernel/random/boot_id").stdout.decode().strip()
    proofs.append(Proof("it is the same boot", boot == view.boot_id, boot))
    return tuple(proofs)


def file_hashes(files: tuple[Path, ...]) -> dict[str, str]:
    """SHA-256 of each file, by name."""
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
