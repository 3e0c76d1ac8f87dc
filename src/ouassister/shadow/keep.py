"""A second name for archives that the guest's updater may remove once it has installed them.

Some guests do (``DPkg::Post-Invoke`` of images for containers). Called in the sandbox, between
programs; a script may have written to an archive, so each is verified again before it is used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ouassister.shadow import sandbox

_ARCHIVES: Final = Path(sandbox.CACHE, "apt", "archives")
_KEPT: Final = Path(sandbox.CACHE, sandbox.KEPT)  # on the same mount, where no program reaches it


def keep(names: list[str]) -> list[str]:
    """Give these archives a second name, and forget those of earlier runs.

    Returns:
        Those that are not there.
    """
    for path in _KEPT.iterdir():
        path.unlink()
    return _link(names, _ARCHIVES, _KEPT)


def restore(names: list[str]) -> list[str]:
    """Give archives their first name again where it is gone.

    Returns:
        Those that nobody kept.
    """
    return _link(names, _KEPT, _ARCHIVES)


def _link(names: list[str], source: Path, target: Path) -> list[str]:
    lost = []
    for name in names:
        if os.path.lexists(target / name):
            continue
        try:
            os.link(source / name, target / name, follow_symlinks=False)
        except FileNotFoundError:
            lost.append(name)
    return lost
