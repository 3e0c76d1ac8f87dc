"""uname(2) from the guest's ``struct new_utsname``, and the names that a program sets.

Source: Linux v6.1 kernel/sys.c (``newuname``, ``override_release``, ``override_architecture``),
include/uapi/linux/{utsname,personality}.h.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
from typing import TYPE_CHECKING, Final

from ouassister.shadow.syscalls import caller
from ouassister.shadow.syscalls.notify import Call, Result, read_memory, write_memory
from ouassister.shadow.syscalls.records import RECORDED

if TYPE_CHECKING:
    from ouassister.model import Uts
    from ouassister.shadow.syscalls.context import Answerer, Context

_FIELD: Final = 65  # __NEW_UTS_LEN + 1
_PER_MASK, _PER_LINUX32 = 0xFF, 0x08


def pack_utsname(uts: Uts) -> bytes:
    """Lay the six fields out as the kernel does: 65 bytes each, zero-terminated."""
    fields = (uts.sysname, uts.nodename, uts.release, uts.version, uts.machine, uts.domainname)
    return b"".join(
        field.encode("utf-8", "surrogateescape")[: _FIELD - 1].ljust(_FIELD, b"\0")
        for field in fields
    )


def _uname(context: Context, listener: int, call: Call) -> Result:
    """The structure is the same in both ABIs; the machine depends on the caller's personality."""
    personality = int(caller.read_small(call, "personality"), 16)
    narrow = personality & _PER_MASK == _PER_LINUX32
    packed = _packed(context.facts.uts, context.nodename, context.domainname, narrow=narrow)
    write_memory(listener, call, call.args[0], packed)
    return 0


@functools.lru_cache(maxsize=4)
def _packed(uts: Uts, nodename: bytes, domainname: bytes, *, narrow: bool) -> bytes:
    told = dataclasses.replace(
        uts,
        nodename=nodename.decode("utf-8", "surrogateescape"),
        domainname=domainname.decode("utf-8", "surrogateescape"),
    )
    return pack_utsname(dataclasses.replace(told, machine="i686") if narrow else told)


def _sethostname(context: Context, listener: int, call: Call) -> Result:
    context.nodename = _name(context, listener, call, "sethostname")
    return 0


def _setdomainname(context: Context, listener: int, call: Call) -> Result:
    context.domainname = _name(context, listener, call, "setdomainname")
    return 0


def _name(context: Context, listener: int, call: Call, what: str) -> bytes:
    caller.require(listener, call, caller.CAP_SYS_ADMIN)
    size = call.signed(1)
    if not 0 <= size < _FIELD:
        raise OSError(errno.EINVAL, "too long a name")
    name = read_memory(listener, call, call.args[0], size)
    context.journal.note(call, what, RECORDED, [name])
    return name.partition(b"\0")[0]


ANSWERERS: Final[dict[str, Answerer]] = {
    "uname": _uname,
    "sethostname": _sethostname,
    "setdomainname": _setdomainname,
}
