"""What every provider offers: a VM that sleeps or runs, and one that was woken up behind its gate.

`ouassister.provider.vmtoml` describes VMs of plain QEMU, `ouassister.provider.libvirt` domains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ouassister.access import Access
    from ouassister.provider.channel import Channel
    from ouassister.provider.disks import Disk
    from ouassister.provider.links import Link
    from ouassister.provider.management import Management


class Running(Protocol):
    """A VM that runs, or is paused. Closing hangs up; the VM goes on."""

    def __enter__(self) -> Self:
        """Close at the end of the block."""

    def __exit__(self, *_error: object) -> None:
        """Close."""

    def reach(self, access: Access) -> None:
        """Say by which channel programs are run in the guest; else it is the guest agent.

        It says as well which links stay down when the gate opens.

        Raises:
            UsageError: The VM has none of that name.
        """

    def channel(self) -> Channel:
        """The way to run programs in the guest, opened once; before `cont`, to lose no time."""

    def runs(self) -> bool:
        """Tell whether the guest runs; it is paused otherwise."""

    def cont(self) -> None:
        """Let the guest run."""

    def set_links(self, *, up: bool) -> None:
        """Open or close every link of the gate."""

    def open_quarantine(self) -> None:
        """Open the links of the quarantine alone; the others are left as they are."""

    def attach_medium(self, path: Path, serial: str) -> None:
        """Plug a raw image in as a read-only disk; a paused guest sees it at `cont`."""

    def detach_medium(self, *, timeout_s: float = 30.0) -> None:
        """Unplug what `attach_medium` plugged in, if anything; the guest must run.

        Raises:
            DeadlineError: The guest did not let go of it.
        """

    def suspend(self) -> None:
        """Save the guest; on failure it runs on."""

    def kill(self) -> None:
        """End the VM as a power cut would."""


class Vm(Protocol):
    """One VM, as its owner describes it."""

    @property
    def name(self) -> str:
        """Printable, without ``/``."""

    @property
    def source(self) -> object:
        """Where the description lies; as a string it finds the VM again (`find.load`)."""

    @property
    def folder(self) -> Path:
        """A folder of the VM's own that stays reachable."""

    @property
    def save(self) -> Path:
        """The save file; it need not exist."""

    @property
    def formats(self) -> frozenset[str]:
        """Formats of save files that it is resumed from, by name (state/formats.py)."""

    @property
    def disks(self) -> tuple[Disk, ...]:
        """Every disk that holds what the guest may write to."""

    @property
    def host_kernel_mounts(self) -> bool:
        """This host's kernel may mount private copies of file systems."""

    @property
    def local_mirrors(self) -> tuple[tuple[str, int], ...]:
        """Package mirrors on this host that may be reached."""

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels that the description has, the preferred one first."""

    @property
    def carried(self) -> bool:
        """The change set is brought in by the channel: no disk is to be plugged in."""

    @property
    def management(self) -> Management | None:
        """The network that ssh needs behind the closed gate."""

    @property
    def quarantine(self) -> tuple[str, ...]:
        """Network devices whose links go up after a failure, when that is the policy."""

    @property
    def untold_links(self) -> tuple[Link, ...]:
        """Links of the gate of which the description does not say whether they were up."""

    @property
    def closed_by_gate(self) -> tuple[str, ...]:
        """Devices whose links a gate of ours had closed when it fell asleep, kept beside the VM."""

    def keep_closed(self, devices: Sequence[str]) -> None:
        """Keep that, as it was at another time."""

    def is_running(self) -> bool:
        """Tell whether it runs, or a process has one of its disks open for writing."""

    def watch(self) -> Callable[[], bool]:
        """Return what tells, when it is asked again and again, that somebody has started it."""

    def refuse_unresumable(self) -> None:
        """Raise when it is known that a change set could not be brought in at resume.

        Raises:
            UnsupportedGuestError: The VM has no place for the medium, for one.
        """

    def medium_place(self) -> Path | None:
        """A folder where QEMU may open the medium; None when it may anywhere."""

    def restore(self) -> Running:
        """Load the save file, paused, with every link down.

        When this raises, the VM sleeps as before.
        """

    def boot(self) -> Running:
        """Start it from its disks alone, paused, with every link down.

        When this raises, it does not run.
        """

    def attach(self) -> Running:
        """Take hold of the VM that runs.

        Raises:
            StateError: It does not.
        """

    def retire_save(self) -> None:
        """Put the save file out of the way: from the first instruction on it contradicts the disk.

        A VM restored from it again would write its stale caches over the disk.

        Raises:
            StateError: That is not possible.
        """
