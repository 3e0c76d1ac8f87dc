"""Processors, memory and settings of the kernel below /sys.

Source: Linux v6.1 ``drivers/base/`` (``cpu.c``, ``topology.c``, ``cacheinfo.c``),
``arch/x86/include/asm/topology.h``, ``kernel/ksysfs.c``, ``mm/huge_memory.c`` (``enabled_show``),
``include/linux/kobject.h`` (``uevent_seqnum``). The topology of x86 is ``topo`` in cpuinfo_x86
since b9655e702dc5 ("x86/cpu: Encapsulate topology information in cpuinfo_x86", v6.7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import UnsupportedGuestError
from ouassister.kernel.cpuinfo import SYMBOLS as CPU_SYMBOLS
from ouassister.kernel.fields import (
    Fields,
    has_member,
    labels,
    offset,
    read_word,
    size_of,
    variable,
)
from ouassister.kernel.percpu import each_cpu
from ouassister.model import VirtAddr
from ouassister.shadow.sysfs.look import UntoldError, cpu_list, line, number

if TYPE_CHECKING:
    from ouassister.shadow.sysfs.look import Look

_MASKS: Final = ("online", "possible", "present")
_MAX_CPUS: Final = 8192
_MAX_LEAVES: Final = 64
_CACHES: Final = {1: b"Instruction", 2: b"Data", 4: b"Unified"}  # enum cache_type
_WORDS: Final = {  # file below /sys/kernel, variable, and its size
    b"uevent_seqnum": ("uevent_seqnum", 8), b"fscaps": ("file_caps_enabled", 4),
    b"profiling": ("prof_on", 4), b"rcu_expedited": ("rcu_expedited", 4),
    b"rcu_normal": ("rcu_normal", 4),
}  # fmt: skip
_LOADED: Final = {b"kexec_loaded": "kexec_image", b"kexec_crash_loaded": "kexec_crash_image"}
_SHARED: Final = {  # files of topology, and the variable that each processor has
    "cpu_sibling_map": (b"thread_siblings", b"core_cpus"),
    "cpu_core_map": (b"core_siblings", b"package_cpus"),
    "cpu_die_map": (b"die_cpus",),
}
_NODE_STATES: Final = {  # file, and the enumerator of what nodes are
    b"possible": "N_POSSIBLE", b"online": "N_ONLINE", b"has_normal_memory": "N_NORMAL_MEMORY",
    b"has_memory": "N_MEMORY", b"has_cpu": "N_CPU", b"has_generic_initiator": "N_GENERIC_INITIATOR",
}  # fmt: skip
_HUGE: Final = "transparent_hugepage_flags"
SYMBOLS: Final = (
    *CPU_SYMBOLS, *(name for name, _ in _WORDS.values()), *_LOADED.values(), *_SHARED,
    *(f"__cpu_{name}_mask" for name in _MASKS), "ci_cpu_cacheinfo", "total_cpus", _HUGE,
    "node_states", "node_to_cpumask_map",
)  # fmt: skip


class System:
    """Renders what belongs to no device.

    Args:
        look: The tree.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        self._kernel = look.kernel

    # --- the kernel ---

    def kernel(self, folder: int) -> None:
        """Fill /sys/kernel."""
        for name, (symbol, size) in _WORDS.items():
            if (address := self._kernel.symbols.address(symbol)) is not None:
                raw = self._kernel.virtual.read(address, size)
                value = int.from_bytes(raw, "little", signed=size < 8)
                self._look.give(folder, name, number(value))
        for name, symbol in _LOADED.items():
            if (address := self._kernel.symbols.address(symbol)) is not None:
                self._look.give(folder, name, number(bool(read_word(self._kernel, address))))

    def huge_pages(self, folder: int) -> None:
        """Fill /sys/kernel/mm/transparent_hugepage."""
        flags = read_word(self._kernel, variable(self._kernel, _HUGE))
        bits = labels(self._kernel.type("enum transparent_hugepage_flag"))
        always = flags >> bits["TRANSPARENT_HUGEPAGE_FLAG"] & 1
        asked = flags >> bits["TRANSPARENT_HUGEPAGE_REQ_MADV_FLAG"] & 1
        chosen = b"always" if always else b"madvise" if asked else b"never"
        words = (
            b"[%s]" % one if one == chosen else one for one in (b"always", b"madvise", b"never")
        )
        self._look.give(folder, b"enabled", line(b" ".join(words)))
        zero = flags >> bits["TRANSPARENT_HUGEPAGE_USE_ZERO_PAGE_FLAG"] & 1
        self._look.give(folder, b"use_zero_page", number(zero))
        self._look.give(folder, b"hpage_pmd_size", number(2 << 20))

    # --- processors ---

    def processors(self, folder: int) -> None:
        """Fill /sys/devices/system/cpu."""
        masks = {}
        for name in _MASKS:
            masks[name] = self._mask(variable(self._kernel, f"__cpu_{name}_mask"))
            self._look.give(folder, name.encode(), cpu_list(masks[name]))
        size = self._kernel.type("struct cpumask").size or 0
        self._look.give(folder, b"kernel_max", number(size * 8 - 1))
        count = self._word("nr_cpu_ids")
        if count <= _MAX_CPUS and self._word("total_cpus") <= count:
            away = [cpu for cpu in range(count) if cpu not in masks["online"]]
            self._look.give(folder, b"offline", cpu_list(away))
        places = list(each_cpu(self._kernel, "cpu_info"))
        self._each(folder, masks, places)

    def _each(self, folder: int, masks: dict[str, list[int]], places: list[int]) -> None:
        kernel, of = self._kernel, "struct cpuinfo_x86"
        names = ("topo.pkg_id", "topo.core_id", "topo.die_id")
        if not has_member(kernel, of, "topo"):
            names = ("phys_proc_id", "cpu_core_id", "cpu_die_id")
        fields = Fields(kernel, of, *names)
        shared = {}
        for symbol in _SHARED:
            if kernel.symbols.address(symbol) is not None:
                shared[symbol] = list(each_cpu(kernel, symbol))
        for cpu, place in zip(masks["possible"], places, strict=True):
            one = self._look.find(b"cpu%d" % cpu, folder)
            if one is None:
                continue
            self._look.give(one, b"online", number(cpu in masks["online"]))
            topology = self._look.find(b"topology", one)
            if topology is None:
                continue
            for name, value in zip(
                (b"physical_package_id", b"core_id", b"die_id"), fields.read(place), strict=True
            ):
                self._look.give(topology, name, number(value))
            for symbol, at in shared.items():
                mask = self._mask(self._mask_address(at[masks["possible"].index(cpu)]))
                for name in _SHARED[symbol]:
                    self._give_mask(topology, name, mask)
        self._cache_folders(folder, masks["possible"])

    def _cache_folders(self, folder: int, possible: list[int]) -> None:
        kernel = self._kernel
        if kernel.symbols.address("ci_cpu_cacheinfo") is None:
            return
        info = Fields(kernel, "struct cpu_cacheinfo", "info_list", "num_leaves")
        of = "struct cacheinfo"
        leaf = Fields(kernel, of, "id", "type", "level", "coherency_line_size", "number_of_sets",
                      "ways_of_associativity", "physical_line_partition", "size")  # fmt: skip
        map_at = offset(kernel, of, "shared_cpu_map")
        step = kernel.type(of).size or 0
        for cpu, at in zip(possible, each_cpu(kernel, "ci_cpu_cacheinfo"), strict=True):
            first, count = info.read(at)
            for index in range(min(count, _MAX_LEAVES)):
                place = self._look.find(b"cpu%d/cache/index%d" % (cpu, index), folder)
                if place is None:
                    continue
                (number_, kind, level, line_size, sets, ways, partition, size) = leaf.read(
                    first + index * step
                )
                told = {
                    b"id": number(number_),
                    b"level": number(level),
                    b"coherency_line_size": number(line_size),
                    b"number_of_sets": number(sets),
                    b"ways_of_associativity": number(ways),
                    b"physical_line_partition": number(partition),
                    b"size": b"%dK\n" % (size >> 10),
                }
                if kind in _CACHES:
                    told[b"type"] = line(_CACHES[kind])
                for name, content in told.items():
                    self._look.give(place, name, content)
                mask = self._mask(first + index * step + map_at)
                self._give_mask(place, b"shared_cpu", mask, b"_map", b"_list")

    # --- memory ---

    def memory_nodes(self, folder: int) -> None:
        """Fill /sys/devices/system/node: which processors are near to which memory."""
        kernel = self._kernel
        states = variable(kernel, "node_states")
        places = labels(kernel.type("enum node_states"))
        size = size_of(kernel, "nodemask_t")
        nodes: list[int] = []
        for name, label in _NODE_STATES.items():
            if label not in places:
                continue
            raw = kernel.virtual.read(VirtAddr(states + places[label] * size), size)
            value = int.from_bytes(raw, "little")
            found = [node for node in range(size * 8) if value >> node & 1]
            self._look.give(folder, name, cpu_list(found))
            nodes = found if name == b"possible" else nodes
        online = self._mask(variable(kernel, "__cpu_online_mask"))
        each = variable(kernel, "node_to_cpumask_map")
        step = size_of(kernel, "cpumask_var_t")
        for node in nodes:
            place = self._look.find(b"node%d" % node, folder)
            if place is not None:
                near = self._mask(self._mask_address(each + node * step))
                mask = [cpu for cpu in near if cpu in online]
                self._give_mask(place, b"cpu", mask, b"map", b"list")

    def _give_mask(
        self,
        folder: int,
        name: bytes,
        mask: list[int],
        bits: bytes = b"",
        numbers: bytes = b"_list",
    ) -> None:
        self._look.give(folder, name + numbers, cpu_list(mask))
        self._look.give(folder, name + bits, self._hexadecimal(mask))

    def _hexadecimal(self, mask: list[int]) -> bytes:
        """Render a mask as %*pb does: groups of 32 bits, as many as there may be processors."""
        count = self._word("nr_cpu_ids")
        if not 0 < count <= _MAX_CPUS:
            raise UntoldError("a number of processors")
        value = sum(1 << cpu for cpu in mask)
        groups = []
        for start in range((count - 1) // 32 * 32, -1, -32):
            digits = -(-min(32, count - start) // 4)
            groups.append(b"%0*x" % (digits, value >> start & 0xFFFF_FFFF))
        return b",".join(groups) + b"\n"

    def _mask_address(self, at: int) -> int:
        """Return where a ``cpumask_var_t`` is: behind a pointer, where masks are long."""
        kind = self._kernel.type("cpumask_var_t")
        return read_word(self._kernel, at) if kind.type.kind.name == "POINTER" else at

    def _mask(self, address: int) -> list[int]:
        """Read a mask; one that is allocated is no longer than there may be processors."""
        count = self._word("nr_cpu_ids")
        if not 0 < count <= _MAX_CPUS:
            raise UntoldError("a number of processors")
        raw = self._kernel.virtual.read(VirtAddr(address), -(-count // 64) * 8)
        value = int.from_bytes(raw, "little")
        return [cpu for cpu in range(count) if value >> cpu & 1]

    def _word(self, symbol: str) -> int:
        if self._kernel.symbols.address(symbol) is None:
            raise UnsupportedGuestError(f"this kernel has no variable {symbol}")
        raw = self._kernel.virtual.read(VirtAddr(variable(self._kernel, symbol)), 4)
        return int.from_bytes(raw, "little")
