"""The type table, composed here type by type, and what a hostile one does."""

from __future__ import annotations

import struct

import pytest
from drgn import Architecture, Object, Platform, PlatformFlags, Program, TypeKind

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel.btf import Btf, Kind
from ouassister.kernel.btf_types import BtfTypes


class Composer:
    """Writes a BTF section; each call returns the new type's id."""

    def __init__(self, first_id: int = 1, first_string: int = 0) -> None:
        self.types = b""
        self.strings = b"\0"
        self.next_id = first_id
        self.first_string = first_string

    def string(self, text: str) -> int:
        if not text:
            return 0
        self.strings += text.encode() + b"\0"
        return self.first_string + len(self.strings) - len(text) - 1

    def add(
        self, kind: int, name: str, size_or_type: int, words: tuple[int, ...] = (),
        *, count: int = 0, flag: bool = False,
    ) -> int:  # fmt: skip
        info = flag << 31 | kind << 24 | count
        self.types += struct.pack("<III", self.string(name), info, size_or_type)
        self.types += struct.pack(f"<{len(words)}I", *words)
        self.next_id += 1
        return self.next_id - 1

    def integer(self, name: str, size: int, encoding: int = 0) -> int:
        return self.add(Kind.INT, name, size, (encoding << 24 | size * 8,))

    def struct(self, name: str, size: int, members: list[tuple[str, int, int]], **how: bool) -> int:
        words = [word for text, kind, at in members for word in (self.string(text), kind, at)]
        return self.add(Kind.STRUCT, name, size, tuple(words), count=len(members), **how)

    def section(self) -> bytes:
        sizes = (0, len(self.types), len(self.types), len(self.strings))
        return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + self.types + self.strings


def program(btf: Btf, memory: bytes = bytes(256)) -> tuple[Program, BtfTypes]:
    flags = PlatformFlags.IS_64_BIT | PlatformFlags.IS_LITTLE_ENDIAN
    prog = Program(Platform(Architecture.X86_64, flags))
    prog.add_memory_segment(
        0, len(memory), lambda address, count, _offset, _physical: memory[address : address + count]
    )
    types = BtfTypes(prog, btf)
    prog.register_type_finder("test", types.find, enable_index=0)
    return prog, types


@pytest.fixture
def kernel() -> Composer:
    """``struct list { struct list *next; u8 low : 3; u8 high : 5; struct { s32 in; }; }``."""
    out = Composer()
    u8, s32 = out.integer("unsigned char", 1), out.integer("int", 4, 1)
    assert (u8, s32) == (1, 2)
    pointer, inner = out.next_id, out.next_id + 1
    out.add(Kind.PTR, "", pointer + 2)
    out.struct("", 4, [("in", s32, 0)])
    out.struct(
        "list",
        16,
        [("next", pointer, 0), ("low", u8, 3 << 24 | 64), ("high", u8, 5 << 24 | 67),
         ("", inner, 96)],
        flag=True,
    )  # fmt: skip
    out.add(Kind.TYPEDEF, "list_t", out.next_id - 1)
    return out


def test_types_read_memory_as_c_does(kernel: Composer) -> None:
    memory = struct.pack("<QBxxxi", 0x40, 0b10110_101, -7).ljust(256, b"\0")
    prog, _ = program(Btf(kernel.section()), memory)
    one = Object(prog, "struct list", address=0)
    assert one.next.value_() == 0x40
    assert one.next.next.value_() == 0
    assert (one.low.value_(), one.high.value_()) == (0b101, 0b10110)
    assert one.member_("in").value_() == -7  # through the anonymous member
    assert Object(prog, "list_t", address=0).next.value_() == 0x40


