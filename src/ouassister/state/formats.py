"""Which formats of saved VMs are read, in one table; and what a file is, by its first bytes.

*full*: everything that an update needs. *partial*: memory can be looked at, and nothing else.
*refused*: known by name, with the reason. What is in no row is refused as unknown.

Source: QEMU v7.2.0 and v10.0.0 (``migration/``, ``block/qcow2-snapshot.c``, ``dump/dump.c``);
libvirt v11.3.0 ``src/qemu/qemu_saveimage.h``; Xen ``tools/xl/xl.h``
(``savefileheader_magic``), ``docs/specs/libxl-migration-stream.pandoc`` and
``libxc-migration-stream.pandoc``, ``tools/python/xen/migration/legacy.py``
("LinuxGuestRecord"), libvirt ``src/libxl/libxl_conf.h`` (``LIBXL_SAVE_MAGIC``); Firecracker
``src/vmm/src/snapshot/mod.rs`` (``SNAPSHOT_MAGIC_ID``); Cloud Hypervisor
``docs/snapshot_restore.md`` (``config.json``, ``state.json``, ``memory-ranges``); volatility3
``volatility3/framework/layers/vmware.py`` (VMware's four magics); VirtualBox
``src/VBox/VMM/VMMR3/SSM.cpp`` (``SSMFILEHDR_MAGIC_BASE``); dissect.hypervisor ``c_hyperv.py``
(``SIGNATURE_STORAGE_HEADER``); QEMU ``include/qemu/win_dump_defs.h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from ouassister.errors import UnsupportedStateError

if TYPE_CHECKING:
    from pathlib import Path


class Support(StrEnum):
    """How far a format is supported."""

    FULL = "full"
    PARTIAL = "partial"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class SaveFormat:
    """One row. ``magics`` are first bytes of files; any of them tells the format."""

    name: str
    title: str
    support: Support
    note: str
    magics: tuple[bytes, ...] = ()


_DUMP_NOTE: Final = (
    "a copy of memory without device state, of a VM that was not necessarily paused: it can be"
    " inspected, never updated or resumed"
)
_EXPANDED: Final = "expanded once into a spool file"
_XEN: Final = "Xen's layout of guest memory (p2m, PV page tables) is not read"

QEMU_STREAM: Final = SaveFormat(
    "qemu-stream",
    "QEMU migration stream (migrate fd:, exec:, file:)",
    Support.FULL,
    "version 3; refused: XBZRLE, compressed pages, postcopy, x-ignore-shared, DIMM and virtio-mem",
    (b"QEVM",),
)
QEMU_MAPPED_RAM: Final = SaveFormat(
    "qemu-mapped-ram",
    "QEMU migration file with mapped-ram, with or without multifd and direct-io",
    Support.FULL,
    "QEMU 9.0 and later",
)
LIBVIRT: Final = tuple(
    SaveFormat(f"libvirt-{name}", f"libvirt save or managedsave image, {name}", Support.FULL, note)
    for name, note in (
        ("raw", "header version 2"),
        ("gzip", _EXPANDED),
        ("bzip2", _EXPANDED),
        ("xz", _EXPANDED),
        ("lzop", f"{_EXPANDED}; needs the program lzop"),
        ("zstd", f"{_EXPANDED}; needs the program zstd"),
        ("sparse", "libvirt 11.2 and later: mapped-ram behind libvirt's header"),
    )
)
LIBVIRT_MAGICS: Final = (b"LibvirtQemudSave", b"LibvirtQemudPart")
QCOW2_SNAPSHOT: Final = SaveFormat(
    "qcow2-vmstate",
    "internal snapshot of a qcow2 image (savevm)",
    Support.PARTIAL,
    "its disk is the snapshot's, not the image's present one: it can be inspected, never updated"
    " or resumed",
    (b"QFI\xfb",),
)
ELF_DUMP: Final = SaveFormat(
    "elf-dump",
    "dump-guest-memory, ELF, with or without paging",
    Support.PARTIAL,
    _DUMP_NOTE,
    (b"\x7fELF",),
)
KDUMP: Final = SaveFormat(
    "kdump",
    "dump-guest-memory, kdump-compressed (zlib, lzo, snappy), flattened or not",
    Support.PARTIAL,
    _DUMP_NOTE,
    (b"KDUMP   ", b"makedumpfile\0\0\0\0"),
)
CLOUD_HYPERVISOR: Final = SaveFormat(
    "cloud-hypervisor",
    "Cloud Hypervisor snapshot (config.json, state.json, memory-ranges)",
    Support.REFUSED,
    "its state.json, which tells where memory-ranges lie, follows the program's version",
)

FORMATS: Final[tuple[SaveFormat, ...]] = (
    QEMU_STREAM,
    QEMU_MAPPED_RAM,
    *LIBVIRT,
    QCOW2_SNAPSHOT,
    ELF_DUMP,
    KDUMP,
    SaveFormat(
        "xen-xl",
        "Xen, saved by xl",
        Support.REFUSED,
        _XEN,
        (b"Xen saved domain, xl format\n \0 \r",),
    ),
    SaveFormat(
        "xen-libvirt",
        "Xen, saved by libvirt's libxl driver",
        Support.REFUSED,
        _XEN,
        (b"libvirt-xml\n \0 \r",),
    ),
    SaveFormat("xen-libxl", "Xen, bare libxl stream", Support.REFUSED, _XEN, (b"LibxlFmt",)),
    SaveFormat(
        "xen-libxc",
        "Xen, bare libxc stream",
        Support.REFUSED,
        _XEN,
        (b"\xff" * 8 + b"XENF", b"\xff" * 8 + b"FNEX"),
    ),
    SaveFormat("xen-xend", "Xen, saved by xend", Support.REFUSED, _XEN, (b"LinuxGuestRecord",)),
    SaveFormat(
        "firecracker",
        "Firecracker snapshot (its vmstate file; the memory file has no mark)",
        Support.REFUSED,
        "its vmstate, which tells where the memory file lies, follows the program's version",
        (
            0x0710_1984_8664_0000.to_bytes(8, "little"),
            0x0710_1984_AAAA_0000.to_bytes(8, "little"),
        ),
    ),
    CLOUD_HYPERVISOR,
    SaveFormat(
        "vmware",
        "VMware suspended state or snapshot (.vmss, .vmsn)",
        Support.REFUSED,
        "no published specification; memory may lie in a .vmem file beside it",
        (b"\xd0\xbe\xd2\xbe", b"\xd1\xba\xd1\xba", b"\xd2\xbe\xd2\xbe", b"\xd3\xbe\xd3\xbe"),
    ),
    SaveFormat(
        "virtualbox",
        "VirtualBox saved state (.sav)",
        Support.REFUSED,
        "made of units whose layouts follow the program's version",
        (b"\x7fVirtualBox SavedState ",),
    ),
    SaveFormat(
        "hyper-v",
        "Hyper-V saved state (.vmrs)",
        Support.REFUSED,
        "no published specification; .bin and .vsv files of older versions have no mark",
        ((0x01282014).to_bytes(4, "little"),),
    ),
    SaveFormat(
        "windows-dump",
        "Windows crash dump (dump-guest-memory win-dmp)",
        Support.REFUSED,
        "made of Windows guests alone, and a Linux kernel is read",
        (b"PAGEDU64", b"PAGEDUMP"),
    ),
)
HEAD_BYTES: Final = 64
_CLOUD_HYPERVISOR_FILE: Final = "state.json"


def libvirt_format(name: str) -> SaveFormat:
    """Return the row of libvirt's image format."""
    return next(row for row in LIBVIRT if row.name == f"libvirt-{name}")


