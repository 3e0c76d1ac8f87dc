"""Which RAM blocks are the guest's base memory, and in which order.

A stream names its blocks and nothing else: neither their addresses nor what they are for. Base
memory is ``pc.ram``, or the blocks of the memory back ends that the NUMA nodes were given, one
behind the other in the order of the nodes. QEMU sorts the list by size, so its order tells
nothing. Names are the back ends' ids: libvirt numbers them by node (``ram-node0``). A caller who
knows QEMU's command line can say better.

Source: QEMU v7.2.0 ``hw/i386/pc.c`` (``default_ram_id``), ``hw/core/numa.c``
(``numa_init_memory_layout``), ``softmmu/physmem.c`` (``qemu_ram_set_idstr``, ``ram_block_add``),
``hw/pci/pci.c`` (``pcibus_get_dev_path``), ``hw/core/loader.c`` (``/rom@``), ``hw/i386/x86.c``
(``x86_bios_rom_init``), ``hw/i386/pc_sysfw.c`` (``system.flash0``); libvirt v11.3.0
``src/qemu/qemu_command.c`` (``qemuBuildMemoryBackendProps``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ouassister.errors import UnsupportedStateError
from ouassister.state.c_qevm import MAIN_BLOCK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ouassister.state.ram_table import RamBlock

# <PCI address>/<name>, ROM images of fw_cfg, and blocks of boards and ISA devices
_DEVICE: Final = re.compile(
    rb"[0-9a-f]{4}:[0-9a-f]{2}(?::[0-9a-f]{2}\.[0-7])+/.+|/rom@.+"
    rb"|pc\.bios|pc\.rom|vga\.vram|system\.flash[01]|isa-bios|ramfb|tpm-ppi"
)
_NUMBERED: Final = re.compile(rb"(.*?)(0|[1-9][0-9]*)")


def base_memory(
    blocks: Mapping[bytes, RamBlock], names: Sequence[bytes] = ()
) -> tuple[RamBlock, ...]:
    """Return the blocks of base memory, in their order.

    Args:
        blocks: All blocks of the stream.
        names: Base memory's blocks in their order, where somebody knows them.

    Raises:
        UnsupportedStateError: It cannot be told which they are, or there is memory that was
            plugged in.
    """
    if names:
        missing = [name for name in names if name not in blocks]
        if missing:
            _refuse(missing, "no such block is in the list")
        return tuple(blocks[name] for name in names)
    others = [name for name in blocks if not _DEVICE.fullmatch(name)]
    if not others:
        _refuse(list(blocks), "base memory is not among them")
    if MAIN_BLOCK in others and len(others) > 1:
        others.remove(MAIN_BLOCK)
        _refuse(others, "neither base memory nor of a device that is known (memory plugged in?)")
    return tuple(blocks[name] for name in _in_order(others))


def _in_order(names: list[bytes]) -> list[bytes]:
    if len(names) == 1:
        return names
    numbers: dict[int, bytes] = {}
    stems = set()
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match is not None:
            stems.add(match[1])
            numbers[int(match[2])] = name
    if len(stems) != 1 or sorted(numbers) != list(range(len(names))):
        _refuse(names, "which of them are base memory, and in which order, is not in a stream")
    return [numbers[number] for number in sorted(numbers)]


def _refuse(names: list[bytes], reason: str) -> None:
    listed = ", ".join(name.decode(errors="replace") for name in names)
    raise UnsupportedStateError("RAM block list", 0, listed, reason)
