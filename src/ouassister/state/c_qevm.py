"""Constants of QEMU's migration stream, version 3 ("QEVM"); layout only, no behaviour.

Source: QEMU v7.2.0, ``migration/savevm.h`` and ``migration/savevm.c`` (stream, sections,
configuration), ``migration/ram.c`` (RAM records), ``migration/vmstate.c`` (subsections),
``scripts/analyze-migration.py`` (the same, as read by QEMU's own tool); commit "migration: Add
MIG_CMD_SWITCHOVER_START and its load handler", v10.0.0. All numbers are
big-endian; there is no alignment.

::

    stream      MAGIC be32, VERSION be32, configuration, section..., EOF, description
    configuration  CONFIGURATION u8, length be32, machine name, subsection...
    subsection  SUBSECTION u8, length u8, name, version be32, fields
    command     COMMAND u8, number be16, length be16, data
    section     START|FULL u8, id be32, length u8, name, instance be32, version be32, ..., footer
                PART|END u8, id be32, ..., footer
    footer      FOOTER u8, id be32
    description DESCRIPTION u8, length be32, JSON
    ram         record..., with the page address and the flags in one be64
"""

from __future__ import annotations

import struct
from typing import Final

MAGIC: Final = b"QEVM"  # QEMU_VM_FILE_MAGIC
VERSION: Final = 3  # QEMU_VM_FILE_VERSION

# QEMU_VM_*: the byte that opens each part of the stream
EOF: Final = 0x00
SECTION_START: Final = 0x01
SECTION_PART: Final = 0x02
SECTION_END: Final = 0x03
SECTION_FULL: Final = 0x04
SUBSECTION: Final = 0x05
DESCRIPTION: Final = 0x06
CONFIGURATION: Final = 0x07
COMMAND: Final = 0x08
SECTION_FOOTER: Final = 0x7E

# MIG_CMD_*: all others belong to postcopy, COLO and return paths
SWITCHOVER_START: Final = 11  # QEMU v10.0, between the last PART and the ENDs; no data

RAM_SECTION: Final = b"ram"
RAM_VERSION: Final = 4

# RAM_SAVE_FLAG_*: the low bits of a record's first word
FLAG_FULL: Final = 0x01
FLAG_ZERO: Final = 0x02  # one byte follows, the whole page is filled with it
FLAG_MEM_SIZE: Final = 0x04  # the list of blocks follows
FLAG_PAGE: Final = 0x08  # the page follows
FLAG_EOS: Final = 0x10  # end of this section's records
FLAG_CONTINUE: Final = 0x20  # same block as the record before, whose name is left out
FLAG_XBZRLE: Final = 0x40
FLAG_HOOK: Final = 0x80
FLAG_COMPRESS_PAGE: Final = 0x100
FLAG_MULTIFD_FLUSH: Final = 0x200  # QEMU v8.1

FLAG_NAMES: Final = {
    FLAG_FULL: "RAM_SAVE_FLAG_FULL",
    FLAG_XBZRLE: "RAM_SAVE_FLAG_XBZRLE",
    FLAG_HOOK: "RAM_SAVE_FLAG_HOOK",
    FLAG_COMPRESS_PAGE: "RAM_SAVE_FLAG_COMPRESS_PAGE",
    FLAG_MULTIFD_FLUSH: "RAM_SAVE_FLAG_MULTIFD_FLUSH",
}

PAGE_BITS: Final = 12  # TARGET_PAGE_BITS of x86
PAGE_SIZE: Final = 1 << PAGE_BITS
FLAG_MASK: Final = PAGE_SIZE - 1
PAGE_STRIDE: Final = 8 + PAGE_SIZE  # from one FLAG_PAGE|FLAG_CONTINUE record to the next
ZERO_STRIDE: Final = 8 + 1  # likewise for FLAG_ZERO|FLAG_CONTINUE

BE16: Final = struct.Struct(">H")
BE32: Final = struct.Struct(">I")
BE64: Final = struct.Struct(">Q")

# configuration/* subsections (savevm.c, vmstate_configuration)
TARGET_PAGE_BITS: Final = b"configuration/target-page-bits"  # be32
CAPABILITIES: Final = b"configuration/capabilities"  # be32 count, then (u8 length, name) each
UUID: Final = b"configuration/uuid"  # 16 bytes

# libvirt's own header in front of a stream (src/qemu/qemu_saveimage.h)
LIBVIRT_MAGICS: Final = (b"LibvirtQemudSave", b"LibvirtQemudPart")

MAIN_BLOCK: Final = b"pc.ram"  # hw/i386/pc.c, default_ram_id: all of the guest's base memory
