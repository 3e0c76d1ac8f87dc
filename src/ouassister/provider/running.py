"""Does the VM run? Told without a word to QEMU, and without what it takes to talk to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister.errors import RunningVMError
from ouassister.provider import sockets
from ouassister.state.running import writer_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.provider.disks import Disk
    from ouassister.provider.interface import Vm
    from ouassister.provider.vmtoml import VmConfig


def is_running(config: VmConfig) -> bool:
    """Tell whether this VM's QEMU listens, or a process has one of its disks open for writing."""
    try:
        sockets.connect(config.qmp, timeout_s=0).close()
    except TimeoutError:
        return True  # it listens, and serves others
    except OSError:
        return has_writer(config.disks)
    return True


def has_writer(disks: Iterable[Disk]) -> bool:
    """Tell whether some process has one of these disks open for writing."""
    return any(writer_of(disk.path) for disk in disks)


def refuse_running(vm: Vm) -> None:
    """Raise when the VM runs.

    Raises:
        RunningVMError: It does.
    """
    if vm.is_running():
        raise RunningVMError(f"{vm.name} is running: its disk belongs to it")
