"""What an open socket is of: its address family, and the name of a Unix socket at its other end.

Source: Linux v6.1 ``include/net/sock.h`` (``SOCK_INODE``, ``struct sock_common``),
``include/linux/net.h`` (``struct socket``), ``include/net/af_unix.h`` (``struct unix_sock``),
``net/unix/af_unix.c``: an accepted socket has the address of the one that listens, and ``peer`` is
the other end of a connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import VirtAddr
from ouassister.kernel.fields import Fields, offset

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel

_AF_UNIX: Final = 1
NO_FAMILY: Final = -1
_UNIX_PATH_MAX: Final = 108


class SocketEnds:
    """Sockets of any family, by the inode of an open file.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._from_inode = offset(kernel, "struct socket_alloc", "socket") - offset(
            kernel, "struct socket_alloc", "vfs_inode"
        )
        self._socket = Fields(kernel, "struct socket", "sk")
        self._common = Fields(kernel, "struct sock_common", "skc_family")
        self._unix = Fields(kernel, "struct unix_sock", "addr", "peer")
        self._length = Fields(kernel, "struct unix_address", "len")
        self._name_at = offset(kernel, "struct unix_address", "name") + 2  # after the family

    def read(self, inode: int) -> tuple[int, bytes]:
        """Describe a socket.

        Args:
            inode: ``struct inode *`` of a file in sockfs, as no other is within a socket.

        Returns:
            Its family, -1 for one that is just made or taken apart; and the name at its other end.

        Raises:
            CorruptGuestError: A name is longer than any.
        """
        (sock,) = self._socket.read(inode + self._from_inode)
        if not sock:
            return NO_FAMILY, b""
        (family,) = self._common.read(sock)
        if family != _AF_UNIX:
            return family, b""
        _address, peer = self._unix.read(sock)
        return family, self._name(peer) if peer else b""

    def _name(self, sock: int) -> bytes:
        address, _peer = self._unix.read(sock)
        if not address:
            return b""
        length = self._length.read(address)[0] - 2
        if not 0 <= length <= _UNIX_PATH_MAX + 1:
            raise CorruptGuestError(f"a Unix socket has a name of {length} bytes")
        name = self._kernel.virtual.read(VirtAddr(address + self._name_at), length)
        return b"@" + name[1:] if name[:1] == b"\0" else name.partition(b"\0")[0]
