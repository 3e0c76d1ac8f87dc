"""Does our own helper run on its port? By its process in memory, and its files.

Source: guest/port.c; provider/ouassister-port.service.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.provider.helper import PROGRAM, UNIT
from ouassister.provider.port import PROTOCOL_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.model import GuestView, Task

UNITS: Final = b"/etc/systemd/system"
WANTS: Final = UNITS + rb"/dev-virtio\x2dports-org.ouassister.0.device.wants"
_COMM: Final = PROGRAM.encode()  # all 15 bytes that a task's name has room for
_PORT: Final = b"/dev/virtio-ports/org.ouassister.0"
_DEVICE: Final = b"/dev/vport"
_HINT: Final = "'ouassister helper' writes what is to be installed"


def program(view: GuestView) -> bytes | None:
    """Where the program lies that the helper runs; None when none runs."""
    return next((task.exe for task in _helpers(view)), None)


def problem(
    view: GuestView, content: bytes | None, units: Iterable[str], wanted: Iterable[str]
) -> str:
    """Why the helper cannot be used; "" when nothing speaks against it.

    Args:
        view: With open files.
        content: The program's file; None where it is not to be read.
        units: Names in `UNITS`.
        wanted: Names in `WANTS`.
    """
    helpers = _helpers(view)
    if not helpers and UNIT not in units:
        return f"the guest has no {UNIT}: {_HINT}"
    if not helpers and UNIT not in wanted:
        return f"{UNIT} is not enabled in the guest, and did not run when it fell asleep"
    if not helpers:
        return "no ouassister-port ran when the guest fell asleep"
    if view.files is None:
        return "memory does not tell who has the helper's port open"
    pids = {task.pid for task in helpers if _PORT in task.cmdline and task.uid == 0}
    held = (file for one in view.files if one.pid in pids for file in one.files)
    if not any(file.path.startswith(_DEVICE) for file in held):
        return f"no ouassister-port of root had {_PORT.decode()} open"
    if content is not None and PROTOCOL_NAME not in content:
        return f"the guest's ouassister-port is of another version: {_HINT}"
    return ""


def _helpers(view: GuestView) -> list[Task]:
    return [task for task in view.tasks if task.comm == _COMM and not task.kernel_thread]
