"""The guest's kernel as a drgn program: memory, symbols, types, and a few declared globals.

BTF holds no global variables, so the ones that are used are declared here by name and type.
Reads go through our own page walk, in one callback each; drgn's helpers are not used for
walks, because they trust the links they follow.

Source: drgn 0.3 (``Program.set_linux_kernel_custom``, ``register_*_finder``); Linux
``arch/x86/include/asm/page_64_types.h`` (``__START_KERNEL_map``).
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import TYPE_CHECKING, Final

from drgn import (
    Architecture,
    FaultError,
    FindObjectFlags,
    Object,
    ObjectNotFoundError,
    Platform,
    PlatformFlags,
    Program,
    Symbol,
    SymbolBinding,
    SymbolKind,
    TypeMember,
    offsetof,
    sizeof,
)

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.kernel.btf import Btf
from ouassister.kernel.btf_types import BtfTypes
from ouassister.kernel.kallsyms import Kallsyms
from ouassister.memory import NotMappedError, VirtualMemory
from ouassister.model import PhysAddr, VirtAddr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drgn import Type

    from ouassister.kernel.vmcoreinfo import Vmcoreinfo
    from ouassister.memory import PhysicalMemory

_START_KERNEL_MAP: Final = 0xFFFF_FFFF_8000_0000
_KERNEL_HALF: Final = 0xFF00_0000_0000_0000  # with five levels; four levels use its upper part
_KERNEL_HALF_SIZE: Final = (1 << 56) - 1  # drgn wants the end to fit in 64 bits
_MAX_BTF_BYTES: Final = 64 << 20

# Global variables that are read; what a kernel does not have is not found, and named so.
GLOBALS: Final = {
    "__cpu_online_mask": "struct cpumask",
    "btf_modules": "struct list_head",
    "init_task": "struct task_struct",
    "init_uts_ns": "struct uts_namespace",
    "sysctl_bootid": "unsigned char [16]",
    "timekeeper_data": "struct tk_data [1]",
}
_OTHERS: Final = (
    "__start_BTF",
    "__stop_BTF",
    "e820_table_firmware",
    "linux_banner",
    "tk_core",
    "super_blocks",
    "selinux_state",
    "vmemmap_base",
)


_DRGN_LACKS: Final = (
    "has no member",
    "could not find",
    "does not have a",
    "'_drgn.Object' object has no attribute",  # a member of what is no structure
)


@contextlib.contextmanager
def guest_reads(what: str) -> Iterator[None]:
    """Turn what drgn and our finders raise into errors of ours; ``what`` is being read.

    Raises:
        CorruptGuestError: A pointer leads nowhere.
        UnsupportedGuestError: This kernel has no such variable, type or member.
    """
    try:
        yield
    except PageAbsentError as error:
        error.context = error.context or what
        raise
    except (NotMappedError, FaultError) as error:
        raise CorruptGuestError(f"a pointer of the kernel leads nowhere: {error}",
                                context=what) from error  # fmt: skip
    except ObjectNotFoundError as error:
        raise UnsupportedGuestError(f"this kernel has no variable {error.name}",
                                    context=what) from error  # fmt: skip
    except (AttributeError, LookupError) as error:
        text = str(error)
        # drgn's words for a missing member, type or length; anything else is our own defect
        if not any(words in text for words in _DRGN_LACKS):
            raise
        raise UnsupportedGuestError(f"this kernel is laid out otherwise: {text}",
                                    context=what) from error  # fmt: skip
    except (TypeError, ValueError, OverflowError, struct.error, RecursionError) as error:
        # A hostile type table gives any member any type: structures where numbers are, no size,
        # types of types without an end (drgn: "maximum type depth exceeded").
        raise UnsupportedGuestError(f"this kernel's types are not what they were: {error}",
                                    context=what) from error  # fmt: skip


class Image:
    """A kernel's memory and symbols, before its types are read.

    Args:
        memory: Guest-physical memory.
        note: The kernel's VMCOREINFO.

    Attributes:
        memory: Guest-physical memory.
        note: The kernel's VMCOREINFO.
        levels: Of its page tables.
        virtual: The kernel's address space.
        symbols: The kernel's symbols.

    Raises:
        CorruptGuestError: The note leads to nothing that looks like the kernel it names.
        UnsupportedGuestError: The kernel has no symbols, or is encrypted.
    """

    def __init__(self, memory: PhysicalMemory, note: Vmcoreinfo) -> None:
        self.memory = memory
        self.note = note
        self.levels = 5 if note.number("NUMBER(pgtable_l5_enabled)") else 4
        self.virtual = _address_space(memory, note, self.levels)
        with guest_reads("reading the kernel's symbols"):
            check_release(self.virtual, note)
            self.symbols = Kallsyms(self.virtual, note, (*GLOBALS, *_OTHERS))
            check_banner(self.virtual, note, self.symbols)


def check_release(virtual: VirtualMemory, note: Vmcoreinfo) -> None:
    """Refuse a note whose kernel calls itself otherwise.

    ``new_utsname`` is six fields of 65 bytes (v6.1, include/uapi/linux/utsname.h); the two numbers
    of VMCOREINFO spare us the types. Where the offset is missing, the name comes first, or behind
    a count (before 9a56493f6942, "uts: Use generic ns_common::count", v5.11).
    """
    uts = note.symbol("init_uts_ns")
    if uts is None:
        raise UnsupportedGuestError("VMCOREINFO does not tell where init_uts_ns is")
    offset = note.number("OFFSET(uts_namespace.name)")
    for place in (0, 4) if offset is None else (offset,):
        name = virtual.read(VirtAddr(uts + place + 2 * 65), 65)
        if name.partition(b"\0")[0] == note.release.encode():
            return
    raise CorruptGuestError(f"VMCOREINFO names release {note.release}, the kernel itself another")


def check_banner(virtual: VirtualMemory, note: Vmcoreinfo, symbols: Kallsyms) -> None:
    """Refuse symbols that lead to another kernel's banner (init/version-timestamp.c)."""
    banner = symbols.address("linux_banner")
    expected = f"Linux version {note.release} ".encode()
    if banner is not None and virtual.read(banner, len(expected)) != expected:
        raise CorruptGuestError(f"linux_banner is not where kallsyms of {note.release} says")


