"""What the applier leaves for a boot, found and started as the guest's service manager would."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

CONTROL: Final = "etc/systemd/system.control"
UNIT: Final = f"{CONTROL}/ouassister-finish.service"
WANTED: Final = f"{CONTROL}/sysinit.target.wants/ouassister-finish.service"
_CONDITION: Final = re.compile(r"^ExecCondition=/bin/sh -c '(.*)'$", re.M)
_START: Final = re.compile(r"^ExecStart=/(\S+) finish /(\S+) --medium-sha256 ([0-9a-f]{64})$", re.M)


def is_left(root: Path) -> bool:
    """The service manager would start it."""
    return os.path.lexists(root / WANTED)


def starts(root: Path) -> bool:
    """The service manager would start it, and its condition holds."""
    if not is_left(root):
        return False
    try:
        text = ((root / WANTED).parent / (root / WANTED).readlink()).read_text()
    except FileNotFoundError:
        return False
    condition, start = _CONDITION.search(text), _START.search(text)
    if not condition or not start:  # a unit without a command is none
        assert not text, text
        return False
    script = condition[1].replace("  /", f"  {root}/")
    return subprocess.run(["/bin/sh", "-c", script], check=False).returncode == 0


def command(root: Path, program: Path | None = None) -> list[str]:
    """The command line of the unit, with nothing but what lies in the guest."""
    text = ((root / WANTED).parent / (root / WANTED).readlink()).read_text()
    match = _START.search(text)
    assert match, text
    words = [str(program or root / match[1]), "finish", str(root / match[2])]
    return [*words, "--medium-sha256", match[3], "--root", str(root)]


def assert_nothing_left(root: Path, why: object = "") -> None:
    """Neither unit nor programs."""
    assert not (root / CONTROL).exists(), why
    assert not list((root / "var/lib/ouassister").glob("boot-*")), why
