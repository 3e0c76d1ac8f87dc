"""Attributes of devices on a bus, and the names by which modprobe(8) finds their drivers.

Source: Linux v6.1 ``drivers/pci/pci-sysfs.c`` (``pci_dev_attrs``, ``resource_show``),
``drivers/pci/pci-driver.c`` (``pci_uevent``), ``drivers/virtio/virtio.c``,
``drivers/base/platform.c`` (``platform_uevent``), ``drivers/acpi/device_sysfs.c``
(``create_pnp_modalias``), ``drivers/firmware/dmi-id.c`` (``get_modalias``),
``drivers/scsi/scsi_sysfs.c`` (``scsi_bus_uevent``), ``drivers/base/cpu.c`` (``cpu_uevent``).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from ouassister.errors import UnsupportedGuestError
from ouassister.kernel import walk
from ouassister.kernel.cpuinfo import boot_features
from ouassister.kernel.fields import (
    Fields,
    has_member,
    labels,
    length_of,
    offset,
    read_bits,
    read_word,
    variable,
)
from ouassister.kernel.modules import module_types
from ouassister.kernel.modules import struct as module_struct
from ouassister.model import VirtAddr
from ouassister.shadow.sysfs.look import Structure, UntoldError, line, number

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.shadow.sysfs.look import Look, Values

_MAX_IDS: Final = 256
_MAX_FEATURES: Final = 64  # bytes
_MAX_TABLE: Final = 1 << 20
_RESOURCES: Final = 32  # at most
_OF_BRIDGES: Final = 4  # PCI_BRIDGE_RESOURCE_NUM: the last ones
_DEVICE_TREE: Final = b"PRP0001"  # ACPI_DT_NAMESPACE_HID
_PRODUCTS: Final = {  # the order is that of the name
    b"bvn": "BIOS_VENDOR", b"bvr": "BIOS_VERSION", b"bd": "BIOS_DATE", b"br": "BIOS_RELEASE",
    b"efr": "EC_FIRMWARE_RELEASE", b"svn": "SYS_VENDOR", b"pn": "PRODUCT_NAME",
    b"pvr": "PRODUCT_VERSION", b"rvn": "BOARD_VENDOR", b"rn": "BOARD_NAME", b"rvr": "BOARD_VERSION",
    b"cvn": "CHASSIS_VENDOR", b"ct": "CHASSIS_TYPE", b"cvr": "CHASSIS_VERSION",
    b"sku": "PRODUCT_SKU",
}  # fmt: skip


class NoDeviceError(UntoldError):
    """What is on the bus is no device, and has no driver of its kind."""


class Buses:
    """Renders the folders of devices on a bus.

    Args:
        look: The tree.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        self._render: dict[bytes, Callable[[int], None]] = {
            b"/bus/pci": self._pci,
            b"/bus/virtio": self._virtio,
            b"/bus/scsi": self._scsi,
            b"/bus/platform": self._platform_device,
        }

    def render(self, folder: int, subsystem: bytes) -> None:
        """Fill the folder of a device; one on another bus has only its ``modalias``.

        Raises:
            UntoldError: This kernel lays it out otherwise.
        """
        if (render := self._render.get(subsystem)) is not None:
            render(folder)
        if b"modalias" in self._look.below[folder]:
            self._look.give(folder, b"modalias", line(self.alias(folder, subsystem)))

    def alias(self, folder: int, subsystem: bytes) -> bytes:
        """Return the name by which a driver is found.

        Raises:
            UntoldError: It has none, or memory does not tell.
        """
        if subsystem == b"/bus/pci":
            return self._pci_alias(self._pci_values(folder))
        if subsystem == b"/bus/virtio":
            one = self._virtio_values(folder)
            return b"virtio:d%08Xv%08X" % (one["id.device"], one["id.vendor"])
        if subsystem == b"/bus/acpi":
            return self._acpi_alias(self._look.device(folder) - self._acpi_device)
        if subsystem == b"/bus/platform":
            return self._platform_alias(folder)
        if subsystem == b"/class/dmi":
            return self._dmi_alias()
        if subsystem == b"/bus/cpu":
            return self.processor_alias
        if subsystem == b"/bus/scsi":
            return b"scsi:t-0x%02x" % self._scsi_values(folder)[0]["type"]
        raise UntoldError("modalias")

    # --- PCI ---

    @functools.cached_property
    def _pci_layout(self) -> tuple[Structure, int]:
        of = "struct pci_dev"
        kernel = self._look.kernel
        members = ("vendor", "device", "subsystem_vendor", "subsystem_device", "class",
                   "revision", "irq", "dma_mask", "enable_cnt.counter",
                   "subordinate", "driver_override")  # fmt: skip
        return Structure(kernel, of, *members), offset(kernel, of, "dev")

    def _pci_values(self, folder: int) -> Values:
        layout, at = self._pci_layout
        return layout.read(self._look.device(folder) - at)

    def pci_lines(self, folder: int) -> list[bytes]:
        """Return what a PCI device adds to its ``uevent``."""
        one = self._pci_values(folder)
        return [
            b"PCI_CLASS=%04X" % one["class"],
            b"PCI_ID=%04X:%04X" % (one["vendor"], one["device"]),
            b"PCI_SUBSYS_ID=%04X:%04X" % (one["subsystem_vendor"], one["subsystem_device"]),
            b"PCI_SLOT_NAME=" + self._look.nodes[folder].name,
            b"MODALIAS=" + self._pci_alias(one),
        ]

    def _pci(self, folder: int) -> None:
        give = functools.partial(self._look.give, folder)
        one = self._pci_values(folder)
        for name in ("vendor", "device", "subsystem_vendor", "subsystem_device"):
            give(name.encode(), b"0x%04x\n" % one[name])
        give(b"revision", b"0x%02x\n" % one["revision"])
        give(b"class", b"0x%06x\n" % one["class"])
        give(b"enable", number(one["enable_cnt.counter"]))
        give(b"dma_mask_bits", number(one["dma_mask"].bit_length()))
        common = self._look.common(folder)
        give(b"consistent_dma_mask_bits", number(common["coherent_dma_mask"].bit_length()))
        give(b"numa_node", number(common["numa_node"]))
        if not one["driver_override"]:
            give(b"driver_override", b"(null)\n")
        address = self._look.device(folder) - self._pci_layout[1]
        # With MSI, it is the first of its own interrupts.
        if not read_bits(self._look.kernel, "struct pci_dev", "msi_enabled", address):
            give(b"irq", number(one["irq"]))
        count = min(length_of(self._look.kernel, "struct pci_dev", "resource"), _RESOURCES)
        if not one["subordinate"]:
            count -= _OF_BRIDGES
        start = address + offset(self._look.kernel, "struct pci_dev", "resource")
        resource = Fields(self._look.kernel, "struct resource", "start", "end", "flags")
        size = self._look.kernel.type("struct resource").size or 0
        lines = [
            b"0x%016x 0x%016x 0x%016x\n" % resource.read(start + index * size)
            for index in range(count)
        ]
        give(b"resource", b"".join(lines))

    @staticmethod
    def _pci_alias(one: Values) -> bytes:
        kind = one["class"]
        return b"pci:v%08Xd%08Xsv%08Xsd%08Xbc%02Xsc%02Xi%02X" % (
            one["vendor"], one["device"], one["subsystem_vendor"], one["subsystem_device"],
            kind >> 16 & 0xFF, kind >> 8 & 0xFF, kind & 0xFF,
        )  # fmt: skip

    # --- virtio ---

    @functools.cached_property
    def _virtio_layout(self) -> tuple[Structure, int]:
        kernel, of = self._look.kernel, "struct virtio_device"
        layout = Structure(kernel, of, "id.device", "id.vendor")
        return layout, offset(kernel, of, "dev")

    @functools.cached_property
    def _virtio_features(self) -> tuple[int, int]:
        """Where the features lie, and how many bytes they have: 64 bits until v6.17."""
        kernel, of = self._look.kernel, "struct virtio_device"
        if has_member(kernel, of, "features_array"):
            return offset(kernel, of, "features_array"), 8 * length_of(kernel, of, "features_array")
        return offset(kernel, of, "features"), 8

    def _virtio_values(self, folder: int) -> Values:
        layout, at = self._virtio_layout
        return layout.read(self._look.device(folder) - at)

    def _virtio(self, folder: int) -> None:
        one = self._virtio_values(folder)
        self._look.give(folder, b"device", b"0x%04x\n" % one["id.device"])
        self._look.give(folder, b"vendor", b"0x%04x\n" % one["id.vendor"])
        at, size = self._virtio_features
        device = self._look.device(folder) - self._virtio_layout[1]
        raw = self._look.kernel.virtual.read(VirtAddr(device + at), min(size, _MAX_FEATURES))
        bits = int.from_bytes(raw, "little")
        self._look.give(folder, b"features", line(f"{bits:0{len(raw) * 8}b}"[::-1].encode()))

    # --- SCSI, a module ---

    @functools.cached_property
    def _scsi_layout(self) -> tuple[Fields, int]:
        kernel = self._look.kernel
        built_in = kernel.types.struct("scsi_device") is not None
        try:
            types = kernel.types if built_in else module_types(kernel, "scsi_mod")
        except UnsupportedGuestError as error:  # before v5.11
            raise UntoldError(error.message) from error
        kind = module_struct(types, "scsi_device")
        members = Fields(kernel, kind, "vendor", "model", "rev", "type", "scsi_level")
        return members, offset(kernel, kind, "sdev_gendev")

    def _scsi_values(self, folder: int) -> tuple[dict[str, int], int]:
        kind = self._look.common(folder)["type"]
        named = Fields(self._look.kernel, "struct device_type", "name")
        if not kind or self._look.text(named.read(kind)[0]) != b"scsi_device":
            raise NoDeviceError("a host or a target")
        members, at = self._scsi_layout
        address = self._look.device(folder) - at
        names = ("vendor", "model", "rev", "type", "scsi_level")
        return dict(zip(names, members.read(address), strict=True)), address

    def _scsi(self, folder: int) -> None:
        if b"vendor" not in self._look.below[folder]:
            return  # a host or a target
        one, _ = self._scsi_values(folder)
        for name, length in (("vendor", 8), ("model", 16), ("rev", 4)):
            self._look.give(folder, name.encode(), line(self._look.text(one[name], length)))
        self._look.give(folder, b"type", number(one["type"] & 0xFF))
        level = one["scsi_level"] & 0xFF
        self._look.give(folder, b"scsi_level", number(level - 1 if level else 0))

    # --- ACPI and what has no bus ---

    @functools.cached_property
    def _acpi_device(self) -> int:
        return offset(self._look.kernel, "struct acpi_device", "dev")

    @functools.cached_property
    def _acpi_ids(self) -> tuple[int, int, Fields]:
        kernel = self._look.kernel
        return (
            offset(kernel, "struct acpi_device", "pnp.ids"),
            offset(kernel, "struct acpi_hardware_id", "list"),
            Fields(kernel, "struct acpi_hardware_id", "id"),
        )

    def hardware_ids(self, acpi_device: int) -> list[bytes]:
        """Return what firmware calls a device."""
        head, at, fields = self._acpi_ids
        nodes = walk.list_nodes(self._look.kernel, acpi_device + head, _MAX_IDS)
        return [self._look.text(fields.read(node - at)[0]) for node in nodes]

    def _acpi_alias(self, acpi_device: int) -> bytes:
        ids = [one for one in self.hardware_ids(acpi_device) if one != _DEVICE_TREE]
        if not ids:
            raise NoDeviceError("a device without a name")
        return b"acpi:" + b"".join(one + b":" for one in ids)

    def _platform_device(self, folder: int) -> None:
        layout, at = self._platform
        if not layout.read(self._look.device(folder) - at)["driver_override"]:
            self._look.give(folder, b"driver_override", b"(null)\n")

    @functools.cached_property
    def _platform(self) -> tuple[Structure, int]:
        kernel, of = self._look.kernel, "struct platform_device"
        return Structure(kernel, of, "name", "driver_override"), offset(kernel, of, "dev")

    def _platform_alias(self, folder: int) -> bytes:
        node = self._look.common(folder)["fwnode"]
        if node:
            kernel = self._look.kernel
            (operations,) = Fields(kernel, "struct fwnode_handle", "ops").read(node)
            if operations != kernel.symbols.address("acpi_device_fwnode_ops"):
                raise UntoldError("a node of no known firmware")
            companion = node - offset(kernel, "struct acpi_device", "fwnode")
            if self.hardware_ids(companion):
                return self._acpi_alias(companion)
        layout, at = self._platform
        one = layout.read(self._look.device(folder) - at)
        return b"platform:" + self._look.text(one["name"])

    @functools.cached_property
    def processor_alias(self) -> bytes:
        """The name by which modules for the processor are found."""
        vendor, family, model, bits = boot_features(self._look.kernel)
        features = (b",%04X" % bit for bit in range(bits.bit_length()) if bits >> bit & 1)
        name = b"cpu:type:x86,ven%04Xfam%04Xmod%04X:feature:" % (vendor, family, model)
        return name + b"".join(features)

    def processors(self, folder: int) -> None:
        """Fill the one file of /sys/devices/system/cpu that names modules."""
        self._look.give(folder, b"modalias", line(self.processor_alias))

    # --- DMI ---

    @functools.cached_property
    def products(self) -> dict[str, bytes]:
        """What the firmware says of the machine, by the kernel's name of the field.

        Source: Linux v6.1 ``drivers/firmware/dmi_scan.c`` (``dmi_ident``),
        ``include/linux/mod_devicetable.h`` (``enum dmi_field``).
        """
        kernel = self._look.kernel
        table = variable(kernel, "dmi_ident")
        places = labels(kernel.type("enum dmi_field"))
        found = {}
        for name, place in places.items():
            if 0 < place < places["DMI_STRING_MAX"]:
                address = read_word(kernel, table + 8 * place)
                if address:
                    found[name.removeprefix("DMI_")] = self._look.text(address)
        return found

    def machine(self, folder: int) -> None:
        """Fill /sys/class/dmi/id."""
        for name, text in self.products.items():
            self._look.give(folder, name.lower().encode(), line(text))

    def tables(self, folder: int) -> None:
        """Fill /sys/firmware/dmi/tables, which dmidecode(8) and lscpu(1) read.

        Source: Linux v6.1 ``drivers/firmware/dmi_scan.c`` (``dmi_init``).
        """
        fields = Fields(self._look.kernel, "struct bin_attribute", "size", "private")
        for index in self._look.below[folder].values():
            size, start = fields.read(self._look.nodes[index].private)
            if start and size <= _MAX_TABLE:
                raw = self._look.kernel.virtual.read(VirtAddr(start), size)
                self._look.set(index, raw)

    def _dmi_alias(self) -> bytes:
        # The last part is there since v5.14, which no type tells; disks are numbered since v5.15.
        if "PRODUCT_SKU" in self.products and not has_member(
            self._look.kernel, "struct gendisk", "diskseq"
        ):
            raise UntoldError("modalias")
        text = b"dmi"
        for prefix, name in _PRODUCTS.items():
            if name in self.products:
                plain = bytes(one for one in self.products[name] if 32 < one < 127 and one != 58)
                text += b":" + prefix + plain
        return text + b":"
