"""BTF types as drgn types: a lazy type finder.

Members are decoded when drgn first looks at them; that also ends the recursion of C types,
which only goes through members. A table with any other cycle is refused.

Source: Linux ``Documentation/bpf/btf.rst`` (v6.12); drgn 0.3 ``Program.register_type_finder``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from drgn import (
    Object,
    Program,
    Qualifiers,
    Type,
    TypeEnumerator,
    TypeKind,
    TypeMember,
    TypeParameter,
)

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel.btf import Btf, Kind, Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from drgn import TypeKindSet

_MAX_DEPTH: Final = 64
_MAX_MEMBERS: Final = 1 << 16  # of a structure, those of anonymous members included
_WRAPPERS: Final = (Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG)
_SIGNED, _BOOL = 1, 4  # BTF_INT_*; CHAR (2) is not told apart by drgn

_KINDS: Final = {
    TypeKind.INT: (Kind.INT,),
    TypeKind.BOOL: (Kind.INT,),
    TypeKind.FLOAT: (Kind.FLOAT,),
    TypeKind.STRUCT: (Kind.STRUCT,),
    TypeKind.UNION: (Kind.UNION,),
    TypeKind.ENUM: (Kind.ENUM, Kind.ENUM64),
    TypeKind.TYPEDEF: (Kind.TYPEDEF,),
}


class BtfTypes:
    """drgn types of one table."""

    def __init__(self, prog: Program, btf: Btf) -> None:
        self._prog = prog
        self.btf = btf
        self._types: dict[int, Type] = {}
        self._members: dict[int, int] = {}  # of structures, by type id
        self._depth = 0
        self._enums: list[tuple[int, Record]] | None = None

    def find(
        self, prog: Program, kinds: TypeKindSet, name: str, filename: str | None
    ) -> Type | None:
        """Type finder for `drgn.Program.register_type_finder`."""
        del prog
        if filename:  # BTF knows no files
            return None
        wanted = {kind for each in kinds for kind in _KINDS.get(each, ())}
        for type_id in self.btf.find(name, wanted):
            found = self.type(type_id)
            if found.kind in kinds:
                return found
        return None

    def struct(self, name: str) -> Type | None:
        """Return a complete structure type by its tag."""
        for type_id in self.btf.find(name, (Kind.STRUCT,)):
            return self.type(type_id)
        return None

    def function(self, name: str) -> Type | None:
        """Return the type of a function."""
        for type_id in self.btf.find(name, (Kind.FUNC,)):
            return self.type(self.btf.record(type_id).size_or_type)
        return None

    def constant(self, name: str) -> Object | None:
        """Return an enumerator as an object."""
        if self._enums is None:
            of_kind = self.btf.of_kind((Kind.ENUM, Kind.ENUM64))
            self._enums = [(type_id, self.btf.record(type_id)) for type_id in of_kind]
        offsets = self.btf.string_offsets(name)
        for type_id, record in self._enums:
            # Strings are compared by their places: there are 20,000, of which few are asked for.
            step = _step(record)
            if any(offset in record.words[: record.count * step : step] for offset in offsets):
                value = next(value for label, value in self._labels(record) if label == name)
                return Object(self._prog, self.type(type_id), value)
        return None

    def type(self, type_id: int) -> Type:
        """Return a type by its id.

        Raises:
            CorruptGuestError: The id is out of bounds, or the type contains itself.
        """
        found = self._types.get(type_id)
        if found is None:
            self._depth += 1
            try:
                if self._depth > _MAX_DEPTH:
                    raise CorruptGuestError(f"BTF type {type_id} contains itself")
                found = self._make(type_id)
            finally:
                self._depth -= 1
            self._types[type_id] = found
        return found

    def _make(self, type_id: int) -> Type:
        prog = self._prog
        if type_id == 0:
            return prog.void_type()
        record = self.btf.record(type_id)
        match record.kind:
            case Kind.INT:
                return self._int(record)
            case Kind.FLOAT:
                return prog.float_type(record.name, record.size_or_type)
            case Kind.PTR:
                return prog.pointer_type(self.type(record.size_or_type))
            case Kind.ARRAY:
                return prog.array_type(self.type(record.words[0]), record.words[2])
            case Kind.STRUCT | Kind.UNION:
                return self._compound(type_id, record)
            case Kind.ENUM | Kind.ENUM64:
                return self._enum(record)
            case Kind.FWD:
                return self._forward(record)
            case Kind.TYPEDEF:
                return prog.typedef_type(record.name, self.type(record.size_or_type))
            case Kind.VOLATILE:
                return _qualified(self.type(record.size_or_type), Qualifiers.VOLATILE)
            case Kind.CONST:
                return _qualified(self.type(record.size_or_type), Qualifiers.CONST)
            case Kind.RESTRICT:
                return _qualified(self.type(record.size_or_type), Qualifiers.RESTRICT)
            case Kind.TYPE_TAG:
                return self.type(record.size_or_type)
            case Kind.FUNC_PROTO:
                return self._function(record)
            case _:
                raise CorruptGuestError(f"BTF type {type_id} is a {record.kind.name}, no type")

    def _int(self, record: Record) -> Type:
        (word,) = record.words
        encoding, bits = (word >> 24) & 0xF, word & 0xFF
        size = record.size_or_type
        if not 0 < size <= 16 or bits != size * 8 or (word >> 16) & 0xFF:
            # pahole before 1.10 wrote bit fields so; such kernels have no BTF of their own
            raise UnsupportedGuestError(f"BTF integer {record.name} has {bits} bits")
        if encoding & _BOOL:
            return self._prog.bool_type(record.name, size)
        return self._prog.int_type(record.name, size, bool(encoding & _SIGNED))

    def _compound(self, own_id: int, record: Record) -> Type:
        make = self._prog.struct_type if record.kind is Kind.STRUCT else self._prog.union_type
        members = []
        total = record.count
        for at in range(0, record.count * 3, 3):
            name, type_id, place = record.words[at : at + 3]
            bits = 0
            if record.flag:
                bits, place = place >> 24, place & 0xFF_FFFF
            if place > record.size_or_type * 8:
                raise CorruptGuestError(f"a member of BTF {record.name} lies outside of it")
            label = self.btf.name(name) or None
            if label is None:
                # drgn looks for names through anonymous members without a bound, so these are
                # decoded now: a structure that contains itself ends at our depth limit, and one
                # that holds another twice, which does the same, and so on, at this one.
                self.type(type_id)
                total += self._members_of(type_id)
                if total > _MAX_MEMBERS:
                    raise CorruptGuestError(
                        f"BTF {record.name} has more than {_MAX_MEMBERS} members"
                    )
            members.append(TypeMember(self._member(type_id, bits), label, place))
        self._members[own_id] = total
        return make(record.name or None, record.size_or_type, members)

    def _members_of(self, type_id: int) -> int:
        while type_id not in self._members:
            record = self.btf.record(type_id) if type_id else None
            if record is None or record.kind not in _WRAPPERS:
                return 0
            type_id = record.size_or_type  # its end was reached when it was made
        return self._members[type_id]

    def _member(self, type_id: int, bits: int) -> Callable[[], Type | Object]:
        if bits:
            return lambda: Object(self._prog, self.type(type_id), bit_field_size=bits)
        return lambda: self.type(type_id)

    def _labels(self, record: Record) -> list[tuple[str, int]]:
        step = _step(record)
        bits = 32 * (step - 1)
        labels = []
        for at in range(0, record.count * step, step):
            value = record.words[at + 1]
            if step == 3:
                value |= record.words[at + 2] << 32
            if record.flag and value >> (bits - 1):
                value -= 1 << bits
            labels.append((self.btf.name(record.words[at]), value))
        return labels

    def _enum(self, record: Record) -> Type:
        if not record.count:
            return self._prog.enum_type(record.name or None)
        labels = self._labels(record)
        size = record.size_or_type
        signed = record.flag  # never set before v6.0; negative values read as large ones there
        if size not in (1, 2, 4, 8):
            raise CorruptGuestError(f"BTF enum {record.name} has {size} bytes")
        if size < 4:  # packed enums: the value still takes a whole word
            labels = [(label, _fit(value, size, signed)) for label, value in labels]
        compatible = self._prog.int_type("int" if signed else "unsigned int", size, signed)
        return self._prog.enum_type(
            record.name or None, compatible, [TypeEnumerator(*label) for label in labels]
        )

    def _forward(self, record: Record) -> Type:
        kind = Kind.UNION if record.flag else Kind.STRUCT
        for type_id in self.btf.find(record.name, (kind,)):
            return self.type(type_id)
        make = self._prog.union_type if record.flag else self._prog.struct_type
        return make(record.name)

    def _function(self, record: Record) -> Type:
        pairs = [record.words[at : at + 2] for at in range(0, record.count * 2, 2)]
        variadic = bool(pairs) and pairs[-1] == (0, 0)
        if variadic:
            pairs.pop()
        parameters = [
            TypeParameter(self._parameter(type_id), self.btf.name(name) or None)
            for name, type_id in pairs
        ]
        return self._prog.function_type(self.type(record.size_or_type), parameters, variadic)

    def _parameter(self, type_id: int) -> Callable[[], Type]:
        return lambda: self.type(type_id)


def _step(record: Record) -> int:
    """Words of one enumerator."""
    return 2 if record.kind is Kind.ENUM else 3


def _qualified(base: Type, qualifier: Qualifiers) -> Type:
    return base.qualified(Qualifiers(base.qualifiers.value | qualifier.value))


def _fit(value: int, size: int, signed: bool) -> int:
    value &= (1 << size * 8) - 1
    return value - (1 << size * 8) if signed and value >> (size * 8 - 1) else value
