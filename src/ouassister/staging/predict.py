"""A guess at what will be staged, by what is known without running anything. It decides nothing.

Two things hint at it: a process of a package that changes holds files open for writing, which the
new version may convert; and the same version had to be staged before, for this VM or another one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from ouassister.model import Mode, PackageMode
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ouassister.model import PackageChange
    from ouassister.staging.held import HeldFile

STAGED: Final = "staged"  # the step of a VM's history
# Logs, and what is in memory alone: every daemon holds some, and updates do not write there.
_USUAL: Final = (b"/var/log/", b"/run/", b"/dev/", b"/proc/", b"/sys/", b"/tmp/", b"/var/tmp/",
                 b"/memfd:")  # fmt: skip
_MAX_REASON: Final = 500


def remember(change: PackageChange, reason: str) -> str:
    """What the history keeps of a staged package."""
    return json.dumps([change.name, change.architecture, change.new, reason[:_MAX_REASON]])


def recall(history: Iterable[tuple[str, str]]) -> dict[tuple[str, str, str], str]:
    """Read the history: VM and what `remember` made, oldest first.

    Returns:
        For name, architecture and version of a package: the VM and the reason, of the last time.
    """
    known: dict[tuple[str, str, str], str] = {}
    for vm, detail in history:
        try:
            name, architecture, version, reason = json.loads(detail)
        except ValueError:
            continue  # another version of ouassister wrote it; it is a hint, and no more
        known[str(name), str(architecture), str(version)] = f"{vm}: {reason}"
    return known


def suspects(held: Iterable[HeldFile]) -> tuple[HeldFile, ...]:
    """Files that an update may want to write, of those that are held open for writing."""
    return tuple(file for file in held if file.program and not file.path.startswith(_USUAL))


def predict(
    changes: Iterable[PackageChange],
    held: Iterable[HeldFile],
    owners: Mapping[bytes, tuple[str, ...]],
    before: Mapping[tuple[str, str, str], str],
) -> tuple[PackageMode, ...]:
    """Name the changes that will perhaps be staged.

    Args:
        changes: The plan's.
        held: See `suspects`.
        owners: Packages of what `HeldFile.known_by` names.
        before: See `recall`.
    """
    holds: dict[str, HeldFile] = {}
    for file in held:
        for path in file.known_by:
            for name in owners.get(path, ()):
                holds.setdefault(name, file)
    found = []
    for change in changes:
        base = (change.name, change.architecture)
        if (again := before.get((*base, change.new))) is not None:
            found.append(PackageMode(*base, Mode.STAGED, f"it was staged for {again}"))
        elif change.name in holds and change.old:
            file = holds[change.name]
            why = f"{to_text(file.comm)} (pid {file.pid}) holds {to_text(file.path)} open"
            found.append(PackageMode(*base, Mode.STAGED, f"{why} for writing"))
    return tuple(found)
