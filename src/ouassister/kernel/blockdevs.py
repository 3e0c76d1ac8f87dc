"""Disks and partitions, as /sys/class/block shows them.

Source: Linux v6.1 ``block/genhd.c`` (``block_class``, ``show_partition``), ``block/bdev.c``,
``drivers/base/base.h`` (``struct subsys_private``, ``struct device_private``),
``include/linux/blk_types.h``. A partition is a ``block_device`` with a device of its own since
0d02129e76ed ("block: merge struct block_device and struct hd_struct", v5.11), a ``hd_struct``
before. Flags and the partition's number share a word since 1116b9fa15c0 ("bdev: infrastructure for
flags", v6.10). A class does not lead to its devices since dcfbb67e48a2 ("driver core: class: use
lock_class_key already present in struct subsys_private", v6.4): all classes are searched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.guest_model import BlockDevice
from ouassister.kernel import walk
from ouassister.kernel.fields import Fields, has_member, offset, read_string, read_word, variable
from ouassister.kernel.program import guest_reads
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.program import Kernel

_MINOR_BITS: Final = 20
_SECTOR: Final = 512
_MAX_DEVICES: Final = 1 << 16
_MAX_CLASSES: Final = 1 << 12
_MAX_DEPTH: Final = 64
_NAME_MAX: Final = 255
_BD_PARTNO, _BD_READ_ONLY = 0xFF, 0x100


class BlockDevices:
    """The block devices of a guest.

    Args:
        kernel: The kernel.

    Attributes:
        disks: Address of ``struct gendisk`` by name of the disk.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.disks: dict[str, int] = {}
        with guest_reads("reading the list of block devices"):
            self._object = Fields(kernel, "struct kobject", "name", "parent")
            self._device_object = offset(kernel, "struct device", "kobj")
            self._disk_name = Fields(kernel, "struct gendisk", "disk_name")
            self._meta = Fields(kernel, "struct partition_meta_info", "uuid", "volname")
            old = has_member(kernel, "struct block_device", "bd_part")
            read = self._partition if old else self._block_device
            self.all = tuple(
                sorted(
                    (read(device) for device in self._devices()),
                    key=lambda one: (one.major, one.minor),
                )
            )

        self._by_number = {(one.major, one.minor): one.name for one in self.all}

    def name(self, device_number: int) -> str:
        """Return the name of the device with a number (``dev_t``); "8:1" when there is none."""
        major, minor = device_number >> _MINOR_BITS, device_number & ((1 << _MINOR_BITS) - 1)
        return self._by_number.get((major, minor), f"{major}:{minor}")

    def _devices(self) -> Iterator[int]:
        """Yield the addresses of ``struct device`` in the class of block devices."""
        kernel = self._kernel
        private = self._private()
        head = private + offset(kernel, "struct subsys_private", "klist_devices.k_list")
        node_at = offset(kernel, "struct device_private", "knode_class.n_node")
        device = Fields(kernel, "struct device_private", "device")
        for node in walk.list_nodes(kernel, head, _MAX_DEVICES):
            yield device.read(node - node_at)[0]

    def _private(self) -> int:
        kernel = self._kernel
        block_class = variable(kernel, "block_class")
        if has_member(kernel, "struct class", "p"):
            return read_word(kernel, block_class + offset(kernel, "struct class", "p"))
        classes = read_word(kernel, variable(kernel, "class_kset"))
        entry = offset(kernel, "struct subsys_private", "subsys.kobj.entry")
        of = offset(kernel, "struct subsys_private", "class")
        head = classes + offset(kernel, "struct kset", "list")
        for node in walk.list_nodes(kernel, head, _MAX_CLASSES):
            if read_word(kernel, node - entry + of) == block_class:
                return node - entry
        raise UnsupportedGuestError("the class of block devices is not registered")

    def _block_device(self, device: int) -> BlockDevice:
        kernel = self._kernel
        flags = has_member(kernel, "struct block_device", "__bd_flags")
        names = ("__bd_flags.counter",) if flags else ("bd_partno", "bd_read_only")
        fields = Fields(kernel, "struct block_device", "bd_start_sect", "bd_nr_sectors", "bd_dev",
                        "bd_disk", "bd_meta_info", *names)  # fmt: skip
        start, size, number, disk, meta, *rest = fields.read(
            device - offset(kernel, "struct block_device", "bd_device")
        )
        if flags:
            partition, read_only = rest[0] & _BD_PARTNO, rest[0] & _BD_READ_ONLY
        else:
            partition, read_only = rest
        return self._describe(device, disk, number, partition, start, size, read_only, meta)

    def _partition(self, device: int) -> BlockDevice:
        kernel = self._kernel
        fields = Fields(kernel, "struct hd_struct", "start_sect", "nr_sects", "partno", "policy",
                        "info", "__dev.devt", "__dev.parent")  # fmt: skip
        part = device - offset(kernel, "struct hd_struct", "__dev")
        start, size, partition, read_only, meta, number, parent = fields.read(part)
        whole = offset(kernel, "struct gendisk", "part0.__dev")
        disk = (parent if partition else device) - whole
        return self._describe(device, disk, number, partition, start, size, read_only, meta)

    def _describe(
        self,
        device: int,
        disk: int,
        number: int,
        partition: int,
        start: int,
        size: int,
        read_only: int,
        meta: int,
    ) -> BlockDevice:
        sysfs = self._sysfs(device + self._device_object)
        disk_name = to_text(self._disk_name.read(disk)[0].partition(b"\0")[0])
        if not partition:
            self.disks[disk_name] = disk
        identity, label = self._meta.read(meta) if meta else (b"", b"")
        return BlockDevice(
            name=to_text(sysfs.rpartition(b"/")[2].replace(b"!", b"/")),
            major=number >> _MINOR_BITS,
            minor=number & ((1 << _MINOR_BITS) - 1),
            disk=disk_name,
            partition=partition,
            start=start * _SECTOR,
            size=size * _SECTOR,
            read_only=bool(read_only),
            partition_uuid=to_text(identity.partition(b"\0")[0]),
            partition_label=to_text(label.partition(b"\0")[0]),
            sysfs=sysfs,
        )

    def _sysfs(self, kobject: int) -> bytes:
        parts: list[bytes] = []
        while kobject:
            if len(parts) > _MAX_DEPTH:
                raise CorruptGuestError(f"a device lies more than {_MAX_DEPTH} levels deep")
            name, kobject = self._object.read(kobject)
            parts.append(read_string(self._kernel, name, _NAME_MAX))
        return b"/" + b"/".join(reversed(parts))
