"""Is there a place for a disk that is plugged in while the guest runs? By QEMU's command alone.

Source: QEMU v7.2.0 docs/pcie.txt (a root port takes one device; pcie.0 takes none while the guest
runs), hw/acpi/pcihp.c (pci.0 of an i440fx has a slot for each of its 32 device numbers).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ouassister.provider.cmdline import devices, is_scsi_bus, words

if TYPE_CHECKING:
    from collections.abc import Sequence

_PORTS: Final = frozenset(("pcie-root-port", "ioh3420", "xio3130-downstream"))
_Q35: Final = re.compile(r"(pc-)?q35(-[0-9.]+)?")
_PC: Final = re.compile(r"(pc|pc-i440fx(-[0-9.]+)?)")
_ROOT: Final = "pci.0"
_SLOTS: Final = 32


def lacking(command: Sequence[str], bus: str) -> str:
    """What the medium would miss; "" where nothing is known to be missing.

    Of another machine than ``pc`` and ``q35`` nothing is known: QEMU itself says it at the resume.

    Args:
        command: QEMU's.
        bus: Where the medium is plugged in; "" lets QEMU choose.
    """
    options = words(command)
    if bus and is_scsi_bus(command, bus):
        return ""
    machine = next(
        (values.get("type", "") for name, values in options if name in ("machine", "M")), "pc"
    )
    on_bus = [one for one in devices(options) if one.get("bus") == bus]
    if _Q35.fullmatch(machine):
        if bus in ("", "pcie.0"):
            return "a bus for the medium: pcie.0 of a q35 takes nothing while the guest runs"
        port = next((one for one in devices(options) if one.get("id") == bus), None)
        if port is None or port.get("driver") not in _PORTS:
            return f"a pcie-root-port with the id {bus!r}"
        if on_bus:
            return f"a free port: {bus!r} has the device {on_bus[0].get('id', 'without an id')!r}"
    elif _PC.fullmatch(machine) and bus in ("", _ROOT):
        taken = {_slot(one["addr"]) for one in devices(options) if _is_on_root(one)}
        # The host bridge and the chip with the ISA bridge have the first two.
        if len(taken - {0, 1}) >= _SLOTS - 2:
            return f"a free slot of {_ROOT}"
    return ""


def _is_on_root(device: dict[str, str]) -> bool:
    return "addr" in device and device.get("bus", _ROOT) == _ROOT


def _slot(address: str) -> int:
    """The number in ``SLOT[.FUNCTION]``: hexadecimal (hw/core/qdev-properties-system.c)."""
    try:
        return int(address.partition(".")[0], 16)
    except ValueError:
        return -1
