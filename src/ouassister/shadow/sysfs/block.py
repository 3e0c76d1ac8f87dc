"""Attributes of disks and partitions: what lsblk(8), libblkid, lvm2 and initramfs-tools read.

Source: Linux v6.1 ``block/genhd.c`` (``disk_attrs``), ``block/partitions/core.c``
(``part_attrs``), ``block/blk-sysfs.c``, ``include/linux/blkdev.h`` (``QUEUE_FLAG_*``,
``queue_limit_alignment_offset``), ``drivers/md/dm-sysfs.c``. Flags of a queue are an enumeration
since 7a4a43c8d5b0 (v6.11) and numbers before; some became ``limits.features`` in v6.11
(1122c0c1cc71, "block: move cache control settings out of queue->flags", and its neighbours). The
read-ahead is the disk's since edb0872f44ec ("block: move the bdi from the request_queue to the
gendisk", v5.15).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.kernel.fields import has_member
from ouassister.shadow.sysfs.look import Structure, UntoldError, Values, line, number, signed
from ouassister.text import from_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.guest_model import BlockDevice, MappedDevice
    from ouassister.kernel.program import Kernel
from ouassister.shadow.sysfs.look import Look

_SECTOR: Final = 512
_PAGE_KB: Final = 4
_REMOVABLE: Final = 1
_HIDDEN: Final = 0x402  # GENHD_FL_HIDDEN: 1 << 1 since v5.17, 0x400 before; the other is free
# include/linux/blkdev.h, the same in v5.10 and v6.10
_FLAGS: Final = {
    "NOMERGES": 3, "SAME_COMP": 4, "NONROT": 6, "IO_STAT": 7, "NOXMERGES": 9, "ADD_RANDOM": 10,
    "SAME_FORCE": 12, "STABLE_WRITES": 15, "WC": 17, "FUA": 18, "DAX": 19,
}  # fmt: skip
_FEATURES: Final = {
    "WRITE_CACHE": 0, "FUA": 1, "ROTATIONAL": 2, "ADD_RANDOM": 3, "IO_STAT": 4,
    "STABLE_WRITES": 5, "DAX": 8, "ZONED": 10,
}  # fmt: skip
_LIMITS: Final = (
    "logical_block_size", "physical_block_size", "io_min", "io_opt", "chunk_sectors",
    "max_segments", "max_segment_size", "max_integrity_segments", "max_discard_segments",
    "discard_granularity", "discard_alignment", "max_discard_sectors", "max_hw_discard_sectors",
    "max_write_same_sectors", "max_write_zeroes_sectors", "max_zone_append_sectors",
    "zone_write_granularity", "max_sectors", "max_hw_sectors", "dma_alignment",
    "virt_boundary_mask", "alignment_offset", "misaligned", "zoned", "features", "flags",
)  # fmt: skip
_PLAIN: Final = {  # file, member, and by how many bits it is shifted
    b"logical_block_size": ("logical_block_size", 0),
    b"hw_sector_size": ("logical_block_size", 0),
    b"physical_block_size": ("physical_block_size", 0),
    b"minimum_io_size": ("io_min", 0),
    b"optimal_io_size": ("io_opt", 0),
    b"chunk_sectors": ("chunk_sectors", 0),
    b"max_segments": ("max_segments", 0),
    b"max_segment_size": ("max_segment_size", 0),
    b"max_integrity_segments": ("max_integrity_segments", 0),
    b"max_discard_segments": ("max_discard_segments", 0),
    b"discard_granularity": ("discard_granularity", 0),
    b"discard_max_bytes": ("max_discard_sectors", 9),
    b"discard_max_hw_bytes": ("max_hw_discard_sectors", 9),
    b"write_zeroes_max_bytes": ("max_write_zeroes_sectors", 9),
    b"zone_append_max_bytes": ("max_zone_append_sectors", 9),
    b"zone_write_granularity": ("zone_write_granularity", 0),
    b"max_sectors_kb": ("max_sectors", -1),
    b"max_hw_sectors_kb": ("max_hw_sectors", -1),
    b"dma_alignment": ("dma_alignment", 0),
    b"virt_boundary_mask": ("virt_boundary_mask", 0),
}
_ZONED: Final = (b"none\n", b"host-aware\n", b"host-managed\n")


class Blocks:
    """Renders the folders of block devices.

    Args:
        look: The tree.
        devices: What is known of them.
        disks: Address of ``struct gendisk`` by name.
        mapped: Tables of the device-mapper.
    """

    def __init__(
        self,
        look: Look,
        devices: tuple[BlockDevice, ...],
        disks: dict[str, int],
        mapped: tuple[MappedDevice, ...],
    ) -> None:
        self._look = look
        kernel = look.kernel
        self._by_path = {one.sysfs: one for one in devices}
        self._disks = disks
        self._mapped = {one.device: one for one in mapped}
        self._disk = Structure(kernel, "struct gendisk", "flags", "minors", "queue", "diskseq",
                               "bdi", "nr_zones", "fops")  # fmt: skip
        self._operations = Structure(kernel, "struct block_device_operations", "devnode")
        self._queue = Structure(kernel, "struct request_queue", "queue_flags", "nr_requests",
                                "backing_dev_info", "nr_zones",
                                *(f"limits.{name}" for name in _LIMITS))  # fmt: skip
        self._bdi = Structure(kernel, "struct backing_dev_info", "ra_pages")
        numbered = not has_member(kernel, "struct queue_limits", "features")
        self._flags = dict(_FLAGS) if numbered else _named_flags(kernel)

    def device(self, folder: int) -> BlockDevice | None:
        """Return what is known of the device of a folder."""
        return self._by_path.get(self._look.path(folder))

    def disk_sequence(self, one: BlockDevice) -> int:
        """Return the number that the disk got when it appeared.

        Raises:
            UntoldError: This kernel does not number its disks.
        """
        return int(self._disk.read(self._disks.get(one.disk, 0))["diskseq"])

    def has_plain_node(self, one: BlockDevice) -> bool:
        """Tell whether the disk's driver leaves name and mode of its node to the kernel."""
        operations = self._disk.read(self._disks.get(one.disk, 0))["fops"]
        return not self._operations.read(operations)["devnode"]

    def render(self, folder: int) -> None:
        """Fill the folder of a disk or a partition."""
        one = self.device(folder)
        if one is None:
            return
        disk = self._disk.read(self._disks.get(one.disk, 0))
        queue = self._queue.read(disk["queue"])
        limits = Values({name: queue[f"limits.{name}"] for name in _LIMITS
                         if f"limits.{name}" in queue})  # fmt: skip
        self._give(folder, b"size", lambda: number(one.size // _SECTOR))
        self._give(folder, b"ro", lambda: number(one.read_only))
        self._give(folder, b"alignment_offset", lambda: number(_alignment(limits, one)))
        self._give(folder, b"discard_alignment", lambda: number(_discard(limits, one)))
        if one.partition:
            self._give(folder, b"start", lambda: number(one.start // _SECTOR))
            self._give(folder, b"partition", lambda: number(one.partition))
            return
        self._give(folder, b"removable", lambda: number(disk["flags"] & _REMOVABLE))
        self._give(folder, b"hidden", lambda: number(bool(disk["flags"] & _HIDDEN)))
        self._give(folder, b"range", lambda: number(disk["minors"]))
        self._give(folder, b"diskseq", lambda: number(disk["diskseq"]))
        place = self._look.below[folder].get(b"queue")
        if place is not None and place in self._look.below:
            self._queue_folder(place, disk, queue, limits)
        mapped = self._mapped.get(one.name)
        if mapped is not None:
            self._look.give(folder, b"dm/name", line(from_text(mapped.name)))
            self._look.give(folder, b"dm/uuid", line(from_text(mapped.uuid)))

    def _give(self, folder: int, name: bytes, render: Callable[[], bytes]) -> None:
        if name not in self._look.below[folder]:
            return
        try:
            content = render()
        except UntoldError:
            return
        self._look.give(folder, name, content)

    def _queue_folder(self, folder: int, disk: Values, queue: Values, limits: Values) -> None:
        for name, (member, shift) in _PLAIN.items():
            if member in limits:
                value = limits[member]
                self._look.give(
                    folder, name, number(value << shift if shift >= 0 else value >> -shift)
                )
        if "max_write_same_sectors" not in limits:  # "WRITE SAME" has gone in v5.18
            self._look.give(folder, b"write_same_max_bytes", b"0\n")
        self._look.give(folder, b"discard_zeroes_data", b"0\n")

        def flag(name: str) -> int:
            if name not in self._flags:
                raise UntoldError(name)
            return int(queue["queue_flags"]) >> self._flags[name] & 1

        def told(name: str, old: str) -> int:
            if "features" in limits:
                return int(limits["features"]) >> _FEATURES[name] & 1
            return flag(old)

        def rotational() -> int:
            return told("ROTATIONAL", "NONROT") ^ ("features" not in limits)

        def writes_back() -> bool:
            off = "features" in limits and limits["flags"] & 1  # BLK_FLAG_WRITE_CACHE_DISABLED
            return bool(told("WRITE_CACHE", "WC") and not off)

        def zoned() -> bytes:
            if "features" in limits:
                return _ZONED[2 * told("ZONED", "")]
            return _ZONED[limits["zoned"] % len(_ZONED)]

        def read_ahead() -> int:
            bdi = disk["bdi"] if "bdi" in disk else queue["backing_dev_info"]
            return int(self._bdi.read(bdi)["ra_pages"]) * _PAGE_KB

        renderers: dict[bytes, Callable[[], bytes]] = {
            b"rotational": lambda: number(rotational()),
            b"write_cache": lambda: b"write back\n" if writes_back() else b"write through\n",
            b"fua": lambda: number(told("FUA", "FUA")),
            b"add_random": lambda: number(told("ADD_RANDOM", "ADD_RANDOM")),
            b"iostats": lambda: number(told("IO_STAT", "IO_STAT")),
            b"stable_writes": lambda: number(told("STABLE_WRITES", "STABLE_WRITES")),
            b"dax": lambda: number(told("DAX", "DAX")),
            b"nomerges": lambda: number(flag("NOMERGES") << 1 | flag("NOXMERGES")),
            b"rq_affinity": lambda: number(flag("SAME_COMP") << flag("SAME_FORCE")),
            b"nr_requests": lambda: number(queue["nr_requests"]),
            b"nr_zones": lambda: number((disk if "nr_zones" in disk else queue)["nr_zones"]),
            b"zoned": zoned,
            b"read_ahead_kb": lambda: number(read_ahead()),
        }
        for name, render in renderers.items():
            self._give(folder, name, render)


def _alignment(limits: Values, one: BlockDevice) -> int:
    """How far behind a physical block the device begins."""
    if limits["misaligned"]:
        return -1
    offset = int(limits["alignment_offset"])
    if not one.partition:
        return signed(offset)
    grain = max(limits["physical_block_size"], limits["io_min"])
    return int((grain + offset - one.start % grain) % grain) if grain else 0


def _discard(limits: Values, one: BlockDevice) -> int:
    alignment = int(limits["discard_alignment"])
    if not one.partition:
        return alignment
    grain = limits["discard_granularity"] // _SECTOR
    if not limits["max_discard_sectors"] or not grain:
        return 0
    behind = (one.start // _SECTOR) % grain
    return int((grain + alignment // _SECTOR - behind) % grain) * _SECTOR


def _named_flags(kernel: Kernel) -> dict[str, int]:
    """Return the numbers of a queue's flags that are an enumeration."""
    found: dict[str, int] = {}
    for name in _FLAGS:
        one = kernel.types.constant(f"QUEUE_FLAG_{name}")
        if one is not None:
            found[name] = int(one.value_())
    return found
