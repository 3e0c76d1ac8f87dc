"""A second name for archives that the guest's updater may remove once it has installed them.

Some guests do (``DPkg::Post-Invoke`` of images for containers). Called in the sandbox, between
programs; a script may have written to an archive, so each is verified again before it is used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from ouassister.shadow import sandbox

ARCHIVES: Final = f"{sandbox.CACHE}/apt/archives"
KEPT: Final = f"{sandbox.WORK}/kept"  # no program of the guest reaches it


def link(argument: dict[str, Any]) -> list[str]:
    """Give files of a folder a second name in another one.

    Args:
        argument: ``source`` and ``target``: folders; ``names``: of the files.

    Returns:
        Names that are not in the source.
    """
    source, target = Path(argument["source"]), Path(argument["target"])
    target.mkdir(exist_ok=True)
    lost = []
    for name in argument["names"]:
        if os.path.lexists(target / name):
            continue
        try:
            os.link(source / name, target / name, follow_symlinks=False)
        except FileNotFoundError:
            lost.append(name)
    return lost
