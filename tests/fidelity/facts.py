"""What one of the twins says of itself, after its update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.view import manifest

from ouassister.testing import guest_run

if TYPE_CHECKING:
    from ouassister.provider.qemu import RunningVM

PROGRAM: Final = Path(__file__).parents[2] / "build" / "view" / "manifest"
_PLACE: Final = "/dev/shm/manifest"  # noqa: S108 - of the guest
_LIMIT_S: Final = 300.0

# Each is one table: lines that are compared as a set.
QUESTIONS: Final[dict[str, str]] = {
    "packages": "dpkg-query -W -f '${Package}:${Architecture} ${Version} ${Status}\\n'",
    "automatic": "apt-mark showauto",
    "verify": "dpkg --verify || :",
    "audit": "dpkg --audit",
    "alternatives": "update-alternatives --get-selections",
    "diversions": "dpkg-divert --list",
    "statoverrides": "dpkg-statoverride --list || :",
    "users": "getent passwd; getent group",
    "unit files": "systemctl list-unit-files --no-legend --no-pager | tr -s ' '",
    "active units": "systemctl list-units --no-legend --no-pager --plain --type=service"
    " --state=active,failed,activating | awk '{print $1, $3, $4}'",
    "failed units": "systemctl --failed --plain --no-legend --no-pager | awk '{print $1}'",
    "listening": "ss -Hltun | awk '{print $1, $5}'",
    "replaced files in use": "for p in /proc/[0-9]*; do grep -l ' /usr/.* (deleted)$' $p/maps"
    " >/dev/null 2>&1 && cat $p/comm; done | sort -u; :",
}


@dataclass(frozen=True)
class Facts:
    """Every path of the root file system, and the tables."""

    nodes: Mapping[str, manifest.Node]
    tables: Mapping[str, frozenset[str]]


def ask(vm: RunningVM) -> Facts:
    """Let a running guest tell."""
    vm.qga().write_file(_PLACE, PROGRAM.read_bytes())
    tables = {}
    for name, command in QUESTIONS.items():
        told = guest_run(vm, command, timeout_s=_LIMIT_S).stdout.decode(errors="backslashreplace")
        tables[name] = frozenset(line.strip() for line in told.splitlines() if line.strip())
    # A prefix that nothing has: files get a sum, since an emulated guest hashes 15 MB/s.
    script = f"chmod 755 {_PLACE}; {_PLACE} / ./none/"
    result = guest_run(vm, script, timeout_s=_LIMIT_S)
    assert not result.truncated
    return Facts(manifest.parse(result.stdout), tables)
