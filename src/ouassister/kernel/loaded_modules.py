"""Loaded modules, as lsmod shows them.

Source: Linux v6.1 ``include/linux/module.h`` (``struct module``, ``MODULE_REF_BASE``),
``kernel/module/procfs.c`` (``m_show``), ``kernel/module/internal.h`` (``struct module_use``). A
module's memory is an array since ac3b43283923 ("module: replace module_layout with
module_memory", v6.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.guest_model import Module
from ouassister.kernel import walk
from ouassister.kernel.fields import Fields, has_member, offset, variable
from ouassister.kernel.program import guest_reads
from ouassister.model import VirtAddr
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.kernel.program import Kernel

_MAX_MODULES: Final = 1 << 12
_MAX_USES: Final = 1 << 15  # of all modules
_REF_BASE: Final = 1
_STATES: Final = ("live", "coming", "going", "unformed")


def read_modules(kernel: Kernel) -> tuple[Module, ...]:
    """Describe each module, the last loaded first.

    Raises:
        CorruptGuestError: A list does not end.
    """
    with guest_reads("reading the list of modules"):
        place = offset(kernel, "struct module", "list")
        fields = Fields(kernel, "struct module", "state", "name", "taints", "refcnt.counter")
        names = Fields(kernel, "struct module", "name")
        users = offset(kernel, "struct module", "source_list")
        use = Fields(kernel, "struct module_use", "source")
        use_node = offset(kernel, "struct module_use", "source_list")
        size = _size(kernel)
        found: list[Module] = []
        uses = 0
        for node in walk.list_nodes(kernel, variable(kernel, "modules"), _MAX_MODULES):
            address = node - place
            state, name, taints, references = fields.read(address)
            used_by = tuple(
                _text(names.read(use.read(one - use_node)[0])[0])
                for one in walk.list_nodes(kernel, address + users, _MAX_USES - uses)
            )
            uses += len(used_by)
            found.append(
                Module(
                    name=_text(name),
                    size=size(address),
                    references=references - _REF_BASE,
                    used_by=used_by,
                    state=_STATES[state] if state < len(_STATES) else str(state),
                    taints=taints,
                )
            )
        return tuple(found)


def _size(kernel: Kernel) -> Callable[[int], int]:
    if not has_member(kernel, "struct module", "mem"):
        layouts = Fields(kernel, "struct module", "core_layout.size", "init_layout.size")
        return lambda module: sum(layouts.read(module))
    first = offset(kernel, "struct module", "mem")
    kind = kernel.type("struct module").member("mem").type
    step, count = kind.type.size or 0, kind.length or 0
    at = offset(kernel, "struct module_memory", "size")

    def total(module: int) -> int:
        raw = kernel.virtual.read(VirtAddr(module + first), step * count)
        return sum(
            int.from_bytes(raw[place : place + 4], "little")
            for place in range(at, step * count, step)
        )

    return total


def _text(name: bytes) -> str:
    return to_text(name.partition(b"\0")[0])
