"""Subordinate ids: which host ids the guest's users become.

Nobody on the host has them, so a file or process of the guest has no rights here.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ouassister.errors import HostNotReadyError
from ouassister.shadow.keeper import IDS

_SUBUID: Final = Path("/etc/subuid")
_SUBGID: Final = Path("/etc/subgid")
# The range that systemd sets aside for containers starts here and ends at 1879048191
# (systemd docs/UIDS-GIDS.md); root takes the last full block of it.
_ROOT_BASE: Final = 1879048192 - IDS


@dataclass(frozen=True, slots=True)
class Ids:
    """The first of 65536 subordinate uids and gids; ``own_userns`` when not root."""

    base_uid: int
    base_gid: int
    own_userns: bool


def choose() -> Ids:
    """Root takes a fixed block that no system assigns; a user what /etc/subuid grants.

    Raises:
        HostNotReadyError: The user has no 65536 subordinate ids.
    """
    if os.geteuid() == 0:
        return Ids(_ROOT_BASE, _ROOT_BASE, own_userns=False)
    return Ids(_granted(_SUBUID), _granted(_SUBGID), own_userns=True)


def map_for_user(pid: int, ids: Ids) -> None:
    """Give the keeper's user namespace the user as 0 and the subordinate ids from 1 on.

    Raises:
        HostNotReadyError: newuidmap is missing or says no.
    """
    for tool, own, base in (
        ("newuidmap", os.getuid(), ids.base_uid),
        ("newgidmap", os.getgid(), ids.base_gid),
    ):
        argv = [tool, str(pid), "0", str(own), "1", "1", str(base), str(IDS)]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise HostNotReadyError(f"{tool} is not installed (package uidmap)") from error
        if done.returncode != 0:
            raise HostNotReadyError(f"{tool}: {done.stderr.strip()}")


def _granted(table: Path) -> int:
    user = pwd.getpwuid(os.getuid()).pw_name
    try:
        lines = table.read_text().splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        name, _, rest = line.partition(":")
        first, _, count = rest.partition(":")
        if name in (user, str(os.getuid())) and int(count) >= IDS:
            return int(first)
    raise HostNotReadyError(
        f"user {user} has no {IDS} subordinate ids in {table}",
        hint=f"as root: usermod --add-subuids 200000-265535 --add-subgids 200000-265535 {user}",
    )
