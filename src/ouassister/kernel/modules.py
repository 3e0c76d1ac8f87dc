"""Types of loadable modules, from the BTF that a kernel keeps for each.

Source: Linux v6.1 ``kernel/bpf/btf.c`` (``struct btf_module``, ``btf_modules``),
``include/linux/btf.h``; module BTF since 36e68442d1af ("bpf: Load and verify kernel module
BTFs", v5.11); a kernel before that has no types of what it loaded as a module. A module's table
extends the kernel's own. One that was built against a reduced copy of it (``.BTF.base``) is
rewritten to the real one when it is loaded (8646db238997, "libbpf,bpf: Share BTF relocate-related
code with kernel", v6.11), so that what is in memory is the same for both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel import walk
from ouassister.kernel.btf import Btf
from ouassister.kernel.btf_types import BtfTypes
from ouassister.kernel.program import guest_reads
from ouassister.model import VirtAddr

if TYPE_CHECKING:
    from drgn import Type

    from ouassister.kernel.program import Kernel

_MAX_MODULES: Final = 4096
_MAX_BYTES: Final = 32 << 20


def module_types(kernel: Kernel, name: str) -> BtfTypes:
    """Return the types of one loaded module.

    Raises:
        UnsupportedGuestError: It is not loaded, or this kernel keeps no types for it.
    """
    with guest_reads(f"reading the types of module {name}"):
        if kernel.symbols.address("btf_modules") is None:
            raise UnsupportedGuestError(f"this kernel keeps no types of modules, and {name} is one")
        head = kernel.prog["btf_modules"].address_of_().value_()
        for node in walk.list_nodes(kernel, head, _MAX_MODULES):
            entry = kernel.container("struct btf_module", "list", node)
            if entry.module.name.string_() != name.encode():
                continue
            start, size = entry.btf.data.value_(), entry.btf.data_size.value_()
            if size > _MAX_BYTES:
                raise CorruptGuestError(f"the types of module {name} take {size} bytes")
            raw = kernel.virtual.read(VirtAddr(start), size)
            return BtfTypes(kernel.prog, Btf(raw, kernel.types.btf))
    raise UnsupportedGuestError(f"the kernel keeps no types of a module {name}")


def struct(types: BtfTypes, name: str) -> Type:
    """Return a structure type of a module.

    Raises:
        UnsupportedGuestError: The module has none of that name.
    """
    found = types.struct(name)
    if found is None:
        raise UnsupportedGuestError(f"the module has no struct {name}")
    return found
