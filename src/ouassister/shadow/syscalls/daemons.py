"""Who is called by connect(2): a daemon of the sleeping guest answers nobody, and that is told.

A script that asks one and goes on without an answer would leave something else than in the running
guest. The call itself is the kernel's: who listens in the shadow (the stand-in, or what the script
itself has started) is reached, and nobody else. A daemon whose unit a script has stopped is asked
by none in the running guest either (`stopped`).

Source: Linux v6.1 net/unix/af_unix.c (``unix_seq_show``: ``__SO_ACCEPTCON``), net/ipv4/tcp_ipv4.c
(``get_tcp4_sock``: state 0A is TCP_LISTEN), include/uapi/linux/un.h, in.h, in6.h.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Final

from ouassister.shadow.syscalls.notify import Call, Pass, Result, check, read_memory
from ouassister.shadow.syscalls.records import FOREIGN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ouassister.shadow.syscalls.context import Answerer, Context

_ACCEPTS: Final = 1 << 16
_LISTEN: Final = "0A"
_TABLES: Final = ("tcp", "tcp6")
# The service manager's family: its stand-in answers for it, or its journal takes lines that nobody
# asks for; and what a name service asks at each look-up.
_USUAL: Final = (b"/run/systemd/", b"/run/dbus/system_bus_socket", b"/run/nscd/", b"/dev/log")
_DNS: Final = 53  # asked by every look-up of a name, and answered by no network either
_MAX_ADDRESS: Final = 128
_MAX_TABLE: Final = 16 << 20


def listeners(files: Mapping[bytes, bytes]) -> tuple[bytes, ...]:
    """Addresses at which the guest's processes listen: ``/path``, ``@name`` or ``tcp:80``.

    Args:
        files: Contents by path from the guest's /proc.
    """
    found = _unix(files.get(b"1/net/unix", b""))
    for table in _TABLES:
        found |= _tcp(files.get(b"1/net/" + table.encode(), b""))
    return tuple(sorted(found))


def _unix(table: bytes) -> set[bytes]:
    found = set()
    for line in table.splitlines()[1:]:
        words = line.split(None, 7)
        if len(words) == 8 and int(words[3], 16) & _ACCEPTS:
            found.add(_plain(words[7]))
    return found


def _tcp(table: bytes) -> set[bytes]:
    found = set()
    for line in table.decode("ascii", "replace").splitlines()[1:]:
        words = line.split()
        if len(words) > 3 and words[3] == _LISTEN:
            found.add(b"tcp:%d" % int(words[1].rpartition(":")[2], 16))
    return found


def _plain(path: bytes) -> bytes:
    return path.removeprefix(b"/var") if path.startswith(b"/var/run/") else path


def _connect(context: Context, listener: int, call: Call) -> Result:
    if not context.facts.listeners:
        return Pass.CONTINUE
    size = min(call.unsigned(2), _MAX_ADDRESS)
    target = _target(read_memory(listener, call, call.args[1], size))
    if target not in context.facts.listeners or target.startswith(_USUAL):
        return Pass.CONTINUE
    if target not in _own(listener, call) and not context.stopped.nobody_listens(target):
        context.journal.note(call, "connect", FOREIGN, [target])
    return Pass.CONTINUE


def _own(listener: int, call: Call) -> set[bytes]:
    """Where somebody listens in the caller's network namespace, which is the shadow's."""
    found: set[bytes] = set()
    for table in ("unix", *_TABLES):
        descriptor = os.open(f"/proc/{call.pid}/net/{table}", os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(_MAX_TABLE)
        found |= _unix(content) if table == "unix" else _tcp(content)
    check(listener, call)
    return found


def _target(address: bytes) -> bytes:
    """The address as `listeners` spells it; "" for one that is no daemon's of this machine."""
    if len(address) < 2:
        return b""
    (family,) = struct.unpack_from("<H", address)
    rest = address[2:]
    if family == socket.AF_UNIX and rest:
        if rest[:1] == b"\0":
            return b"@" + rest[1:].replace(b"\0", b"@")  # as unix_seq_show prints it
        return _plain(rest.partition(b"\0")[0])
    if family == socket.AF_INET and len(rest) >= 6 and rest[2] in (0, 127):
        return _port(rest)
    if family == socket.AF_INET6 and len(rest) >= 22:
        host = rest[6:22]
        mapped = host[:12] == b"\0" * 10 + b"\xff\xff" and host[12] == 127
        if mapped or host[:15] == b"\0" * 15:
            return _port(rest)
    return b""


def _port(rest: bytes) -> bytes:
    (port,) = struct.unpack_from(">H", rest)
    return b"" if port == _DNS else b"tcp:%d" % port


ANSWERERS: Final[dict[str, Answerer]] = {"connect": _connect}
