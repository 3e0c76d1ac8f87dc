"""Layout of mapped-ram: where QEMU puts pages at fixed places of the migration file; no behaviour.

In the list of blocks each block is followed by a header, a bitmap with one bit for each page
that was written, padding, and the pages; the next block's name comes behind the pages. Offsets
count from the start of the *file*, which matters where libvirt's header stands before the
stream. The header's numbers are big-endian; the bitmap is made of the host's ``unsigned long``,
on x86-64 the same as bytes with the lowest bit first. A page without its bit is zero, whatever
stands at its place.

Source: QEMU v9.0.0 ``migration/ram.c`` (``MappedRamHeader``, ``mapped_ram_setup_ramblock``,
``ram_save_file_bmap``), ``docs/devel/migration/mapped-ram.rst``.
"""

from __future__ import annotations

import struct
from typing import Final

CAPABILITY: Final = b"mapped-ram"
VERSION: Final = 1  # MAPPED_RAM_HDR_VERSION
HEADER: Final = struct.Struct(">IQQQ")  # version, page_size, bitmap_offset, pages_offset
_LONG_BITS: Final = 64


def bitmap_bytes(pages: int) -> int:
    """Return the length of the bitmap of a block."""
    return (pages + _LONG_BITS - 1) // _LONG_BITS * 8
