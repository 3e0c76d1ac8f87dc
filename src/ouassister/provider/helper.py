"""What is installed in a guest so that our helper serves its virtio port (provider/port.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ouassister.errors import HostNotReadyError

PROGRAM: Final = "ouassister-port"
UNIT: Final = "ouassister-port.service"
_HERE: Final = Path(__file__).parent
_BUILT: Final = _HERE.parent / "reflect" / "bin" / "port-x86_64"


def files() -> dict[str, bytes]:
    """The files, by their names; ``install.sh`` puts the others in their places.

    Raises:
        HostNotReadyError: The program is not built.
    """
    if not _BUILT.exists():
        raise HostNotReadyError(f"the helper {_BUILT} is not built", hint="run 'make applier'")
    return {
        PROGRAM: _BUILT.read_bytes(),
        UNIT: (_HERE / UNIT).read_bytes(),
        "install.sh": (_HERE / "install-port.sh").read_bytes(),
    }
