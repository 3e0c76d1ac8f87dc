"""Files of /proc/net as Linux writes them; pure functions from records to bytes.

Rows end with the inode: the columns behind it (references, an address of the kernel, times of the
protocol) are not told by memory as we read it, and readers take them as optional (iproute2,
``tcp_show_line``). Of TCP the listening sockets are shown, of UDP and Unix the bound ones.

Source: Linux v6.1 ``net/ipv4/tcp_ipv4.c`` (``get_tcp4_sock``), ``net/ipv6/tcp_ipv6.c``
(``get_tcp6_sock``), ``net/ipv4/udp.c`` (``udp4_format_sock``), ``net/ipv6/datagram.c``,
``net/unix/af_unix.c`` (``unix_seq_show``).
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.guest_model import Socket

_TCP: Final = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout "
    "inode"
)
_UDP: Final = f" {_TCP} ref pointer drops"
_INET6: Final = (
    "  sl  local_address                         remote_address                        st "
    "tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"
)
_UNIX: Final = "Num       RefCount Protocol Flags    Type St Inode Path"
_UNIX_TYPES: Final = {"unix-stream": 1, "unix-dgram": 2, "unix-seqpacket": 5}
_SO_ACCEPTCON: Final = 0x10000
_LISTEN, _CLOSE = 10, 7  # TCP_LISTEN, TCP_CLOSE


def inet(protocol: str, sockets: Iterable[Socket]) -> bytes:
    """Render /proc/net/tcp, tcp6, udp or udp6."""
    header = {"tcp": f"{_TCP:<149s}", "udp": f"{_UDP:<127s}", "tcp6": _INET6}.get(
        protocol, f"{_INET6} ref pointer drops"
    )
    width = {"tcp": 149, "udp": 127}.get(protocol, 0)
    family = socket.AF_INET6 if protocol.endswith("6") else socket.AF_INET
    state = _LISTEN if protocol.startswith("tcp") else _CLOSE
    number = 4 if protocol.startswith("tcp") else 5
    lines = [header]
    ours = (one for one in sockets if one.protocol == protocol)
    for row, one in enumerate(ours):
        raw = socket.inet_pton(family, one.address.decode())
        local = "".join(f"{word:08X}" for (word,) in struct.iter_unpack("<I", raw))
        remote = "0" * len(local)
        line = (
            f"{row:{number}d}: {local}:{one.port:04X} {remote}:0000 {state:02X} "
            f"00000000:00000000 00:00000000 00000000 {one.uid:5d} {0:8d} {one.inode}"
        )
        lines.append(f"{line:<{width}s}")
    return "\n".join([*lines, ""]).encode()


def unix(sockets: Iterable[Socket]) -> bytes:
    """Render /proc/net/unix; the kernel's addresses and counts of references are zero."""
    lines = [_UNIX.encode()]
    for one in sockets:
        kind = _UNIX_TYPES.get(one.protocol)
        if kind is None:
            continue
        flags = _SO_ACCEPTCON if one.listening else 0
        head = f"{0:016x}: {0:08X} {0:08X} {flags:08X} {kind:04X} 01 {one.inode:5d} "
        lines.append(head.encode() + one.address.replace(b"\0", b"@"))
    return b"\n".join([*lines, b""])
