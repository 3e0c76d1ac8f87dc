"""Facts about the whole guest: boot id and processors.

Source: Linux v6.1 ``drivers/char/random.c`` (``sysctl_bootid``, ``proc_do_uuid``: printed
with ``%pU``, which is big-endian), ``kernel/cpu.c`` (``__cpu_online_mask``).
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel


def boot_id(kernel: Kernel) -> str:
    """Return ``/proc/sys/kernel/random/boot_id``.

    Raises:
        UnsupportedGuestError: The kernel does not tell, or nobody has asked since it booted
            (it is made up on the first read; systemd reads it early).
    """
    with guest_reads("reading the boot id"):
        raw = kernel.prog["sysctl_bootid"].to_bytes_()
    if not any(raw):
        raise UnsupportedGuestError("the guest has not made up its boot id yet")
    return str(uuid.UUID(bytes=raw))


def online_cpus(kernel: Kernel) -> int:
    """Return the number of online processors."""
    with guest_reads("counting processors"):
        count = int.from_bytes(kernel.prog["__cpu_online_mask"].to_bytes_(), "little").bit_count()
    if not count:
        raise CorruptGuestError("the guest has no processor online")
    return count
