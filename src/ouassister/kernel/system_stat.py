"""Figures of the whole system, as /proc/stat, loadavg, uptime and meminfo have them.

Source: Linux v6.1 ``fs/proc/stat.c``, ``fs/proc/loadavg.c``, ``fs/proc/uptime.c``,
``fs/proc/meminfo.c``, ``mm/page_alloc.c`` (``si_mem_available``), ``mm/util.c``
(``vm_commit_limit``, ``vm_memory_committed``), ``include/linux/kernel_stat.h``,
``kernel/time/tick-sched.c`` (``get_cpu_idle_time_us``), ``fs/filesystems.c``,
``fs/char_dev.c`` (``chrdev_show``), ``block/genhd.c`` (``blkdev_show``), ``init/version.c``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.guest_model import VirtAddr
from ouassister.kernel import walk
from ouassister.kernel.fields import (
    Fields,
    has_member,
    labels,
    offset,
    read_string,
    read_word,
    variable,
)
from ouassister.kernel.percpu import each_cpu
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ouassister.kernel.program import Kernel

T = TypeVar("T")

_MAX_ITEMS: Final = 4096
_CMDLINE_MAX: Final = 4096  # COMMAND_LINE_SIZE is 2048
_CHRDEV_HASH: Final = 255  # CHRDEV_MAJOR_HASH_SIZE, BLKDEV_MAJOR_HASH_SIZE
_CPU_USAGE: Final = 10
_FS_REQUIRES_DEV: Final = 1
_SOFTIRQS: Final = 10
_PAGE_KB: Final = 4
_VMALLOC_TERABYTES: Final = {4: 32, 5: 12800}  # by levels of page tables; x86 pgtable_64_types.h
_IRQ_STAT: Final = (  # struct irq_cpustat_t of x86
    "__nmi_count", "apic_timer_irqs", "irq_spurious_count", "apic_perf_irqs", "apic_irq_work_irqs",
    "icr_read_retry_count", "x86_platform_ipis", "irq_resched_count", "irq_call_count",
    "irq_thermal_count", "irq_threshold_count",
)  # fmt: skip
# Looked up in one pass over the table of symbols.
SYMBOLS: Final = (
    "__cpu_possible_mask", "__per_cpu_offset", "_totalram_pages", "avenrun", "blockdev_superblock",
    "chrdevs", "file_systems", "init_pid_ns", "irq_stat", "kernel_cpustat", "kstat", "linux_banner",
    "major_names", "misc_list", "node_data", "contig_page_data", "nr_swap_pages", "nr_threads",
    "num_poisoned_pages", "pcpu_nr_populated", "pcpu_nr_units", "runqueues", "saved_command_line",
    "sysctl_overcommit_kbytes", "sysctl_overcommit_ratio", "tick_cpu_sched", "tick_nohz_active",
    "mce_exception_count", "mce_poll_count", "total_forks", "total_swap_pages",
    "totalreserve_pages", "vm_committed_as", "vm_node_stat",
    "vm_zone_stat", "nr_vmalloc_pages",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CpuTime:
    """One line of /proc/stat; nanoseconds in the order of that file."""

    cpu: int
    times_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Activity:
    """What /proc/stat and loadavg have beside times."""

    interrupts: int | None  # None: this kernel does not tell
    context_switches: int
    forks: int
    running: int
    blocked: int
    softirqs: tuple[int, ...]
    load: tuple[int, int, int]  # fixed point, 11 bits
    threads: int
    last_pid: int


@dataclass(frozen=True, slots=True)
class SystemStat:
    """None, or a missing name: this kernel does not tell."""

    banner: bytes | None
    cmdline: bytes | None
    filesystems: tuple[tuple[bytes, bool], ...] | None  # name, needs a device
    char_devices: tuple[tuple[int, bytes], ...] | None
    block_majors: tuple[tuple[int, bytes], ...] | None
    cpus: tuple[CpuTime, ...] | None  # those online
    idle_ns: int | None  # of all processors
    activity: Activity | None
    memory: dict[str, int] | None  # by the names of /proc/meminfo, kB; counts for HugePages_*
    misc: tuple[tuple[int, bytes], ...] | None
    untold: tuple[str, ...]


def read_system_stat(kernel: Kernel) -> SystemStat:
    """Read all figures; what cannot be told is named in ``untold``."""
    untold: list[str] = []
    kernel.symbols.learn(SYMBOLS)

    def ask(what: str, question: Callable[[Kernel], T]) -> T | None:
        try:
            with guest_reads(f"reading {what}"):
                return question(kernel)
        except (UnsupportedGuestError, CorruptGuestError, PageAbsentError) as error:
            untold.append(f"{what}: {error.message}")
            return None

    times = ask("the times of processors", _cpu_times)
    return SystemStat(
        banner=ask("the kernel's banner", _banner),
        cmdline=ask("the kernel's command line", _cmdline),
        filesystems=ask("the types of file systems", _filesystems),
        char_devices=ask("the majors of character devices", _char_devices),
        block_majors=ask("the majors of block devices", _block_majors),
        cpus=times,
        idle_ns=sum(one.times_ns[3] for one in times) if times is not None else None,
        activity=ask("the system's activity", _activity),
        memory=ask("the use of memory", _memory),
        misc=ask("the misc devices", _misc),
        untold=tuple(untold),
    )


# --- texts and lists -----------------------------------------------------------------------


def _banner(kernel: Kernel) -> bytes:
    return read_string(kernel, variable(kernel, "linux_banner"), 1024)


def _cmdline(kernel: Kernel) -> bytes:
    at = read_word(kernel, variable(kernel, "saved_command_line"))
    return read_string(kernel, at, _CMDLINE_MAX)


def _filesystems(kernel: Kernel) -> tuple[tuple[bytes, bool], ...]:
    kind = "struct file_system_type"
    # A hash list on newer kernels (seen in 7.3), linked by ``next`` before.
    linked = "next" if has_member(kernel, kind, "next") else "list.next"
    fields = Fields(kernel, kind, "name", "fs_flags", linked)
    back = 0 if linked == "next" else offset(kernel, kind, "list")
    found = []
    at = _word(kernel, "file_systems")
    while at:
        name, flags, at = fields.read(at - back)
        found.append((read_string(kernel, name, 64), bool(flags & _FS_REQUIRES_DEV)))
        if len(found) > _MAX_ITEMS:
            raise CorruptGuestError(f"the guest has more than {_MAX_ITEMS} types of file systems")
    return tuple(found)


def _char_devices(kernel: Kernel) -> tuple[tuple[int, bytes], ...]:
    return _majors(kernel, "chrdevs", "struct char_device_struct")


def _block_majors(kernel: Kernel) -> tuple[tuple[int, bytes], ...]:
    return _majors(kernel, "major_names", "struct blk_major_name")


def _majors(kernel: Kernel, table: str, kind: str) -> tuple[tuple[int, bytes], ...]:
    fields = Fields(kernel, kind, "next", "major", "name")
    raw = kernel.virtual.read(_at(kernel, table), _CHRDEV_HASH * 8)
    found = []
    for (first,) in struct.iter_unpack("<Q", raw):
        at = first
        while at:
            at, major, name = fields.read(at)
            found.append((major, name.partition(b"\0")[0]))
            if len(found) > _MAX_ITEMS:
                raise CorruptGuestError(f"{table} has more than {_MAX_ITEMS} entries")
    return tuple(sorted(found, key=lambda one: one[0]))  # stable, as the kernel walks a chain


def _misc(kernel: Kernel) -> tuple[tuple[int, bytes], ...]:
    fields = Fields(kernel, "struct miscdevice", "minor", "name")
    at = offset(kernel, "struct miscdevice", "list")
    found = []
    for node in walk.list_nodes(kernel, variable(kernel, "misc_list"), _MAX_ITEMS):
        minor, name = fields.read(node - at)
        found.append((minor, read_string(kernel, name, 64) if name else b""))
    return tuple(found)


# --- processors ----------------------------------------------------------------------------


def _cpu_times(kernel: Kernel) -> tuple[CpuTime, ...]:
    online = int.from_bytes(kernel.prog["__cpu_online_mask"].to_bytes_(), "little")
    idle = _idle_times(kernel)
    found = []
    for cpu, at in _each(kernel, "kernel_cpustat"):
        if not online >> cpu & 1:
            continue
        raw = kernel.virtual.read(VirtAddr(at), _CPU_USAGE * 8)
        (user, nice, system, softirq, irq, idle_ns, iowait, steal, guest,
         guest_nice) = struct.unpack("<10Q", raw)  # fmt: skip
        if cpu in idle:
            idle_ns, iowait = idle[cpu]
        times = (user, nice, system, idle_ns, iowait, irq, softirq, steal, guest, guest_nice)
        found.append(CpuTime(cpu, times))
    return tuple(found)


def _idle_times(kernel: Kernel) -> dict[int, tuple[int, int]]:
    """Return idle and iowait time of processors that stop their tick (get_cpu_idle_time_us).

    As of when each last became busy or was asked: what it has slept since is left out.
    """
    if not has_member(kernel, "struct tick_sched", "idle_sleeptime"):
        return {}  # newer kernels (seen in 7.3) add it to the other times
    active = kernel.symbols.address("tick_nohz_active")
    if active is None or not any(kernel.virtual.read(active, 4)):
        return {}
    fields = Fields(kernel, "struct tick_sched", "idle_sleeptime", "iowait_sleeptime")
    return {cpu: fields.read(at) for cpu, at in _each(kernel, "tick_cpu_sched")}


def _activity(kernel: Kernel) -> Activity:
    rq = Fields(kernel, "struct rq", "nr_switches", "nr_running", "nr_iowait.counter")
    rows = [rq.read(at) for _, at in _each(kernel, "runqueues")]
    stat_kind = "struct kernel_stat"
    sums = Fields(kernel, stat_kind, "irqs_sum")
    at_softirqs = offset(kernel, stat_kind, "softirqs")
    interrupts = _architecture_interrupts(kernel)
    softirqs = [0] * _SOFTIRQS
    for _, at in _each(kernel, "kstat"):
        if interrupts is not None:
            interrupts += int(sums.read(at)[0])
        raw = kernel.virtual.read(VirtAddr(at + at_softirqs), _SOFTIRQS * 4)
        softirqs = [sum(pair) for pair in zip(softirqs, struct.unpack("<10I", raw), strict=True)]
    load = struct.unpack("<3Q", kernel.virtual.read(_at(kernel, "avenrun"), 24))
    (cursor,) = Fields(kernel, "struct pid_namespace", "idr.idr_next").read(
        variable(kernel, "init_pid_ns")
    )
    return Activity(
        interrupts=interrupts,
        context_switches=sum(row[0] for row in rows),
        forks=read_word(kernel, variable(kernel, "total_forks")),
        running=sum(row[1] for row in rows),
        blocked=sum(row[2] for row in rows),
        softirqs=tuple(softirqs),
        load=(load[0], load[1], load[2]),
        threads=_int(kernel, "nr_threads"),
        last_pid=max(cursor - 1, 0),
    )


def _architecture_interrupts(kernel: Kernel) -> int | None:
    """Count interrupts that have no number (arch_irq_stat_cpu, arch_irq_stat in irq.c of x86)."""
    members = [name for name in _IRQ_STAT if has_member(kernel, "irq_cpustat_t", name)]
    if not members:  # newer kernels (seen in 7.3) have an array, of which not all count
        return None
    fields = Fields(kernel, "irq_cpustat_t", *members)
    total = sum(sum(fields.read(at)) for _, at in _each(kernel, "irq_stat"))
    for name in ("mce_exception_count", "mce_poll_count"):
        if kernel.symbols.address(name) is not None:
            for _, at in _each(kernel, name):
                total += int.from_bytes(kernel.virtual.read(VirtAddr(at), 4), "little")
    return int(total)


# --- memory --------------------------------------------------------------------------------


def _memory(kernel: Kernel) -> dict[str, int]:
    nodes = _counters(kernel, "vm_node_stat", "node_stat_item")
    zones = _counters(kernel, "vm_zone_stat", "zone_stat_item")
    total = _word(kernel, "_totalram_pages")
    free = zones["NR_FREE_PAGES"]
    buffers = _buffers(kernel)
    swapcache = nodes.get("NR_SWAPCACHE", 0)
    swap_total, swap_free = _word(kernel, "total_swap_pages"), _word(kernel, "nr_swap_pages")
    active_anon, inactive_anon = nodes["NR_ACTIVE_ANON"], nodes["NR_INACTIVE_ANON"]
    active_file, inactive_file = nodes["NR_ACTIVE_FILE"], nodes["NR_INACTIVE_FILE"]
    slab, pinned = nodes["NR_SLAB_RECLAIMABLE_B"], nodes["NR_SLAB_UNRECLAIMABLE_B"]
    reclaimable = slab + nodes["NR_KERNEL_MISC_RECLAIMABLE"]
    kilobytes = {
        "MemTotal": total,
        "MemFree": free,
        "MemAvailable": _available(kernel, free, active_file + inactive_file, reclaimable),
        "Buffers": buffers,
        "Cached": max(nodes["NR_FILE_PAGES"] - swapcache - buffers, 0),
        "SwapCached": swapcache,
        "Active": active_anon + active_file,
        "Inactive": inactive_anon + inactive_file,
        "Active(anon)": active_anon,
        "Inactive(anon)": inactive_anon,
        "Active(file)": active_file,
        "Inactive(file)": inactive_file,
        "Unevictable": nodes["NR_UNEVICTABLE"],
        "Mlocked": zones.get("NR_MLOCK", 0),
        "SwapTotal": swap_total,
        "SwapFree": swap_free,
        "Dirty": nodes["NR_FILE_DIRTY"],
        "Writeback": nodes["NR_WRITEBACK"],
        "AnonPages": nodes["NR_ANON_MAPPED"],
        "Mapped": nodes["NR_FILE_MAPPED"],
        "Shmem": nodes["NR_SHMEM"],
        "KReclaimable": reclaimable,
        "Slab": slab + pinned,
        "SReclaimable": slab,
        "SUnreclaim": pinned,
    }
    figures = {name: pages * _PAGE_KB for name, pages in kilobytes.items()}
    figures["KernelStack"] = nodes.get("NR_KERNEL_STACK_KB", zones.get("NR_KERNEL_STACK_KB", 0))
    pages = nodes.get("NR_PAGETABLE", zones.get("NR_PAGETABLE", 0))
    figures["PageTables"] = pages * _PAGE_KB
    if "NR_SECONDARY_PAGETABLE" in nodes:
        figures["SecPageTables"] = nodes["NR_SECONDARY_PAGETABLE"] * _PAGE_KB
    figures["CommitLimit"] = _commit_limit(kernel, total) + swap_total * _PAGE_KB
    figures["Committed_AS"] = _percpu_counter(kernel, "vm_committed_as") * _PAGE_KB
    figures["VmallocTotal"] = (_VMALLOC_TERABYTES[kernel.levels] << 30) - 1
    for name, symbol in (("VmallocUsed", "nr_vmalloc_pages"),
                         ("HardwareCorrupted", "num_poisoned_pages")):  # fmt: skip
        if kernel.symbols.address(symbol) is not None:
            figures[name] = _word(kernel, symbol) * _PAGE_KB
    if kernel.symbols.address("pcpu_nr_populated") is not None:
        per_cpu = _int(kernel, "pcpu_nr_populated") * _int(kernel, "pcpu_nr_units")
        figures["Percpu"] = per_cpu * _PAGE_KB
    return figures


def _available(kernel: Kernel, free: int, pagecache: int, reclaimable: int) -> int:
    low = sum(_low_watermarks(kernel))
    available = free - _word(kernel, "totalreserve_pages")
    available += pagecache - min(pagecache // 2, low)
    available += reclaimable - min(reclaimable // 2, low)
    return max(available, 0)


def _low_watermarks(kernel: Kernel) -> Iterator[int]:
    """Yield low_wmark_pages() of each zone."""
    places = kernel.type("struct pglist_data").member("node_zones").type
    size = kernel.type("struct zone").size or 0
    zones = offset(kernel, "struct pglist_data", "node_zones")
    mark = offset(kernel, "struct zone", "_watermark") + 8  # WMARK_LOW
    boost = offset(kernel, "struct zone", "watermark_boost")
    for node in _nodes(kernel):
        for zone in range(places.length or 0):
            at = node + zones + zone * size
            yield read_word(kernel, at + mark) + read_word(kernel, at + boost)


def _nodes(kernel: Kernel) -> Iterator[int]:
    """Yield every ``struct pglist_data *``."""
    table = kernel.symbols.address("node_data")
    if table is None:
        yield variable(kernel, "contig_page_data")
        return
    count = len(_node_numbers(kernel))
    for (node,) in struct.iter_unpack("<Q", kernel.virtual.read(table, count * 8)):
        if node:
            yield node


def _node_numbers(kernel: Kernel) -> range:
    """Return the numbers that nodes may have, from the size of ``nodemask_t`` in bits."""
    bits = kernel.type("nodemask_t").type.member("bits").type
    return range(min((bits.length or 0) * 64, 1024))


def _buffers(kernel: Kernel) -> int:
    """Count the pages of block devices (nr_blockdev_pages)."""
    sb = read_word(kernel, variable(kernel, "blockdev_superblock"))
    fields = Fields(kernel, "struct inode", "i_mapping")
    mapping = Fields(kernel, "struct address_space", "nrpages")
    at = offset(kernel, "struct inode", "i_sb_list")
    head = sb + offset(kernel, "struct super_block", "s_inodes")
    total = 0
    for node in walk.list_nodes(kernel, head):
        total += mapping.read(fields.read(node - at)[0])[0]
    return total


def _commit_limit(kernel: Kernel, total: int) -> int:
    fixed = _word(kernel, "sysctl_overcommit_kbytes")
    if fixed:
        return fixed
    return total * _int(kernel, "sysctl_overcommit_ratio") // 100 * _PAGE_KB


def _counters(kernel: Kernel, name: str, enumeration: str) -> dict[str, int]:
    items = {
        item: number
        for item, number in labels(kernel.type(f"enum {enumeration}")).items()
        if not item.startswith("NR_VM_")
    }
    size = max(items.values()) + 1
    if not 0 < size <= _MAX_ITEMS:
        raise UnsupportedGuestError(f"enum {enumeration} has {size} values")
    raw = struct.unpack(f"<{size}q", kernel.virtual.read(_at(kernel, name), size * 8))
    return {item: max(raw[number], 0) for item, number in items.items()}


def _percpu_counter(kernel: Kernel, name: str) -> int:
    at = variable(kernel, name)
    count, counters = Fields(kernel, "struct percpu_counter", "count", "counters").read(at)
    offsets = variable(kernel, "__per_cpu_offset")
    total = int(count)
    for cpu, _ in _each(kernel, "runqueues"):
        where = (counters + read_word(kernel, offsets + cpu * 8)) % (1 << 64)
        total += int.from_bytes(kernel.virtual.read(VirtAddr(where), 4), "little", signed=True)
    return max(total, 0)


# --- variables -----------------------------------------------------------------------------


def _each(kernel: Kernel, name: str) -> Iterator[tuple[int, int]]:
    """Yield the number of each possible processor and the address of its copy of a variable."""
    size = kernel.type("struct cpumask").size or 0
    mask = _at(kernel, "__cpu_possible_mask")
    possible = int.from_bytes(kernel.virtual.read(mask, min(size, 1024)), "little")
    numbers = (cpu for cpu in range(possible.bit_length()) if possible >> cpu & 1)
    yield from zip(numbers, each_cpu(kernel, name), strict=True)


def _at(kernel: Kernel, name: str) -> VirtAddr:
    """`variable`, as an address to read from."""
    return VirtAddr(variable(kernel, name))


def _word(kernel: Kernel, name: str) -> int:
    return read_word(kernel, variable(kernel, name))


def _int(kernel: Kernel, name: str) -> int:
    return int.from_bytes(kernel.virtual.read(_at(kernel, name), 4), "little")
