"""A symbol file for volatility3, from what the guest's own memory says of its kernel.

Usage: ``python -m bench.isf SAVE TARGET``.

The format is volatility3's "intermediate symbol format", version 6.2.0 (its
schemas/schema-6.2.0.json). Addresses in it are those of a kernel that was not moved by KASLR.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms

from ouassister.kernel import open_guest
from ouassister.kernel.btf import Btf, Kind
from ouassister.memory import open_save

if TYPE_CHECKING:
    from ouassister.kernel.btf import Record

_Json = dict[str, Any]

# The kernel's types say nothing of its variables; of those that the plug-ins read, we do.
_VARIABLES: Final = {
    "init_task": "task_struct",
    "init_mm": "mm_struct",
    "init_files": "files_struct",
    "init_pid_ns": "pid_namespace",
    "init_uts_ns": "uts_namespace",
    "super_blocks": "list_head",
    "modules": "list_head",
}
_WORDS: Final = ("vmemmap_base", "page_offset_base", "vmalloc_base", "phys_base")
_TEXT: Final = 0xFFFF_FFFF_8000_0000
_INT_SIGNED, _INT_CHAR, _INT_BOOL = 1, 2, 4
_TRANSPARENT: Final = frozenset(
    (Kind.TYPEDEF, Kind.CONST, Kind.VOLATILE, Kind.RESTRICT, Kind.TYPE_TAG)
)
_COMPOUND: Final = {Kind.STRUCT: "struct", Kind.UNION: "union"}


def export(save_file: Path, target: Path) -> None:
    """Write the symbol file of the kernel in a save file."""
    with open_save(save_file) as save:
        kernel = open_guest(save).kernel
        start, stop = kernel.symbols.address("__start_BTF"), kernel.symbols.address("__stop_BTF")
        assert start is not None  # noqa: S101 - the kernel was opened with it
        assert stop is not None  # noqa: S101
        types = _Types(Btf(kernel.virtual.read(start, stop - start)))
        kernel.prog.register_symbol_finder(
            "every", load_vmlinux_kallsyms(kernel.prog), enable_index=0
        )
        shift = int(kernel.note.text.split(b"KERNELOFFSET=")[1].split()[0], 16)
        banner_at = kernel.symbols.address("linux_banner")
        assert banner_at is not None  # noqa: S101
        # Without its end, so that the copy in the kernel's log fits as well: where the banner
        # itself lies across two pages, volatility3 does not find it in a file of QEMU's format.
        banner = kernel.virtual.read(banner_at, 512).partition(b"\0")[0].rstrip()
        symbols: _Json = {}
        for symbol in kernel.prog.symbols():
            moved = symbol.address >= _TEXT
            symbols.setdefault(
                symbol.name,
                {
                    "address": symbol.address - shift * moved,
                    "type": _variable(symbol.name),
                },
            )
    array = {"kind": "array", "count": len(banner), "subtype": {"kind": "base", "name": "char"}}
    symbols["linux_banner"] |= {
        "type": array,
        "constant_data": base64.b64encode(banner).decode(),
    }
    document = {
        "metadata": {
            "format": "6.2.0",
            "producer": {"name": "ouassister-bench", "version": "1"},
            "linux": {"symbols": [], "types": []},
        },
        "base_types": types.base,
        "user_types": types.user,
        "enums": types.enums,
        "symbols": symbols,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document))


def _variable(name: str) -> _Json:
    if name in _VARIABLES:
        return {"kind": "struct", "name": _VARIABLES[name]}
    return {"kind": "base", "name": "long unsigned int" if name in _WORDS else "void"}


class _Types:
    """Every type of a BTF table, in the other format's words."""

    def __init__(self, btf: Btf) -> None:
        self._btf = btf
        self._names: dict[int, str] = {}
        self.base: _Json = {
            "void": {"size": 0, "signed": False, "kind": "void", "endian": "little"},
            "pointer": {"size": 8, "signed": False, "kind": "int", "endian": "little"},
            "long unsigned int": _number(8, 0, "long unsigned int"),
        }
        self.user: _Json = {}
        self.enums: _Json = {}
        compounds = []
        for number in range(btf.first_id, btf.first_id + len(btf)):
            record = btf.record(number)
            if record.kind in (Kind.INT, Kind.FLOAT):
                self._add_base(record)
            elif record.kind in (Kind.ENUM, Kind.ENUM64):
                self._add_enum(number, record)
            elif record.kind in _COMPOUND:
                compounds.append((number, record))
            elif record.kind == Kind.TYPEDEF:
                self._name_by_typedef(record)
        for number, record in compounds:
            self._add_compound(number, record)

    def _add_base(self, record: Record) -> None:
        encoding = record.words[0] >> 24 & 0xF if record.kind == Kind.INT else 0
        number = _number(record.size_or_type, encoding, record.name)
        if record.kind == Kind.FLOAT:
            number["kind"] = "float"
        self.base.setdefault(record.name, number)

    def _name_by_typedef(self, record: Record) -> None:
        inner = self._btf.record(record.size_or_type) if record.size_or_type else None
        if inner is not None and inner.kind in _COMPOUND and not inner.name:
            self._names.setdefault(record.size_or_type, record.name)

    def _name(self, number: int, record: Record) -> str:
        return record.name or self._names.get(number) or f"unnamed_{number:x}"

    def _add_enum(self, number: int, record: Record) -> None:
        words = record.words
        values = {}
        step = 2 if record.kind == Kind.ENUM else 3
        for at in range(0, len(words), step):
            value = words[at + 1] | (words[at + 2] << 32 if step == 3 else 0)
            bits = 32 * (step - 1)
            if record.flag and value >> (bits - 1):
                value -= 1 << bits
            values[self._btf.name(words[at])] = value
        base = "unsigned int" if record.size_or_type == 4 else "long unsigned int"
        entry = {"size": record.size_or_type, "base": base, "constants": values}
        self.enums.setdefault(self._name(number, record), entry)

    def _add_compound(self, number: int, record: Record) -> None:
        fields: _Json = {}
        for at in range(0, len(record.words), 3):
            name_at, kind, place = record.words[at : at + 3]
            bits, position = (place >> 24, place & 0xFF_FFFF) if record.flag else (0, place)
            field: _Json = {"offset": position // 8, "type": self._describe(kind)}
            if bits:
                size = self._size(kind)
                unit = position // (8 * size) * size
                field["offset"] = unit
                field["type"] = {
                    "kind": "bitfield",
                    "bit_length": bits,
                    "bit_position": position - 8 * unit,
                    "type": field["type"],
                }
            name = self._btf.name(name_at)
            if not name:
                name, field["anonymous"] = f"unnamed_field_{position // 8:x}_{at}", True
            fields[name] = field
        entry = {"kind": _COMPOUND[record.kind], "size": record.size_or_type, "fields": fields}
        self.user.setdefault(self._name(number, record), entry)

    def _resolve(self, number: int) -> tuple[int, Record | None]:
        while number:
            record = self._btf.record(number)
            if record.kind not in _TRANSPARENT:
                return number, record
            number = record.size_or_type
        return 0, None

    def _size(self, number: int) -> int:
        _, record = self._resolve(number)
        assert record is not None  # noqa: S101 - a bit field has a type
        return record.size_or_type

    def _describe(self, number: int) -> _Json:
        number, record = self._resolve(number)
        if record is None:
            return {"kind": "base", "name": "void"}
        kind = record.kind
        if kind in (Kind.INT, Kind.FLOAT):
            return {"kind": "base", "name": record.name}
        if kind == Kind.PTR:
            return {"kind": "pointer", "subtype": self._describe(record.size_or_type)}
        if kind == Kind.ARRAY:
            inner, _, count = record.words
            return {"kind": "array", "count": count, "subtype": self._describe(inner)}
        if kind in _COMPOUND:
            return {"kind": _COMPOUND[kind], "name": self._name(number, record)}
        if kind == Kind.FWD:
            return {"kind": "union" if record.flag else "struct", "name": record.name}
        if kind in (Kind.ENUM, Kind.ENUM64):
            return {"kind": "enum", "name": self._name(number, record)}
        return {"kind": "function"}


def _number(size: int, encoding: int, name: str) -> _Json:
    kind = "bool" if encoding & _INT_BOOL else "char" if name.endswith("char") else "int"
    return {
        "size": size,
        "signed": bool(encoding & _INT_SIGNED),
        "kind": kind,
        "endian": "little",
    }


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