def detect(path: Path, head: bytes) -> SaveFormat | None:
    """Tell the format of a file by its first `HEAD_BYTES` bytes; None for a libvirt image.

    Raises:
        UnsupportedStateError: The format is refused, or unknown.
    """
    if head.startswith(LIBVIRT_MAGICS) or (head and LIBVIRT_MAGICS[0].startswith(head)):
        return None
    for row in FORMATS:
        for magic in row.magics:
            if head.startswith(magic) or (head and magic.startswith(head)):
                if row.support is Support.REFUSED:
                    raise UnsupportedStateError("magic", 0, head[: len(magic)], _reason(row))
                return row
    if path.name in (_CLOUD_HYPERVISOR_FILE, "memory-ranges", "config.json") and (
        path.with_name(_CLOUD_HYPERVISOR_FILE).exists()
    ):
        raise UnsupportedStateError("save file", 0, path.name, _reason(CLOUD_HYPERVISOR))
    raise UnsupportedStateError("magic", 0, head[:16], "of no format that is known")


def detect_folder(path: Path) -> None:
    """Refuse a folder, by name where it is a snapshot.

    Raises:
        UnsupportedStateError: Always, when there is a folder at ``path``.
    """
    if path.is_dir():
        known = (path / _CLOUD_HYPERVISOR_FILE).exists()
        reason = _reason(CLOUD_HYPERVISOR) if known else "a folder"
        raise UnsupportedStateError("save file", 0, str(path), reason)


def _reason(row: SaveFormat) -> str:
    return f"{row.title} is not supported: {row.note}"
