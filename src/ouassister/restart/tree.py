"""What the restart plan needs of the guest's tree after the update; called in the sandbox."""

from __future__ import annotations

import os
from typing import Any, Final

_IMAGE: Final = "vmlinuz-"
_MAX_NAMES: Final = 4096


def look(argument: dict[str, Any]) -> dict[str, Any]:
    """Look at the union of disk and update.

    Args:
        argument: ``boot``: where /boot is; ``needrestart``: where the configuration of
            needrestart(1) would be.

    Returns:
        ``kernels``: releases that have an image; ``needrestart``: whether it is configured.
    """
    return {
        "kernels": _kernels(argument["boot"]),
        "needrestart": os.path.lexists(argument["needrestart"]),
    }


def _kernels(boot: str) -> list[str]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        folder = os.open(boot, flags)
    except OSError:
        return []  # a guest that is booted with a kernel of its host has none
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MAX_NAMES), strict=False)]
    finally:
        os.close(folder)
    return sorted(
        name.removeprefix(_IMAGE)
        for name in names
        if name.startswith(_IMAGE) and name.isascii() and name.isprintable()
    )
