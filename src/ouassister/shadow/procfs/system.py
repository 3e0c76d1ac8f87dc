"""Files of /proc that describe the whole guest; pure functions from records to bytes.

Source: Linux v6.1 ``fs/proc/`` (``stat.c``, ``loadavg.c``, ``uptime.c``, ``meminfo.c``,
``devices.c``), ``fs/filesystems.c`` (``filesystems_proc_show``), ``block/genhd.c``
(``show_partition``), ``mm/swapfile.c`` (``swap_show``), ``kernel/module/procfs.c`` (``m_show``),
``kernel/panic.c`` (``taint_flags``), ``drivers/char/misc.c``, ``fs/locks.c``
(``lock_get_status``), ``fs/char_dev.c``, ``arch/x86/kernel/cpu/proc.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.shadow.procfs.process import escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ouassister.guest_model import BlockDevice, HeldLock, Module, SwapArea
    from ouassister.kernel.cpuinfo import Processor
    from ouassister.kernel.system_stat import Activity, CpuTime

_TICK_NS: Final = 10_000_000
_HZ: Final = 250  # as Debian and most build it
_SECOND_NS: Final = 1_000_000_000
_FSHIFT: Final = 11
_TAINTS: Final = {0: "P", 10: "C", 12: "O", 13: "E", 15: "K", 16: "X", 17: "T", 18: "N"}
_STATES: Final = {"live": "Live", "coming": "Loading", "going": "Unloading"}
_KINDS: Final = {
    "posix": "POSIX  ADVISORY ",
    "ofd": "OFDLCK ADVISORY ",
    "flock": "FLOCK  ADVISORY ",
    "lease": "LEASE  ACTIVE   ",
    "delegation": "DELEG  ACTIVE   ",
}


def uptime(boottime_ns: int, idle_ns: int) -> bytes:
    """Render /proc/uptime, as of the suspension."""
    return b"%s %s\n" % (_hundredths(boottime_ns), _hundredths(idle_ns))


def _hundredths(ns: int) -> bytes:
    return b"%d.%02d" % (ns // _SECOND_NS, ns % _SECOND_NS // 10_000_000)


def loadavg(activity: Activity) -> bytes:
    """Render /proc/loadavg."""
    words = []
    for load in activity.load:
        rounded = load + (1 << _FSHIFT) // 200
        fraction = (rounded & ((1 << _FSHIFT) - 1)) * 100 >> _FSHIFT
        words.append(f"{rounded >> _FSHIFT}.{fraction:02d}")
    tail = f"{activity.running}/{activity.threads} {activity.last_pid}"
    return f"{' '.join(words)} {tail}\n".encode()


def stat(cpus: Sequence[CpuTime], activity: Activity, boot_s: int) -> bytes:
    """Render /proc/stat; of interrupts the sum alone."""
    total = [sum(column) for column in zip(*(one.times_ns for one in cpus), strict=True)]
    lines = ["cpu  " + _ticks(total)]
    lines += [f"cpu{one.cpu} {_ticks(one.times_ns)}" for one in cpus]
    lines += [] if activity.interrupts is None else [f"intr {activity.interrupts}"]
    lines += [
        f"ctxt {activity.context_switches}",
        f"btime {boot_s}",
        f"processes {activity.forks}",
        f"procs_running {activity.running}",
        f"procs_blocked {activity.blocked}",
        f"softirq {sum(activity.softirqs)} {' '.join(map(str, activity.softirqs))}",
    ]
    return "\n".join([*lines, ""]).encode()


def _ticks(times_ns: Iterable[int]) -> str:
    return " ".join(str(time // _TICK_NS) for time in times_ns)


def meminfo(figures: dict[str, int]) -> bytes:
    """Render /proc/meminfo."""
    return "".join(f"{name + ':':<16s}{value:8d} kB\n" for name, value in figures.items()).encode()


def filesystems(types: Iterable[tuple[bytes, bool]]) -> bytes:
    """Render /proc/filesystems."""
    return b"".join(b"%s\t%s\n" % (b"" if device else b"nodev", name) for name, device in types)


def devices(chars: Iterable[tuple[int, bytes]], blocks: Iterable[tuple[int, bytes]]) -> bytes:
    """Render /proc/devices."""
    lines = [b"Character devices:", *(b"%3d %s" % one for one in chars), b""]
    lines += [b"Block devices:", *(b"%3d %s" % one for one in blocks), b""]
    return b"\n".join(lines)


def misc(entries: Iterable[tuple[int, bytes]]) -> bytes:
    """Render /proc/misc."""
    return b"".join(b"%3d %s\n" % one for one in entries)


def partitions(block_devices: Iterable[BlockDevice]) -> bytes:
    """Render /proc/partitions; an empty device is not listed."""
    lines = [
        f"{one.major:4d}  {one.minor:7d} {one.size >> 10:10d} {one.name}\n"
        for one in block_devices
        if one.size
    ]
    return "".join(["major minor  #blocks  name\n\n", *lines]).encode()


def swaps(areas: Iterable[SwapArea]) -> bytes:
    """Render /proc/swaps."""
    lines = [b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"]
    for area in areas:
        path = escape(area.path, b" \t\n\\")
        size, used = area.size >> 10, area.used >> 10
        kind = "partition" if area.partition else "file\t"
        tail = (
            f"{kind}\t{size}\t{'' if size >= 10_000_000 else chr(9)}{used}\t"
            f"{'' if used >= 10_000_000 else chr(9)}{area.priority}\n"
        )
        pad = b" " * (40 - len(path) if len(path) < 40 else 1)
        lines.append(path + pad + tail.encode())
    return b"".join(lines)


def modules(loaded: Iterable[Module]) -> bytes:
    """Render /proc/modules, with addresses as they are shown to others than root."""
    lines = []
    for one in loaded:
        if one.state not in _STATES:
            continue
        users = "".join(f"{name}," for name in one.used_by) or "-"
        taints = "".join(letter for bit, letter in _TAINTS.items() if one.taints >> bit & 1)
        tail = f" ({taints})" if taints else ""
        lines.append(
            f"{one.name} {one.size} {one.references} {users} {_STATES[one.state]} "
            f"0x0000000000000000{tail}\n"
        )
    return "".join(lines).encode()


def locks(held: Iterable[HeldLock]) -> bytes:
    """Render /proc/locks; who waits for a lock is not told."""
    lines = []
    for number, lock in enumerate(held, 1):
        end = "EOF" if lock.end is None else str(lock.end)
        lines.append(
            f"{number}: {_KINDS[lock.kind]} {'WRITE' if lock.write else 'READ'} {lock.pid} "
            f"{lock.major:02x}:{lock.minor:02x}:{lock.inode} {lock.start} {end}\n"
        )
    return "".join(lines).encode()


def cpuinfo(processors: Iterable[Processor]) -> bytes:
    """Render /proc/cpuinfo."""
    return b"".join(map(_processor, processors))


def _processor(one: Processor) -> bytes:
    lines: list[tuple[bytes, object]] = [
        (b"processor\t", one.number),
        (b"vendor_id\t", one.vendor or b"unknown"),
        (b"cpu family\t", one.family),
        (b"model\t\t", one.model),
        (b"model name\t", one.name or b"unknown"),
        (b"stepping\t", one.stepping if one.stepping or one.level >= 0 else b"unknown"),
    ]
    if one.microcode:
        lines.append((b"microcode\t", b"0x%x" % one.microcode))
    if b"tsc" in one.flags:
        lines.append((b"cpu MHz\t\t", b"%d.%03d" % divmod(one.khz, 1000)))
    if one.cache_kb:
        lines.append((b"cache size\t", b"%d KB" % one.cache_kb))
    lines += [
        (b"physical id\t", one.package),
        (b"siblings\t", one.siblings),
        (b"core id\t\t", one.core),
        (b"cpu cores\t", one.cores),
        (b"apicid\t\t", one.apic),
        (b"initial apicid\t", one.initial_apic),
        (b"fpu\t\t", b"yes"),
        (b"fpu_exception\t", b"yes"),
        (b"cpuid level\t", one.level),
        (b"wp\t\t", b"yes"),
        (b"flags\t\t", b" ".join(one.flags)),
    ]
    if one.vmx_flags is not None:
        lines.append((b"vmx flags\t", b" ".join(one.vmx_flags)))
    loops = one.loops_per_jiffy
    mips = b"%d.%02d" % (loops // (500_000 // _HZ), loops // (5_000 // _HZ) % 100)
    lines += [(b"bugs\t\t", b" ".join(one.bugs)), (b"bogomips\t", mips)]
    if one.tlb_size > 0:
        lines.append((b"TLB size\t", b"%d 4K pages" % one.tlb_size))
    sizes = b"%d bits physical, %d bits virtual" % (one.physical_bits, one.virtual_bits)
    lines += [
        (b"clflush size\t", one.flush_size),
        (b"cache_alignment\t", one.cache_alignment),
        (b"address sizes\t", sizes),
    ]
    text = b"".join(
        name + b": " + (value if isinstance(value, bytes) else str(value).encode()) + b"\n"
        for name, value in lines
    )
    power = b"".join(b" " + name for name in one.power)
    return text + b"power management:" + power + b"\n\n"
