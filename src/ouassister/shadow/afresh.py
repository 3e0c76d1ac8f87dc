"""Clear what programs of the guest left behind, so that the next begin as the first did.

Called in the supervisor, between programs: nothing of the guest runs then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.shadow import raw, sandbox
from ouassister.shadow.procfs import VALUES
from ouassister.shadow.servicemanager import RECORDS
from ouassister.shadow.syscalls.records import SYSCALLS
from ouassister.shadow.sysfs.record import ATTRIBUTES

if TYPE_CHECKING:
    from collections.abc import Iterable

_RECORDS: Final = (RECORDS, VALUES, ATTRIBUTES, SYSCALLS)


def clear(volumes: Iterable[int]) -> None:
    """Take the unions apart and empty their layers; unmount each tmpfs; forget records.

    Args:
        volumes: Those that have a union; they are mounted again by the caller.

    Raises:
        OSError: Something is still in use, or cannot be removed.
    """
    for number in volumes:
        raw.umount(sandbox.merged(number))
        for name in (sandbox.upper(number), sandbox.overlay_work(number)):
            shutil.rmtree(name)
            Path(name).mkdir()
    for mounted in Path(sandbox.TMPFS).iterdir():
        raw.umount(os.fspath(mounted))
        mounted.rmdir()
    for record in _RECORDS:
        with contextlib.suppress(FileNotFoundError):
            Path(sandbox.WORK, "output", record).unlink()
