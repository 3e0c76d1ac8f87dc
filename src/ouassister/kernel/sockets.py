"""Sockets of init's network namespace that others can reach, as ``ss -lntup`` shows them.

Source: Linux v6.1 ``include/net/inet_hashtables.h`` (``struct inet_hashinfo``),
``include/net/sock.h`` (``struct sock_common``), ``include/net/udp.h`` (``struct udp_table``),
``include/net/af_unix.h``, ``net/unix/af_unix.c``. TCP listeners are in ``lhash2`` alone since
cae3873c5b3a ("net: inet: Retire port only listening_hash", v5.19), in ``listening_hash`` before.
Unix sockets are in a table of each namespace since cf2f225e2653 ("af_unix: Put a socket into a
per-netns hash table.", v6.0), in ``unix_socket_table`` before. A chain ends with zero or, in a
"nulls" list, with an odd value (``include/linux/list_nulls.h``).
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import Socket, Sockets, VirtAddr
from ouassister.kernel.fields import Fields, has_member, offset, read_word, variable
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.program import Kernel

_MAX_SOCKETS: Final = 1 << 20
_MAX_BUCKETS: Final = 1 << 22
_UNIX_BUCKETS: Final = 512  # 2 * UNIX_HASH_SIZE
_UNIX_PATH_MAX: Final = 108
_TCP_ESTABLISHED, _TCP_CLOSE, _TCP_LISTEN = 1, 7, 10
_AF_INET6: Final = 10
_SOCK_DGRAM: Final = 2
_UNIX_KINDS: Final = {1: "unix-stream", 2: "unix-dgram", 5: "unix-seqpacket"}


class SocketTables:
    """The socket tables of one kernel.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._net = variable(kernel, "init_net")
        self._left = _MAX_SOCKETS
        self._common = Fields(kernel, "struct sock_common", "skc_rcv_saddr", "skc_num",
                              "skc_family", "skc_state", "skc_net.net",
                              "skc_v6_rcv_saddr.in6_u.u6_addr8")  # fmt: skip
        self._sock = Fields(kernel, "struct sock", "sk_socket", "sk_uid.val", "sk_type")
        self._node = offset(kernel, "struct sock_common", "skc_node")
        self._inode = Fields(kernel, "struct inode", "i_ino")
        self._vfs_inode = offset(kernel, "struct socket_alloc", "vfs_inode") - offset(
            kernel, "struct socket_alloc", "socket"
        )

    def read(self) -> Sockets:
        """Describe listening TCP, bound UDP and named Unix sockets; count TCP connections.

        Raises:
            CorruptGuestError: A table is absurdly large, or a chain does not end.
        """
        with guest_reads("reading the tables of sockets"):
            established = 0
            for sock in self._tcp_connections():
                _, _, _, state, net, _ = self._common.read(sock)
                established += state == _TCP_ESTABLISHED and net == self._net
            bound = [
                *self._inet("tcp", self._tcp_listeners(), _TCP_LISTEN),
                *self._inet("udp", self._udp(), _TCP_CLOSE),
                *self._unix(),
            ]
        bound.sort(key=lambda one: (one.protocol, one.port, one.address, one.inode))
        return Sockets(tuple(bound), established)

    def _tcp_listeners(self) -> Iterator[int]:
        kernel, info = self._kernel, variable(self._kernel, "tcp_hashinfo")
        head = offset(kernel, "struct inet_listen_hashbucket", "nulls_head")
        size = kernel.type("struct inet_listen_hashbucket").size or 0
        if has_member(kernel, "struct inet_hashinfo", "listening_hash"):
            table = info + offset(kernel, "struct inet_hashinfo", "listening_hash")
            count = kernel.type("struct inet_hashinfo").member("listening_hash").type.length or 0
        else:
            table, mask = Fields(kernel, "struct inet_hashinfo", "lhash2", "lhash2_mask").read(info)
            count = mask + 1
        yield from self._chains(table, count, size, head)

    def _tcp_connections(self) -> Iterator[int]:
        info = Fields(self._kernel, "struct inet_hashinfo", "ehash", "ehash_mask")
        table, mask = info.read(variable(self._kernel, "tcp_hashinfo"))
        yield from self._chains(table, mask + 1, 8, 0)

    def _udp(self) -> Iterator[int]:
        kernel = self._kernel
        table, mask = Fields(kernel, "struct udp_table", "hash", "mask").read(
            variable(kernel, "udp_table")
        )
        size = kernel.type("struct udp_hslot").size or 0
        yield from self._chains(table, mask + 1, size, offset(kernel, "struct udp_hslot", "head"))

    def _chains(self, table: int, count: int, size: int, head: int) -> Iterator[int]:
        """Yield the sockets of a hash table: ``count`` buckets of ``size`` bytes."""
        if not 0 < count <= _MAX_BUCKETS or size < head + 8:
            raise CorruptGuestError(f"a table of sockets has {count} buckets of {size} bytes")
        raw = self._kernel.virtual.read(VirtAddr(table), count * size)
        for (first,) in struct.iter_unpack(f"<{head}xQ{size - head - 8}x", raw):
            node = first
            while node and not node & 1:
                self._left -= 1
                if self._left < 0:
                    raise CorruptGuestError(f"the guest has more than {_MAX_SOCKETS} sockets")
                yield node - self._node
                node = read_word(self._kernel, node)

    def _inet(self, protocol: str, sockets: Iterator[int], state: int) -> Iterator[Socket]:
        for sock in sockets:
            address, port, family, current, net, address6 = self._common.read(sock)
            if net != self._net or current != state:
                continue
            if family == _AF_INET6:
                name = socket.inet_ntop(socket.AF_INET6, address6)
            else:
                name = socket.inet_ntop(socket.AF_INET, address.to_bytes(4, "little"))
            kind = protocol + "6" * (family == _AF_INET6)
            inode, uid, _ = self._owner(sock)
            yield Socket(kind, name.encode(), port, protocol == "tcp", uid, inode)

    def _unix(self) -> Iterator[Socket]:
        kernel = self._kernel
        if has_member(kernel, "struct netns_unix", "table"):
            table = read_word(kernel, self._net + offset(kernel, "struct net", "unx.table.buckets"))
        else:
            table = variable(kernel, "unix_socket_table")
        address_of = Fields(kernel, "struct unix_sock", "addr")
        length_of = Fields(kernel, "struct unix_address", "len")
        name_at = offset(kernel, "struct unix_address", "name")
        for sock in self._chains(table, _UNIX_BUCKETS, 8, 0):
            (address,) = address_of.read(sock)
            _, _, _, state, net, _ = self._common.read(sock)
            if not address or net != self._net:
                continue
            length = length_of.read(address)[0] - 2  # sun_family
            if not 0 <= length <= _UNIX_PATH_MAX + 1:
                raise CorruptGuestError(f"a Unix socket has a name of {length} bytes")
            name = kernel.virtual.read(VirtAddr(address + name_at + 2), length)
            name = b"@" + name[1:] if name[:1] == b"\0" else name.partition(b"\0")[0]
            inode, uid, kind = self._owner(sock)
            if name and (state == _TCP_LISTEN or kind == _SOCK_DGRAM):
                yield Socket(
                    _UNIX_KINDS.get(kind, f"unix-{kind}"), name, 0, state == _TCP_LISTEN, uid, inode
                )

    def _owner(self, sock: int) -> tuple[int, int, int]:
        holder, uid, kind = self._sock.read(sock)
        inode = self._inode.read(holder + self._vfs_inode)[0] if holder else 0
        return inode, uid, kind
