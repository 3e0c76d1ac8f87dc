"""Attributes of network interfaces.

Source: Linux v6.1 ``net/core/net-sysfs.c`` (``net_class_attrs``), ``include/linux/netdevice.h``
(``enum netdev_state_t``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.kernel.fields import Fields, offset
from ouassister.model import VirtAddr
from ouassister.shadow.sysfs.look import Structure, UntoldError, line, number

if TYPE_CHECKING:
    from ouassister.shadow.sysfs.look import Look, Values

_STATES: Final = (
    b"unknown", b"notpresent", b"down", b"lowerlayerdown", b"testing", b"dormant", b"up",
)  # fmt: skip
_START, _NO_CARRIER, _DORMANT, _TESTING = 0, 2, 4, 5
_MAX_ADDRESS: Final = 32
_PLAIN: Final = (
    "type", "addr_len", "dev_port", "ifindex", "mtu", "tx_queue_len", "addr_assign_type",
    "link_mode", "gro_flush_timeout",
)  # fmt: skip
_MEMBERS: Final = (
    *_PLAIN, "name", "flags", "state", "operstate", "dev_id", "dev_addr", "broadcast", "group",
    "name_assign_type", "carrier_up_count.counter", "carrier_down_count.counter", "netdev_ops",
    "proto_down", "ifalias",
)  # fmt: skip


class Networks:
    """Renders the folders of interfaces.

    Args:
        look: The tree.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        kernel = look.kernel
        self._device = Structure(kernel, "struct net_device", *_MEMBERS)
        self._at = offset(kernel, "struct net_device", "dev")
        self._operations = Fields(kernel, "struct net_device_ops", "ndo_get_iflink")

    def values(self, folder: int) -> Values:
        """Read an interface."""
        return self._device.read(self._look.device(folder) - self._at)

    def render(self, folder: int) -> None:
        """Fill the folder of an interface."""
        one = self.values(folder)
        told: dict[bytes, bytes] = {
            name.encode(): number(one[name]) for name in _PLAIN if name in one
        }
        told[b"flags"] = b"0x%x\n" % one["flags"]
        told[b"dev_id"] = b"0x%x\n" % one["dev_id"]
        told[b"netdev_group"] = number(one["group"])
        if "proto_down" in one:
            told[b"proto_down"] = number(one["proto_down"])
        told[b"address"] = line(self._address(one["dev_addr"], one["addr_len"]).hex(":").encode())
        told[b"broadcast"] = line(
            one["broadcast"][: min(one["addr_len"], _MAX_ADDRESS)].hex(":").encode()
        )
        if one["name_assign_type"]:  # otherwise reading it is an error
            told[b"name_assign_type"] = number(one["name_assign_type"])
        if not one["ifalias"]:
            told[b"ifalias"] = b""
        ups, downs = one["carrier_up_count.counter"], one["carrier_down_count.counter"]
        told[b"carrier_up_count"] = number(ups)
        told[b"carrier_down_count"] = number(downs)
        told[b"carrier_changes"] = number(ups + downs)
        if not self._operations.read(one["netdev_ops"])[0]:
            told[b"iflink"] = number(one["ifindex"])
        runs = one["state"] >> _START & 1
        state = one["operstate"]
        if runs:
            told[b"carrier"] = number(one["state"] >> _NO_CARRIER & 1 ^ 1)
            told[b"dormant"] = number(one["state"] >> _DORMANT & 1)
            told[b"testing"] = number(one["state"] >> _TESTING & 1)
        if state < len(_STATES):
            told[b"operstate"] = line(_STATES[state] if runs else b"down")
        for name, content in told.items():
            self._look.give(folder, name, content)

    def _address(self, where: int, length: int) -> bytes:
        if not where or length > _MAX_ADDRESS:
            raise UntoldError("an address")
        return self._look.kernel.virtual.read(VirtAddr(where), length)
