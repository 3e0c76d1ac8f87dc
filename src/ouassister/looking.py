"""A VM as it sleeps, looked at and nothing more: its disks are not read, nothing is bound to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister.errors import NotSuspendedError
from ouassister.kernel import introspect
from ouassister.memory import open_save
from ouassister.provider.running import refuse_running

if TYPE_CHECKING:
    from ouassister.guest_model import Subject
    from ouassister.model import GuestView
    from ouassister.provider.interface import Vm


def look_at(config: Vm, want: frozenset[Subject]) -> GuestView:
    """Read what the sleeping kernel knows; nothing is written.

    Args:
        config: The VM.
        want: What the view contains beside the basics.

    Raises:
        RunningVMError: It runs, or some process has its disk open for writing.
        NotSuspendedError: There is no save file.
        UnsupportedStateError: The save file is in no table.
        UnsupportedGuestError: The guest's kernel is in none.
        CorruptGuestError: Its memory contradicts itself.
    """
    refuse_running(config)
    if not config.save.exists():
        raise NotSuspendedError(f"{config.name} has no save file {config.save}")
    with open_save(config.save) as save:
        return introspect(save, want)