class Kernel:
    """A guest's kernel, ready to be asked.

    Args:
        image: Its memory and symbols.

    Attributes:
        prog: The drgn program.
        memory: Guest-physical memory.
        virtual: The kernel's address space.
        levels: Of its page tables.
        note: The kernel's VMCOREINFO.
        types: The kernel's own types.

    Raises:
        UnsupportedGuestError: The kernel carries no types.
        CorruptGuestError: Its types contradict themselves.
    """

    def __init__(self, image: Image) -> None:
        self.memory = image.memory
        self.note = image.note
        self.virtual = image.virtual
        self.levels = image.levels
        self.symbols = image.symbols
        flags = PlatformFlags.IS_64_BIT | PlatformFlags.IS_LITTLE_ENDIAN
        self.prog = Program(Platform(Architecture.X86_64, flags))
        for segment in self.memory.segments:
            self.prog.add_memory_segment(
                segment.address, segment.size_bytes, self._read_physical, physical=True
            )
        # drgn would import plug-ins now, its own debugger commands among them: 0.2 s, and code that
        # nobody asked for beside a hostile guest.
        os.environ.setdefault("DRGN_DISABLE_PLUGINS", "*")
        self.prog.set_linux_kernel_custom(self.note.text, is_live=False)
        self.prog.add_memory_segment(_KERNEL_HALF, _KERNEL_HALF_SIZE, self._read_virtual)
        self.prog.register_symbol_finder("ouassister", self._find_symbols, enable_index=0)
        self.types = BtfTypes(self.prog, self._read_btf())
        self.prog.register_type_finder("ouassister", self.types.find, enable_index=0)
        self.prog.register_object_finder("ouassister", self._find_object, enable_index=0)
        self._types: dict[str, Type] = {}
        self._offsets: dict[tuple[str, str], int] = {}

    def type(self, name: str) -> Type:
        """Return a type by its C name; drgn would ask the finder again each time."""
        found = self._types.get(name)
        if found is None:
            found = self._types[name] = self.prog.type(name)
        return found

    def container(self, type_name: str, member: str, address: int) -> Object:
        """Return the structure whose ``member`` lies at ``address`` (``container_of``)."""
        key = (type_name, member)
        offset = self._offsets.get(key)
        if offset is None:
            offset = self._offsets[key] = offsetof(self.type(type_name), member)
        return Object(self.prog, self.type(type_name), address=(address - offset) % (1 << 64))

    def _read_btf(self) -> Btf:
        start, stop = self.symbols.address("__start_BTF"), self.symbols.address("__stop_BTF")
        if start is None or stop is None:
            raise UnsupportedGuestError(
                f"kernel {self.note.release} carries no type information",
                hint="a kernel with CONFIG_DEBUG_INFO_BTF and CONFIG_KALLSYMS_ALL is needed",
            )
        if not 0 < stop - start <= _MAX_BTF_BYTES:
            raise CorruptGuestError(f"the kernel's BTF takes {stop - start} bytes")
        with guest_reads("reading the kernel's types"):
            return Btf(self.virtual.read(start, stop - start))

    # --- drgn's callbacks ------------------------------------------------------------------

    def _read_physical(self, address: int, count: int, _offset: int, _physical: bool) -> bytes:
        return self.memory.read(PhysAddr(address), count)

    def _read_virtual(self, address: int, count: int, _offset: int, _physical: bool) -> bytes:
        return self.virtual.read(VirtAddr(address), count)

    def _find_symbols(
        self, _prog: Program, name: str | None, address: int | None, _one: bool
    ) -> list[Symbol]:
        if name is None:  # by address: not needed yet, and it would expand the whole table
            return []
        found = self.symbols.address(name)
        if found is None or (address is not None and address != found):
            return []
        return [Symbol(name, found, 1, SymbolBinding.UNKNOWN, SymbolKind.UNKNOWN)]

    def _find_object(
        self, _prog: Program, name: str, flags: FindObjectFlags, _filename: str | None
    ) -> Object | None:
        kind: str | Type | None = None
        if flags & FindObjectFlags.VARIABLE:
            kind = self._tk_core_type() if name == "tk_core" else GLOBALS.get(name)
        if kind is None and flags & FindObjectFlags.FUNCTION:
            kind = self.types.function(name)
        if kind is None:
            return self.types.constant(name) if flags & FindObjectFlags.CONSTANT else None
        address = self.symbols.address(name)
        return None if address is None else Object(self.prog, kind, address=address)

    def _tk_core_type(self) -> Type:
        """Type of ``tk_core``, which BTF does not name: a seqcount, then the timekeeper.

        Source: Linux v6.1 kernel/time/timekeeping.c; the struct is named ``tk_data`` since
        "timekeeping: Define a struct type for tk_core to make it reusable" (v6.13).
        """
        with contextlib.suppress(LookupError):
            return self.prog.type("struct tk_data")
        seq = self.prog.type("seqcount_raw_spinlock_t")
        timekeeper = self.prog.type("struct timekeeper")
        start = -(-sizeof(seq) // 8) * 8
        return self.prog.struct_type(
            None,
            start + sizeof(timekeeper),
            (TypeMember(seq, "seq", 0), TypeMember(timekeeper, "timekeeper", start * 8)),
        )


def _address_space(memory: PhysicalMemory, note: Vmcoreinfo, levels: int) -> VirtualMemory:
    root = note.symbol("swapper_pg_dir")
    base = note.number("NUMBER(phys_base)")
    if root is None or base is None:
        raise UnsupportedGuestError("VMCOREINFO does not tell where the page tables are")
    if note.number("NUMBER(sme_mask)"):
        raise UnsupportedGuestError(
            "the guest's memory is encrypted (SEV)", hint="update such a guest while it runs"
        )
    return VirtualMemory(memory, PhysAddr(root - _START_KERNEL_MAP + base), levels)