def test_kinds_become_their_drgn_types() -> None:
    out = Composer()
    integer = out.integer("int", 4, 1)
    boolean = out.integer("_Bool", 1, 4)
    double = out.add(Kind.FLOAT, "double", 8)
    array = out.add(Kind.ARRAY, "", 0, (integer, integer, 3))
    union = out.add(Kind.UNION, "both", 4, (out.string("a"), integer, 0), count=1)
    small = out.add(Kind.ENUM, "signs", 4, (out.string("MINUS"), 0xFFFF_FFFF), count=1, flag=True)
    large = out.add(Kind.ENUM64, "large", 8, (out.string("TOP"), 1, 2), count=1)
    packed = out.add(Kind.ENUM, "packed", 1, (out.string("LAST"), 255), count=1)
    const = out.add(Kind.CONST, "", integer)
    tagged = out.add(Kind.TYPE_TAG, "user", const)
    pointer = out.add(Kind.PTR, "", tagged)
    proto = out.add(Kind.FUNC_PROTO, "", integer, (out.string("x"), pointer, 0, 0), count=2)
    function = out.add(Kind.FUNC, "call", proto)
    forward = out.add(Kind.FWD, "both", 0, flag=True)
    nothing = out.add(Kind.FWD, "elsewhere", 0)
    prog, types = program(Btf(out.section()))
    assert types.type(boolean).kind == TypeKind.BOOL
    assert types.type(double).kind == TypeKind.FLOAT
    assert types.type(array).length == 3
    assert types.type(union).kind == TypeKind.UNION
    assert [one.value for one in types.type(small).enumerators or ()] == [-1]
    assert [one.value for one in types.type(large).enumerators or ()] == [1 | 2 << 32]
    assert types.type(packed).type.size == 1
    assert str(types.type(pointer)) == "const int *"
    assert types.type(proto).is_variadic
    assert [one.name for one in types.type(proto).parameters] == ["x"]
    assert types.function("call") == types.type(proto)
    assert types.function("absent") is None
    assert types.type(forward) == types.type(union)
    assert not types.type(nothing).is_complete()
    top = types.constant("TOP")
    assert top is not None
    assert top.value_() == 1 | 2 << 32
    assert types.constant("ABSENT") is None
    assert prog.type("enum signs").kind == TypeKind.ENUM
    with pytest.raises(CorruptGuestError, match="FUNC"):
        types.type(function)
    with pytest.raises(LookupError):
        prog.type("struct absent")


def test_module_table_extends_its_base(kernel: Composer) -> None:
    base = Btf(kernel.section())
    module = Composer(first_id=kernel.next_id, first_string=len(kernel.strings))
    module.struct("mine", 16, [("list", kernel.next_id - 2, 0)])
    split = Btf(module.section(), base)
    prog, types = program(split, struct.pack("<Q", 0x40).ljust(256, b"\0"))
    assert Object(prog, "struct mine", address=0).list.next.value_() == 0x40
    assert types.struct("list") is not None
    assert len(split) == 1
    assert list(split.find("mine", (Kind.STRUCT,))) == [kernel.next_id]
    assert list(base.find("mine", (Kind.STRUCT,))) == []


def test_type_that_contains_itself_is_corrupt() -> None:
    out = Composer()
    out.add(Kind.TYPEDEF, "loop", 2)
    out.add(Kind.CONST, "", 1)
    _, types = program(Btf(out.section()))
    with pytest.raises(CorruptGuestError, match="contains itself"):
        types.type(1)


def test_structure_that_contains_itself_without_a_name_is_corrupt() -> None:
    out = Composer()
    out.struct("self", 8, [("", 2, 0)])
    out.add(Kind.UNION, "", 8, (0, 1, 0), count=1)
    _, types = program(Btf(out.section()))
    with pytest.raises(CorruptGuestError, match="contains itself"):
        types.struct("self")


def test_type_ids_out_of_bounds_are_corrupt() -> None:
    out = Composer()
    out.add(Kind.PTR, "", 77)
    out.struct("wild", 8, [("member", 88, 0)])
    prog, types = program(Btf(out.section()))
    for type_id in (1, 3, 1 << 31):
        with pytest.raises(CorruptGuestError, match="out of bounds"):
            types.type(type_id)
    with pytest.raises(CorruptGuestError, match="88 is out of bounds"):
        _ = Object(prog, "struct wild", address=0).member


def test_strings_out_of_bounds_are_corrupt() -> None:
    out = Composer()
    out.struct("s", 8, [("member", 0, 0)])
    btf = Btf(out.section())
    for offset in (1 << 20, len(out.strings), 0xFFFF_FFFF):
        with pytest.raises(CorruptGuestError, match="out of bounds"):
            btf.name(offset)


def test_member_outside_its_structure_is_corrupt() -> None:
    out = Composer()
    out.struct("s", 8, [("member", 0, 9 * 8)])
    _, types = program(Btf(out.section()))
    with pytest.raises(CorruptGuestError, match="outside"):
        types.struct("s")


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [(Kind.INT, 4, (17,)), (Kind.INT, 0, (0,)), (Kind.INT, 4, (8 << 16 | 32,))],
)
def test_odd_integers_are_refused(kind: Kind, size: int, words: tuple[int, ...]) -> None:
    out = Composer()
    out.add(kind, "odd", size, words)
    _, types = program(Btf(out.section()))
    with pytest.raises(UnsupportedGuestError, match="odd"):
        types.type(1)


