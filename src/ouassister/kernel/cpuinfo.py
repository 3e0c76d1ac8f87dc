"""Processors as /proc/cpuinfo describes them.

Source: Linux v6.1 ``arch/x86/kernel/cpu/proc.c`` (``show_cpuinfo``), ``arch/x86/include/asm/``
``processor.h`` (``struct cpuinfo_x86``), ``cpufeature.h`` (``x86_cap_flags``, ``x86_bug_flags``),
``arch/x86/kernel/cpu/powerflags.c``. Ids are in ``cpuinfo_x86.topo`` since b9655e702dc5 ("x86/cpu:
Encapsulate topology information in cpuinfo_x86", v6.7), in the structure itself before.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.guest_model import VirtAddr
from ouassister.kernel.fields import Fields, has_member, offset, read_string, read_word, variable
from ouassister.kernel.percpu import each_cpu
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.program import Kernel

SYMBOLS: Final = (
    "cpu_info", "cpu_core_map", "x86_cap_flags", "x86_bug_flags", "x86_vmx_flags",
    "x86_power_flags", "cpu_khz", "nr_cpu_ids",
)  # fmt: skip
_KIND: Final = "struct cpuinfo_x86"
_MAX_WORDS: Final = 64
_MAX_CPUS: Final = 8192
_POWER_FLAGS: Final = 32


@dataclass(frozen=True, slots=True)
class Processor:
    """One online processor."""

    number: int
    vendor: bytes
    family: int
    model: int
    name: bytes
    stepping: int
    microcode: int
    khz: int
    cache_kb: int
    package: int
    siblings: int
    core: int
    cores: int
    apic: int
    initial_apic: int
    level: int  # of CPUID
    flags: tuple[bytes, ...]
    vmx_flags: tuple[bytes, ...] | None  # None: no VMX
    bugs: tuple[bytes, ...]
    loops_per_jiffy: int
    tlb_size: int
    flush_size: int
    cache_alignment: int
    physical_bits: int
    virtual_bits: int
    power: tuple[bytes, ...]


def read_processors(kernel: Kernel) -> tuple[Processor, ...]:
    """Describe each online processor.

    Raises:
        UnsupportedGuestError: This kernel does not tell what its flags are called.
    """
    kernel.symbols.learn(SYMBOLS)
    with guest_reads("reading the processors"):
        return tuple(_processors(kernel))


def boot_features(kernel: Kernel) -> tuple[int, int, int, int]:
    """Return vendor, family and model of the first processor, and all its features as bits.

    Source: Linux v6.1 ``drivers/base/cpu.c`` (``print_cpu_modalias``),
    ``arch/x86/include/asm/cpu_device_id.h``.
    """
    kernel.symbols.learn((*SYMBOLS, "boot_cpu_data"))
    at = variable(kernel, "boot_cpu_data")
    vendor, family, model = Fields(kernel, _KIND, "x86_vendor", "x86", "x86_model").read(at)
    words = _words(kernel, "x86_capability") - _bug_words(kernel)
    raw = kernel.virtual.read(VirtAddr(at + offset(kernel, _KIND, "x86_capability")), words * 4)
    return vendor, family, model, int.from_bytes(raw, "little")


def _processors(kernel: Kernel) -> Iterator[Processor]:
    topology = ("topo.pkg_id", "topo.core_id", "topo.apicid", "topo.initial_apicid")
    if not has_member(kernel, _KIND, "topo"):
        topology = ("phys_proc_id", "cpu_core_id", "apicid", "initial_apicid")
    fields = Fields(
        kernel, _KIND, "cpu_index", "x86_vendor_id", "x86", "x86_model", "x86_model_id",
        "x86_stepping", "microcode", "x86_cache_size", *topology, "booted_cores", "cpuid_level",
        "x86_tlbsize", "x86_clflush_size", "x86_cache_alignment", "x86_phys_bits", "x86_virt_bits",
        "x86_power", "loops_per_jiffy",
    )  # fmt: skip
    capabilities = _words(kernel, "x86_capability")
    bugs = _bug_words(kernel)
    at_bits = offset(kernel, _KIND, "x86_capability")
    names = _names(kernel, "x86_cap_flags", capabilities - bugs)
    bug_names = _names(kernel, "x86_bug_flags", bugs)
    vmx_names = _vmx_names(kernel)
    power_names = _names(kernel, "x86_power_flags", 1)
    khz = read_word(kernel, variable(kernel, "cpu_khz")) & 0xFFFF_FFFF
    online = int.from_bytes(kernel.prog["__cpu_online_mask"].to_bytes_(), "little")
    places = zip(each_cpu(kernel, "cpu_info"), each_cpu(kernel, "cpu_core_map"), strict=True)
    for at, core_map in places:
        (index, vendor, family, model, name, stepping, microcode, cache, package, core, apic,
         initial, cores, level, tlb, flush, alignment, physical, virtual,
         power, loops) = fields.read(at)  # fmt: skip
        if not online >> index & 1:
            continue
        bits = kernel.virtual.read(VirtAddr(at + at_bits), capabilities * 4)
        flags = _set(bits[: (capabilities - bugs) * 4], names)
        yield Processor(
            number=index,
            vendor=vendor.partition(b"\0")[0],
            family=family,
            model=model,
            name=name.partition(b"\0")[0],
            stepping=stepping,
            microcode=microcode,
            khz=khz,
            cache_kb=cache,
            package=package,
            siblings=_weight(kernel, core_map),
            core=core,
            cores=cores,
            apic=apic,
            initial_apic=initial,
            level=level,
            flags=flags,
            vmx_flags=_vmx(kernel, at, vmx_names) if b"vmx" in flags else None,
            bugs=_set(bits[(capabilities - bugs) * 4 :], bug_names),
            loops_per_jiffy=loops,
            tlb_size=tlb,
            flush_size=flush,
            cache_alignment=alignment,
            physical_bits=physical,
            virtual_bits=virtual,
            power=_power(power, power_names),
        )


def _words(kernel: Kernel, member: str) -> int:
    count: int = kernel.type(_KIND).member(member).type.length or 0
    if not 0 < count <= _MAX_WORDS:
        raise CorruptGuestError(f"a processor has {count} words of capabilities")
    return count


def _bug_words(kernel: Kernel) -> int:
    """Return NBUGINTS: how many of the words of capabilities tell of bugs.

    No type tells it. The two tables of names lie side by side, in that order.
    """
    size = variable(kernel, "x86_cap_flags") - variable(kernel, "x86_bug_flags")
    if size not in (1 * 32 * 8, 2 * 32 * 8):
        raise UnsupportedGuestError("this kernel does not tell how many bugs it knows")
    return size // (32 * 8)


def _names(kernel: Kernel, table: str, words: int) -> list[bytes]:
    """Return the names of 32 flags a word; an empty one is not shown."""
    at = VirtAddr(variable(kernel, table))
    pointers = struct.unpack(f"<{words * 32}Q", kernel.virtual.read(at, words * 32 * 8))
    return [read_string(kernel, one, 64) if one else b"" for one in pointers]


def _set(bits: bytes, names: list[bytes]) -> tuple[bytes, ...]:
    value = int.from_bytes(bits, "little")
    return tuple(name for number, name in enumerate(names) if name and value >> number & 1)


def _vmx_names(kernel: Kernel) -> list[bytes]:
    if kernel.symbols.address("x86_vmx_flags") is None:
        return []
    return _names(kernel, "x86_vmx_flags", _words(kernel, "vmx_capability"))


def _vmx(kernel: Kernel, at: int, names: list[bytes]) -> tuple[bytes, ...] | None:
    if not names:
        return None
    place = VirtAddr(at + offset(kernel, _KIND, "vmx_capability"))
    bits = kernel.virtual.read(place, len(names) // 8)
    return _set(bits, names) if any(bits[:4]) else None


def _power(bits: int, names: list[bytes]) -> tuple[bytes, ...]:
    found = []
    for number in range(_POWER_FLAGS):
        if bits >> number & 1:
            found.append(names[number] or b"[%d]" % number)
    return tuple(found)


def _weight(kernel: Kernel, core_map: int) -> int:
    """Count the processors of a package; the map is a pointer (CONFIG_CPUMASK_OFFSTACK)."""
    at = read_word(kernel, core_map)
    if at < 1 << 63:  # the bits themselves
        at = core_map
    count = read_word(kernel, variable(kernel, "nr_cpu_ids")) & 0xFFFF_FFFF
    if not 0 < count <= _MAX_CPUS:
        raise CorruptGuestError(f"the guest may have {count} processors")
    bits = int.from_bytes(kernel.virtual.read(VirtAddr(at), -(-count // 64) * 8), "little")
    return (bits & ((1 << count) - 1)).bit_count()
