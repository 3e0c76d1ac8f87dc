"""Sockets that no namespace holds, and the one entry for sockets that 32-bit C libraries have.

The arguments of the latter lie in memory: the filter cannot see the family, and the kernel must not
read it a second time. The socket is made here, in the caller's network namespace, and handed over.

Source: Linux v6.1 net/socket.c (``socketcall``), include/uapi/linux/net.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from ouassister.shadow import raw
from ouassister.shadow.syscalls import caller
from ouassister.shadow.syscalls.notify import Call, Descriptor, Pass, Result, check, read_memory
from ouassister.shadow.syscalls.records import DENIED
from ouassister.shadow.syscalls.table import ROWS, Bits

if TYPE_CHECKING:
    from ouassister.shadow.syscalls.context import Answerer, Context

_SYS_SOCKET: Final = 1
_TYPE: Final = 0xF
_NETLINK_SOCK_DIAG: Final = 4  # include/uapi/linux/netlink.h
_DENIED_FAMILIES: Final = frozenset(
    one.low for one in ROWS["socket"].when if isinstance(one, Bits) and one.arg == 0
)
_PRIVILEGED_TYPES: Final = frozenset((socket.SOCK_RAW, 10))  # 10: SOCK_PACKET


def _socketcall(context: Context, listener: int, call: Call) -> Result:
    if call.unsigned(0) != _SYS_SOCKET:
        return Pass.CONTINUE
    family, kind, protocol = struct.unpack("<iii", read_memory(listener, call, call.args[1], 12))
    _refuse(context, call, family, protocol)
    if kind & _TYPE in _PRIVILEGED_TYPES:
        caller.require(listener, call, caller.CAP_NET_RAW)
    namespace = os.open(f"/proc/{call.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        check(listener, call)
        # The thread takes the namespace with it when it ends.
        with ThreadPoolExecutor(1) as thread:
            made = thread.submit(_make, namespace, family, kind, protocol).result()
    finally:
        os.close(namespace)
    return Descriptor(made, close_on_exec=bool(kind & socket.SOCK_CLOEXEC))


def _socket(context: Context, _listener: int, call: Call) -> Result:
    _refuse(context, call, call.signed(0), call.signed(2))
    return Pass.CONTINUE


def _refuse(context: Context, call: Call, family: int, protocol: int) -> None:
    if family in _DENIED_FAMILIES:
        context.journal.note(call, "socket", DENIED, [family])
        raise OSError(errno.EAFNOSUPPORT, "in no network namespace")
    if (family, protocol) == (socket.AF_NETLINK, _NETLINK_SOCK_DIAG):
        raise OSError(errno.EPROTONOSUPPORT, "tells the shadow's sockets, not the guest's")


def _make(namespace: int, family: int, kind: int, protocol: int) -> int:
    raw.setns(namespace, raw.CLONE_NEWNET)
    try:
        return socket.socket(family, kind, protocol).detach()
    except OverflowError as error:
        raise OSError(errno.EINVAL, "bad arguments") from error


ANSWERERS: Final[dict[str, Answerer]] = {"socket": _socket, "socketcall": _socketcall}