@pytest.mark.parametrize("kind", [0, 20, 31])
def test_unknown_kind_is_refused_by_number(kind: int) -> None:
    out = Composer()
    out.add(kind, "future", 0)
    with pytest.raises(UnsupportedGuestError, match=f"kind {kind}"):
        Btf(out.section())


@pytest.mark.parametrize(
    ("format_", "offset", "value", "error"),
    [
        ("<H", 0, 0x9FEB, CorruptGuestError),  # the other byte order
        ("<B", 2, 2, UnsupportedGuestError),
        ("<B", 3, 1, UnsupportedGuestError),
        ("<I", 4, 20, CorruptGuestError),
        ("<I", 4, 1 << 20, CorruptGuestError),
        ("<I", 8, 1 << 31, CorruptGuestError),
        ("<I", 8, 2, CorruptGuestError),
        ("<I", 12, 1 << 31, CorruptGuestError),
        ("<I", 12, 8, CorruptGuestError),  # ends within a type
        ("<I", 16, 1 << 31, CorruptGuestError),
        ("<I", 20, 0, CorruptGuestError),
        ("<I", 20, 1 << 31, CorruptGuestError),
    ],
)
def test_header_out_of_bounds_is_refused(
    kernel: Composer, format_: str, offset: int, value: int, error: type[Exception]
) -> None:
    section = bytearray(kernel.section())
    struct.pack_into(format_, section, offset, value)
    with pytest.raises(error):
        Btf(bytes(section))


def test_section_cut_short_is_corrupt(kernel: Composer) -> None:
    section = kernel.section()
    for size in range(len(section)):
        with pytest.raises(CorruptGuestError):
            Btf(section[:size])


def with_layout(section: bytes, *sizes: tuple[int, int], off: int = 0, cut: int = 0) -> bytes:
    """Write the longer header of v7.1, with the sizes of kinds behind the strings."""
    layout = b"".join(struct.pack("<BBH", each[0], each[1], 0) for each in sizes)
    body = section[24:]
    head = bytearray(section[:24])
    struct.pack_into("<I", head, 4, 32)
    pad = -len(body) % 4
    place = struct.pack("<II", len(body) + pad + off, len(layout) - cut)
    return bytes(head) + place + body + bytes(pad) + layout


UNKNOWN = 77
SIZES = [(0, 0)] * UNKNOWN + [(4, 8)]


def test_kind_that_only_the_table_knows_is_stepped_over() -> None:
    out = Composer()
    out.add(UNKNOWN, "new", 0, (1, 2, 3, 4, 5), count=2)
    number = out.integer("int", 4, 1)
    with pytest.raises(UnsupportedGuestError, match="77"):
        Btf(out.section())
    btf = Btf(with_layout(out.section(), *SIZES))
    assert btf.record(number).name == "int"
    with pytest.raises(UnsupportedGuestError, match="77"):
        btf.record(1)


def test_kind_that_we_know_keeps_its_size_whatever_the_table_says() -> None:
    out = Composer()
    number = out.integer("int", 4, 1)
    out.integer("char", 1, 1)
    btf = Btf(with_layout(out.section(), (0, 0), (8, 0)))
    assert len(btf) == 2
    assert btf.record(number + 1).name == "char"


@pytest.mark.parametrize("how", [{"off": 4}, {"off": 1 << 31}, {"cut": 2}])
def test_sizes_out_of_the_section_are_corrupt(how: dict[str, int]) -> None:
    out = Composer()
    out.integer("int", 4, 1)
    with pytest.raises(CorruptGuestError, match="points out of its section"):
        Btf(with_layout(out.section(), *SIZES, **how))


def test_kind_of_odd_size_is_unknown() -> None:
    out = Composer()
    out.add(UNKNOWN, "new", 0)
    with pytest.raises(UnsupportedGuestError, match="77"):
        Btf(with_layout(out.section(), *SIZES[:-1], (2, 0)))


def test_structure_of_more_than_65535_members_is_read() -> None:
    out = Composer()
    byte = out.integer("char", 1, 1)
    count = 0x1_0001
    out.add(Kind.STRUCT, "large", count, (0, byte, 0) * count, count=count)
    after = out.integer("int", 4, 1)
    btf = Btf(out.section())
    assert btf.record(after - 1).count == count
    assert btf.record(after).name == "int"
