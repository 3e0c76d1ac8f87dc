"""``dump-guest-memory`` as an ELF core file, with or without paging.

Each PT_LOAD tells a guest-physical range and where it lies in the file. With paging there is one
for each virtual mapping as well, so that ranges repeat and overlap; all must agree. Only a dump
whose notes name QEMU is taken: a core file of a process looks the same but has no physical
addresses. A guest that was not in 64-bit mode gives a 32-bit file, which is refused.

Source: QEMU v7.2.0 ``dump/dump.c`` (``write_elf64_header``, ``write_elf64_load``,
``get_offset_range``), ``target/i386/arch_dump.c`` (``cpu_write_qemu_note``,
``cpu_get_dump_info``); ``elf(5)``.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ouassister.errors import UnsupportedStateError
from ouassister.state.c_qevm import PAGE_SIZE
from ouassister.state.data import MappedFile, Reader
from ouassister.state.dump import MAX_RANGES, Dump, DumpRange

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_IDENT: Final = struct.Struct("<4sBBB9x")
_HEADER: Final = struct.Struct("<HHIQQQIHHHHHH")  # behind e_ident
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_NOTE: Final = struct.Struct("<III")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SECTION_INFO: Final = 44  # sh_info in Elf64_Shdr
_MAX_SECTIONS: Final = 64  # QEMU 7.2 writes 2
_CLASS64: Final = 2
_LITTLE: Final = 1
_ET_CORE: Final = 4
_EM_X86_64: Final = 62
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_PN_XNUM: Final = 0xFFFF
_MAX_SEGMENTS: Final = 1 << 22
_MAX_NOTES: Final = 64 << 20
_MAX_ADDRESS: Final = 1 << 52


def open_elf(path: Path, file: MappedFile) -> Dump:
    """Index a dump; it takes over the mapped file.

    Raises:
        TruncatedStateError: It ends early.
        UnsupportedStateError: It is no dump of QEMU, or something in it was never seen before.
    """
    reader = Reader(file, str(path))
    _magic, bits, order, _version = _IDENT.unpack(reader.bytes(0, _IDENT.size, "ELF header"))
    if bits != _CLASS64:
        raise UnsupportedStateError("EI_CLASS", 4, bits, "the guest was not in 64-bit mode")
    if order != _LITTLE:
        raise UnsupportedStateError("EI_DATA", 5, order)
    head = _HEADER.unpack(reader.bytes(_IDENT.size, _HEADER.size, "ELF header"))
    kind, machine, _, _, table, sections, _, _, entry, count, _, section_count, _ = head
    if kind != _ET_CORE:
        raise UnsupportedStateError("e_type", 16, kind, "not a core file")
    if machine != _EM_X86_64:
        raise UnsupportedStateError("e_machine", 18, machine, "the guest was not in 64-bit mode")
    if entry != _PROGRAM.size:
        raise UnsupportedStateError("e_phentsize", 54, entry)
    if count == _PN_XNUM:
        raw = reader.bytes(sections + _SECTION_INFO, 4, "section header")
        count = int.from_bytes(raw, "little")
    if not 0 < count <= _MAX_SEGMENTS:
        raise UnsupportedStateError("e_phnum", 56, count)
    reader.need(table, count * entry, "program headers")
    _check_sections(reader, sections, section_count)
    loads = []
    from_qemu = False
    for at, program in _programs(file, table, count):
        kind, _, offset, _, address, size, *_ = program
        if kind == _PT_NOTE:
            from_qemu = from_qemu or _has_qemu_note(reader, at, offset, size)
        elif kind != _PT_LOAD:
            raise UnsupportedStateError("p_type", at, kind)
        elif size:
            if address % PAGE_SIZE or size % PAGE_SIZE or address + size > _MAX_ADDRESS:
                raise UnsupportedStateError("p_paddr", at + 24, (address, size))
            reader.need(offset, size, "memory of a program header")
            loads.append(DumpRange(address, size, offset))
    if not from_qemu:
        raise UnsupportedStateError("notes", table, "no QEMU", "not a dump that QEMU wrote")
    return Dump(path, file, _merged(loads, table))


def _programs(file: MappedFile, table: int, count: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    for index in range(count):
        at = table + index * _PROGRAM.size
        yield at, _PROGRAM.unpack_from(file, at)


def _check_sections(reader: Reader, table: int, count: int) -> None:
    """Since 7.2 the names of sections end the file; without them it was cut."""
    if count > _MAX_SECTIONS:
        raise UnsupportedStateError("e_shnum", 60, count)
    for at in range(table, table + count * _SECTION.size, _SECTION.size):
        row = _SECTION.unpack(reader.bytes(at, _SECTION.size, "section header"))
        reader.need(row[4], row[5], "section")


def _has_qemu_note(reader: Reader, at: int, offset: int, size: int) -> bool:
    if size > _MAX_NOTES:
        raise UnsupportedStateError("p_filesz of the notes", at + 32, size)
    reader.need(offset, size, "notes")
    end = offset + size
    while offset + _NOTE.size <= end:
        name_size, size, _kind = _NOTE.unpack(reader.bytes(offset, _NOTE.size, "note"))
        if reader.bytes(offset + _NOTE.size, min(name_size, 5), "note") == b"QEMU\0":
            return True
        offset += _NOTE.size + (name_size + 3) // 4 * 4 + (size + 3) // 4 * 4
    return False


def _merged(loads: list[DumpRange], table: int) -> tuple[DumpRange, ...]:
    """Put ranges in order; those that overlap or touch have to lie so in the file as well."""
    loads.sort(key=lambda one: one.address)
    merged: list[DumpRange] = []
    for one in loads:
        if merged:
            last = merged[-1]
            end = last.address + last.size_bytes
            same = one.offset - one.address == last.offset - last.address
            if one.address < end and not same:
                raise UnsupportedStateError(
                    "p_paddr", table, hex(one.address), "one address, two places"
                )
            if one.address <= end and same:
                size = max(end, one.address + one.size_bytes) - last.address
                merged[-1] = DumpRange(last.address, size, last.offset)
                continue
        merged.append(one)
    if len(merged) > MAX_RANGES:
        raise UnsupportedStateError("memory ranges", table, len(merged), "too many")
    return tuple(merged)
