"""uname(2), answered with the guest's ``struct new_utsname``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister.shadow.syscalls.notify import Call, Handler, write_memory
from ouassister.shadow.syscalls.table import TABLE

if TYPE_CHECKING:
    from ouassister.model import Uts

_FIELD = 65  # __NEW_UTS_LEN + 1, include/uapi/linux/utsname.h


def pack_utsname(uts: Uts) -> bytes:
    """Lay the six fields out as the kernel does: 65 bytes each, zero-terminated."""
    fields = (uts.sysname, uts.nodename, uts.release, uts.version, uts.machine, uts.domainname)
    return b"".join(
        field.encode("utf-8", "surrogateescape")[: _FIELD - 1].ljust(_FIELD, b"\0")
        for field in fields
    )


def uname_handlers(uts: Uts) -> dict[tuple[bool, int], Handler]:
    """Handlers of uname for 64-bit and 32-bit callers; the structure is the same for both.

    A 32-bit caller under a 64-bit kernel sees machine ``i686`` only with a changed personality,
    so the guest's own machine string is right for both.
    """
    packed = pack_utsname(uts)

    def handle(listener: int, call: Call) -> int:
        write_memory(listener, call, call.args[0], packed)
        return 0

    (row,) = (row for row in TABLE if row.name == "uname")
    numbers = ((False, row.x86_64), (True, row.i386))
    return {(compat, number): handle for compat, number in numbers if number is not None}
