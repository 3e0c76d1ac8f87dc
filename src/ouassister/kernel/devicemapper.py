"""Device-mapper tables: what LVM, dm-crypt and multipath devices lie on.

Source: Linux v6.1 ``drivers/md/dm-core.h`` (``struct mapped_device``, ``struct dm_table``),
``include/linux/device-mapper.h`` (``struct dm_target``, ``struct dm_dev``),
``drivers/md/dm-ioctl.c`` (``struct hash_cell``), ``dm-linear.c`` (``struct linear_c``),
``dm-stripe.c`` (``struct stripe_c``), ``dm-crypt.c`` (``struct crypt_config``). All of them are
private to modules, whose types no kernel before v5.11 carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.guest_model import MappedDevice, MappedLeg, MappedRange
from ouassister.kernel import walk
from ouassister.kernel.fields import Fields, offset, read_string
from ouassister.kernel.modules import module_types, struct
from ouassister.kernel.program import guest_reads
from ouassister.text import to_text

if TYPE_CHECKING:
    from drgn import Type

    from ouassister.kernel.blockdevs import BlockDevices
    from ouassister.kernel.program import Kernel

_SECTOR: Final = 512
_MAX_TARGETS: Final = 1 << 16
_MAX_LEGS: Final = 1 << 16  # of all tables
_NAME_MAX: Final = 128  # DM_NAME_LEN
_UUID_MAX: Final = 129  # DM_UUID_LEN


class DeviceMapper:
    """The device-mapper of one kernel.

    Args:
        kernel: The kernel.
        devices: Its block devices.

    Raises:
        UnsupportedGuestError: This kernel keeps no types of the device-mapper.
    """

    def __init__(self, kernel: Kernel, devices: BlockDevices) -> None:
        self._kernel = kernel
        self._left = _MAX_LEGS
        self._devices = devices
        self._types = (
            kernel.types
            if kernel.types.struct("mapped_device") is not None
            else module_types(kernel, "dm_mod")
        )
        with guest_reads("reading the layout of the device-mapper"):
            self._private = Fields(kernel, "struct gendisk", "private_data")
            self._bdev = Fields(kernel, "struct block_device", "bd_dev")
            self._mapped = Fields(kernel, self._type("mapped_device"), "interface_ptr", "map")
            self._cell = Fields(kernel, self._type("hash_cell"), "name", "uuid")
            self._table = Fields(kernel, self._type("dm_table"), "num_targets", "targets")
            self._table_devices = offset(kernel, self._type("dm_table"), "devices")
            self._target_size: int = self._type("dm_target").size or 0
            self._target = Fields(kernel, self._type("dm_target"), "type", "begin", "len",
                                  "private")  # fmt: skip
            self._target_type = Fields(kernel, self._type("target_type"), "name")
            self._dev = Fields(kernel, self._type("dm_dev"), "bdev")
            self._internal = Fields(kernel, self._type("dm_dev_internal"), "dm_dev")
            self._internal_list = offset(kernel, self._type("dm_dev_internal"), "list")

    def read(self) -> tuple[MappedDevice, ...]:
        """Describe each device.

        Raises:
            CorruptGuestError: A table is absurdly large.
        """
        with guest_reads("reading the tables of the device-mapper"):
            return tuple(
                self._read(name, disk)
                for name, disk in sorted(self._devices.disks.items())
                if name.startswith("dm-")
            )

    def _type(self, name: str) -> Type:
        return struct(self._types, name)

    def _read(self, device: str, disk: int) -> MappedDevice:
        (mapped,) = self._private.read(disk)
        cell, table = self._mapped.read(mapped)
        name = uuid = b""
        if cell:  # none while the device is being removed
            name_at, uuid_at = self._cell.read(cell)
            name = read_string(self._kernel, name_at, _NAME_MAX) if name_at else b""
            uuid = read_string(self._kernel, uuid_at, _UUID_MAX) if uuid_at else b""
        return MappedDevice(device, to_text(name), to_text(uuid), self._ranges(table))

    def _ranges(self, table: int) -> tuple[MappedRange, ...]:
        if not table:  # made, and never loaded
            return ()
        count, targets = self._table.read(table)
        if count > _MAX_TARGETS:
            raise CorruptGuestError(f"a table of the device-mapper has {count} targets")
        ranges = []
        for index in range(count):
            kind, begin, length, private = self._target.read(targets + index * self._target_size)
            name = read_string(self._kernel, self._target_type.read(kind)[0], 64)
            ranges.append(
                MappedRange(
                    begin * _SECTOR,
                    length * _SECTOR,
                    to_text(name),
                    self._legs(name, private, table),
                )
            )
        return tuple(ranges)

    def _legs(self, target: bytes, private: int, table: int) -> tuple[MappedLeg, ...]:
        if target == b"linear":
            return (self._leg(*Fields(self._kernel, self._type("linear_c"), "dev", "start")
                              .read(private)),)  # fmt: skip
        if target == b"striped":
            return self._stripes(private)
        if target == b"crypt":
            return self._crypt(private, table)
        return self._below(table)

    def _stripes(self, private: int) -> tuple[MappedLeg, ...]:
        (count,) = Fields(self._kernel, self._type("stripe_c"), "stripes").read(private)
        if count > self._left:
            raise CorruptGuestError(f"a striped target has {count} stripes")
        stripe = self._type("stripe")
        fields = Fields(self._kernel, stripe, "dev", "physical_start")
        first = private + offset(self._kernel, self._type("stripe_c"), "stripe")
        size = stripe.size or 0
        return tuple(self._leg(*fields.read(first + index * size)) for index in range(count))

    def _crypt(self, private: int, table: int) -> tuple[MappedLeg, ...]:
        try:
            config = struct(module_types(self._kernel, "dm_crypt"), "crypt_config")
        except UnsupportedGuestError:
            return self._below(table)  # without starts, which a leg says
        return (self._leg(*Fields(self._kernel, config, "dev", "start").read(private)),)

    def _below(self, table: int) -> tuple[MappedLeg, ...]:
        """All devices that a table uses; which part of them, its targets keep to themselves."""
        head = table + self._table_devices
        return tuple(
            self._leg(self._internal.read(node - self._internal_list)[0], None)
            for node in walk.list_nodes(self._kernel, head, self._left)
        )

    def _leg(self, dm_dev: int, start: int | None) -> MappedLeg:
        self._left -= 1
        if self._left < 0:
            raise CorruptGuestError(f"tables of the device-mapper name more than {_MAX_LEGS} disks")
        (bdev,) = self._dev.read(dm_dev)
        name = self._devices.name(self._bdev.read(bdev)[0])
        return MappedLeg(name, None if start is None else start * _SECTOR)
