"""Network devices of init's namespace, as ``ip address`` shows them.

Source: Linux v6.1 ``include/linux/netdevice.h`` (``__LINK_STATE_NOCARRIER``), ``net/core/dev.c``
(``register_netdevice``: ``perm_addr`` is set where the address is the hardware's own),
``include/net/net_namespace.h`` (``struct net``),
``include/linux/inetdevice.h`` (``struct in_device``, ``struct in_ifaddr``),
``include/net/if_inet6.h`` (``struct inet6_dev``, ``struct inet6_ifaddr``), ``net/core/net-sysfs.c``
(``operstates``).
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import NetworkDevice, VirtAddr
from ouassister.kernel import walk
from ouassister.kernel.fields import Fields, offset, read_string, variable
from ouassister.kernel.program import guest_reads
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.program import Kernel

_MAX_DEVICES: Final = 1 << 14
_MAX_ADDRESSES: Final = 1 << 16  # of all devices
_MAX_HARDWARE_ADDRESS: Final = 32  # MAX_ADDR_LEN
_NO_CARRIER: Final = 1 << 2  # of net_device.state
_OPERSTATES: Final = (
    "unknown", "notpresent", "down", "lowerlayerdown", "testing", "dormant", "up",
)  # fmt: skip


class NetworkDevices:
    """The devices of one guest.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._left = _MAX_ADDRESSES
        self._device = Fields(kernel, "struct net_device", "name", "ifindex", "flags", "mtu",
                              "operstate", "addr_len", "dev_addr", "ip_ptr", "rtnl_link_ops",
                              "perm_addr", "state")  # fmt: skip
        self._place = offset(kernel, "struct net_device", "dev_list")
        self._kind = Fields(kernel, "struct rtnl_link_ops", "kind")
        self._in_device = Fields(kernel, "struct in_device", "ifa_list")
        self._address = Fields(kernel, "struct in_ifaddr", "ifa_next", "ifa_local", "ifa_prefixlen")

    def read(self) -> tuple[NetworkDevice, ...]:
        """Describe each device, by index.

        Raises:
            CorruptGuestError: A list does not end, or a length is absurd.
        """
        with guest_reads("reading the network devices"):
            head = variable(self._kernel, "init_net") + offset(
                self._kernel, "struct net", "dev_base_head"
            )
            found = [
                self._describe(node - self._place)
                for node in walk.list_nodes(self._kernel, head, _MAX_DEVICES)
            ]
        return tuple(sorted(found, key=lambda device: device.index))

    def _describe(self, device: int) -> NetworkDevice:
        kernel = self._kernel
        (name, index, flags, mtu, state, length, hardware, ip, link, permanent, bits) = (
            self._device.read(device)
        )
        if length > _MAX_HARDWARE_ADDRESS:
            raise CorruptGuestError(f"a network device has an address of {length} bytes")
        kind = self._kind.read(link)[0] if link else 0
        raw = kernel.virtual.read(VirtAddr(hardware), length) if hardware and length else b""
        return NetworkDevice(
            name=to_text(name.partition(b"\0")[0]),
            index=index,
            kind=to_text(read_string(kernel, kind, 64)) if kind else "",
            flags=flags & 0xFFFF_FFFF,
            mtu=mtu,
            operstate=_OPERSTATES[state] if state < len(_OPERSTATES) else str(state),
            hardware_address=raw.hex(":"),
            addresses=(*self._ipv4(ip), *self._ipv6(device)),
            permanent_address=permanent[:length].hex(":") if any(permanent) else "",
            carrier=not bits & _NO_CARRIER,
        )

    def _ipv4(self, device: int) -> Iterator[str]:
        address = self._in_device.read(device)[0] if device else 0
        while address:
            self._left -= 1
            if self._left < 0:
                raise CorruptGuestError(
                    f"network devices have more than {_MAX_ADDRESSES} addresses"
                )
            address, local, prefix = self._address.read(address)
            yield f"{socket.inet_ntop(socket.AF_INET, local.to_bytes(4, 'little'))}/{prefix}"

    def _ipv6(self, device: int) -> Iterator[str]:
        kernel = self._kernel
        if kernel.types.struct("inet6_dev") is None:  # a module, and not loaded
            return
        (inet6,) = Fields(kernel, "struct net_device", "ip6_ptr").read(device)
        if not inet6:
            return
        fields = Fields(kernel, "struct inet6_ifaddr", "addr.in6_u.u6_addr8", "prefix_len")
        node_at = offset(kernel, "struct inet6_ifaddr", "if_list")
        head = inet6 + offset(kernel, "struct inet6_dev", "addr_list")
        for node in walk.list_nodes(kernel, head, self._left):
            self._left -= 1
            address, prefix = fields.read(node - node_at)
            yield f"{socket.inet_ntop(socket.AF_INET6, address)}/{prefix}"
