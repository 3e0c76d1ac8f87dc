"""What the guest's administrator has told needrestart(1) to leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.errors import UpdaterError
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.shadow.session import Shadow

_SCRIPT: Final = Path(__file__).parent / "needrestart.pl"
_NAME: Final = "needrestart.pl"
_OUTPUT: Final = "needrestart"
_MAX_BYTES: Final = 1 << 20
_MAX_RULE: Final = 200
_TIMEOUT_S: Final = 60.0


def excluded(shadow: Shadow, units: Iterable[str]) -> dict[str, str]:
    """Ask the guest's own configuration, which is a Perl program, in the shadow.

    Returns:
        Units that are not to be restarted, and the rule that says so.

    Raises:
        UpdaterError: The configuration cannot be read: nothing is known of what it excludes.
    """
    asked = [*units]
    if not asked:
        return {}
    shadow.provide(_NAME, _SCRIPT.read_bytes())
    command = ["perl", f"/run/ouassister/bin/{_NAME}", *asked]
    status = shadow.run(command, package_cache=False, output=_OUTPUT, timeout_s=_TIMEOUT_S)
    path = shadow.output_path(_OUTPUT)
    with path.open("rb") as file:
        raw = file.read(_MAX_BYTES)
    if status != 0:
        words = to_text(raw.strip().splitlines()[-1][:_MAX_RULE]) if raw.strip() else "no message"
        raise UpdaterError(f"the guest's configuration of needrestart cannot be read: {words}")
    return parse(raw, asked)


def parse(raw: bytes, asked: Iterable[str]) -> dict[str, str]:
    """Read what the script printed; what was not asked for is dropped."""
    names = set(asked)
    found: dict[str, str] = {}
    for line in raw.splitlines():
        unit, _, rule = line.partition(b"\t")
        name = unit.decode("ascii", "replace")
        if name in names:
            found[name] = to_text(rule[:_MAX_RULE])
    return found
