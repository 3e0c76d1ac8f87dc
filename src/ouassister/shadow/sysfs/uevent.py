"""The file ``uevent`` of a device: what udevadm(8) and sd-device read of it first.

It is made by functions of the device's bus, class and type. Where one of them is set and is none of
those known here, the file is not told.

Source: Linux v6.1 ``drivers/base/core.c`` (``dev_uevent``, ``device_get_devnode``),
``net/core/net-sysfs.c`` (``netdev_uevent``), ``block/genhd.c`` (``block_uevent``,
``block_devnode``), ``block/partitions/core.c`` (``part_uevent``), ``drivers/char/mem.c``
(``devlist``), ``drivers/char/misc.c`` (``misc_devnode``), ``drivers/tty/tty_io.c``
(``tty_devnode``).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from ouassister.kernel.fields import variable
from ouassister.kernel.rodata import has_text
from ouassister.shadow.sysfs.buses import NoDeviceError
from ouassister.shadow.sysfs.look import Structure, UntoldError
from ouassister.text import from_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ouassister.shadow.sysfs.block import Blocks
    from ouassister.shadow.sysfs.buses import Buses
    from ouassister.shadow.sysfs.inputs import Inputs
    from ouassister.shadow.sysfs.look import Look, Values
    from ouassister.shadow.sysfs.net import Networks

_MINOR_BITS: Final = 20
_ALIASED: Final = frozenset((b"virtio", b"platform", b"acpi", b"scsi"))
_NAME_ONLY: Final = frozenset((b"input", b"drm", b"sound", b"usbmisc", b"msr", b"cpuid"))
_FOR_ALL: Final = 0o666
_TERMINALS: Final = ((5, 0), (5, 2))  # /dev/tty and /dev/ptmx
_DEVICES: Final = 16  # of the memory driver, at most


class Uevents:
    """Renders ``uevent``.

    Args:
        look: The tree.
        buses: Names for modprobe.
        blocks: Disks and partitions.
        networks: Interfaces.
        inputs: Keyboards and their like.
        names: What the guest's devtmpfs calls a device, below /dev; by being a disk, and number.
    """

    def __init__(
        self,
        look: Look,
        buses: Buses,
        blocks: Blocks,
        networks: Networks,
        inputs: Inputs,
        names: Mapping[tuple[bool, int, int], bytes],
    ) -> None:
        self._look = look
        self._buses = buses
        self._blocks = blocks
        self._networks = networks
        self._inputs = inputs
        self._names = names
        kernel = look.kernel
        self._bus = Structure(kernel, "struct bus_type", "name", "uevent")
        self._class = Structure(kernel, "struct class", "name", "dev_uevent", "devnode")
        self._type = Structure(kernel, "struct device_type", "name", "uevent", "devnode")
        self._driver = Structure(kernel, "struct device_driver", "name")

    def text(self, folder: int, subsystem: bytes) -> bytes:
        """Return what the file says.

        Raises:
            UntoldError: A function that is not known here adds to it.
        """
        one = self._look.common(folder)
        bus = self._bus.read(one["bus"]) if one["bus"] else None
        group = self._class.read(one["class"]) if one["class"] else None
        kind = self._type.read(one["type"]) if one["type"] else None
        lines: list[bytes] = []
        if one["devt"]:
            lines += self._numbers(folder, one, group, kind)
        if kind and kind["name"]:
            lines.append(b"DEVTYPE=" + self._look.text(kind["name"]))
        if one["driver"]:
            driver = self._driver.read(one["driver"])
            lines.append(b"DRIVER=" + self._look.text(driver["name"]))
        if bus and bus["uevent"]:
            lines += self._of_bus(folder, subsystem, self._look.text(bus["name"]))
        if group and group["dev_uevent"]:
            lines += self._of_class(folder, subsystem)
        if kind and kind["uevent"]:
            lines += self._of_type(folder, subsystem)
        return b"".join(text + b"\n" for text in lines)

    def _numbers(
        self, folder: int, one: Values, group: Values | None, kind: Values | None
    ) -> list[bytes]:
        major, minor = one["devt"] >> _MINOR_BITS, one["devt"] & ((1 << _MINOR_BITS) - 1)
        name = self._look.text(group["name"]) if group else b""
        node = self._names.get((name == b"block", major, minor))
        if node is None:
            if (group and group["devnode"]) or (kind and kind["devnode"]):
                raise UntoldError("the name of its node")
            node = self._look.nodes[folder].name.replace(b"!", b"/")
        lines = [b"MAJOR=%d" % major, b"MINOR=%d" % minor, b"DEVNAME=" + node]
        mode = 0
        disk = self._blocks.device(folder) if kind and kind["devnode"] else None
        if kind and kind["devnode"] and not (disk and self._blocks.has_plain_node(disk)):
            raise UntoldError("the mode of its node")
        if group and group["devnode"]:
            mode = self._mode(name, one, major, minor)
        return [*lines, b"DEVMODE=0%o" % (mode & 0o777)] if mode else lines

    def _mode(self, name: bytes, one: Values, major: int, minor: int) -> int:
        if name == b"tty":
            return _FOR_ALL if (major, minor) in _TERMINALS else 0
        if name == b"misc":
            return int(self._misc.read(one["driver_data"])["mode"])
        if name == b"mem" and minor < _DEVICES:
            layout, start, size = self._memory
            return int(layout.read(start + minor * size)["mode"])
        if name in _NAME_ONLY:
            return 0
        raise UntoldError("the mode of its node")

    @functools.cached_property
    def _misc(self) -> Structure:
        return Structure(self._look.kernel, "struct miscdevice", "mode")

    @functools.cached_property
    def _memory(self) -> tuple[Structure, int, int]:
        kernel = self._look.kernel
        layout = Structure(kernel, "struct memdev", "mode")
        return layout, variable(kernel, "devlist"), kernel.type("struct memdev").size or 0

    def _of_bus(self, folder: int, subsystem: bytes, name: bytes) -> list[bytes]:
        if name == b"pci":
            return self._buses.pci_lines(folder)
        if name == b"cpu":  # whose line ends twice
            return [b"MODALIAS=" + self._buses.processor_alias, b""]
        if name in _ALIASED:
            try:
                return [b"MODALIAS=" + self._buses.alias(folder, subsystem)]
            except NoDeviceError:
                return []
        raise UntoldError("what its bus adds")

    def _of_class(self, folder: int, subsystem: bytes) -> list[bytes]:
        if subsystem == b"/class/net":
            one = self._networks.values(folder)
            name = one["name"].partition(b"\0")[0]
            return [b"INTERFACE=" + name, b"IFINDEX=%d" % one["ifindex"]]
        if subsystem == b"/class/block":
            device = self._blocks.device(folder)
            if device is not None:
                return [b"DISKSEQ=%d" % self._blocks.disk_sequence(device)]
        if subsystem == b"/class/input":
            return self._inputs.lines(folder)
        if subsystem == b"/class/dmi":
            return [b"MODALIAS=" + self._buses.alias(folder, subsystem)]
        raise UntoldError("what its class adds")

    def _of_type(self, folder: int, subsystem: bytes) -> list[bytes]:
        device = self._blocks.device(folder) if subsystem == b"/class/block" else None
        if device is None or not device.partition:
            raise UntoldError("what its type adds")
        lines = [b"PARTN=%d" % device.partition]
        if device.partition_label:
            lines.append(b"PARTNAME=" + from_text(device.partition_label))
        if device.partition_uuid and self._tells_uuid:
            lines.append(b"PARTUUID=" + from_text(device.partition_uuid))
        return lines

    @functools.cached_property
    def _tells_uuid(self) -> bool:
        """Whether ``part_uevent`` knows the words: 7.3 does, 6.12 does not, and no type changed."""
        return has_text(self._look.kernel, b"PARTUUID=%s")
