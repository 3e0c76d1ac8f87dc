"""Members read in one go, and the lists and trees that are walked with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from tests.unit.fake_guest import SIZE, FakeGuest

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel.fields import (
    Fields,
    constant,
    has_member,
    labels,
    offset,
    read_string,
    variable,
)
from ouassister.kernel.percpu import each_cpu
from ouassister.kernel.program import guest_reads
from ouassister.kernel.xarray import XArrays

if TYPE_CHECKING:
    from drgn import Type


def test_members_come_in_the_order_they_are_named() -> None:
    guest = FakeGuest()
    guest.struct("inner", ("pad", "I"), ("low", "i"))
    guest.struct("outer", ("first", "H"), ("inner", "inner"), ("next", "p"), ("name", 4))
    at = guest.put("outer", first=0xFFFF, inner__low=-2, next=0xFFFF800000000000, name=b"ab")
    fields = Fields(guest.kernel, "struct outer", "name", "next", "inner.low", "first")
    assert fields.read(at) == (b"ab\0\0", 0xFFFF800000000000, -2, 0xFFFF)
    assert offset(guest.kernel, "struct outer", "inner.low") == 6
    assert has_member(guest.kernel, "struct outer", "next")
    assert not has_member(guest.kernel, "struct outer", "previous")


def test_missing_names_are_unsupported() -> None:
    guest = FakeGuest()
    guest.struct("one", ("a", "I"))
    for name, member in (("one", "b"), ("two", "a")):
        with pytest.raises(UnsupportedGuestError), guest_reads("reading"):
            Fields(guest.kernel, f"struct {name}", member)
    with pytest.raises(UnsupportedGuestError, match="variable nothing"):
        variable(guest.kernel, "nothing")
    guest.enum("flags", ONE=1)
    assert constant(guest.kernel, "flags", "ONE") == 1
    with pytest.raises(UnsupportedGuestError, match="no TWO in enum flags"):
        constant(guest.kernel, "flags", "TWO")


def test_string_ends_with_its_nul_its_limit_or_its_page() -> None:
    guest = FakeGuest()
    guest.place(0x1FFE, "6s", b"abcd\0e")
    assert read_string(guest.kernel, 0x1FFE) == b"abcd"
    assert read_string(guest.kernel, 0x1FFE, 3) == b"abc"
    guest.place(SIZE - 2, "2s", b"x\0")
    assert read_string(guest.kernel, SIZE - 2) == b"x"
    guest.place(SIZE - 2, "2s", b"xy")
    with pytest.raises(CorruptGuestError), guest_reads("reading"):
        read_string(guest.kernel, SIZE - 2)


def test_structure_is_no_number() -> None:
    guest = FakeGuest()
    guest.struct("inner", ("a", "I"))
    guest.struct("outer", ("inner", "inner"))
    with pytest.raises(TypeError):
        Fields(guest.kernel, "struct outer", "inner")


def test_wild_pointer_is_corrupt() -> None:
    guest = FakeGuest()
    guest.struct("one", ("a", "I"))
    fields = Fields(guest.kernel, "struct one", "a")
    with pytest.raises(CorruptGuestError, match="leads nowhere"), guest_reads("reading"):
        fields.read(0xDEAD_0000_0000)


def test_processor_copies() -> None:
    guest = FakeGuest()
    guest.struct("cpumask", ("bits", "Q"))
    guest.variables = {"thing": 0x10, "__per_cpu_offset": 0x2000, "__cpu_possible_mask": 0x3000}
    guest.place(0x2000, "3Q", 0x100, 0x200, 0x300)
    guest.place(0x3000, "Q", 0b101)
    assert list(each_cpu(guest.kernel, "thing")) == [0x110, 0x310]
    guest.place(0x3000, "Q", 0)
    with pytest.raises(CorruptGuestError, match="no possible processor"):
        list(each_cpu(guest.kernel, "thing"))


# --- xarray --------------------------------------------------------------------------------


def arrays() -> tuple[FakeGuest, XArrays]:
    guest = FakeGuest()
    guest.struct("xa_node", ("shift", "B"), ("pad", 7), ("slots", ("Q", 64)))
    return guest, XArrays(guest.kernel)


def node(guest: FakeGuest, shift: int, slots: dict[int, int]) -> int:
    at = guest.put("xa_node", shift=shift)
    for index, entry in slots.items():
        guest.place(at + 8 + index * 8, "Q", entry)
    return at + 2  # xa_mk_node


def test_xarray_yields_pointers_values_and_siblings() -> None:
    guest, reader = arrays()
    low = node(guest, 0, {0: 0x8000, 3: 0x71, 4: 0x9000, 5: 4 << 2 | 2, 6: 4 << 2 | 2})
    head = node(guest, 6, {0: low, 2: 0xA000, 3: 2 << 2 | 2})
    assert list(reader.entries(head)) == [
        (0, 1, 0x8000), (3, 1, 0x71), (4, 3, 0x9000), (128, 128, 0xA000)]  # fmt: skip
    assert list(reader.entries(0)) == []
    assert list(reader.entries(0x8000)) == [(0, 1, 0x8000)]
    assert list(reader.entries(0x71)) == [(0, 1, 0x71)]


def test_xarray_that_contains_itself_is_corrupt() -> None:
    guest, reader = arrays()
    head = node(guest, 6, {})
    guest.place(head - 2 + 8, "Q", head)
    with pytest.raises(CorruptGuestError, match="has shift 6"):
        list(reader.entries(head))


@pytest.mark.parametrize("shift", [5, 66, 255])
def test_xarray_with_an_absurd_shift_is_corrupt(shift: int) -> None:
    guest, reader = arrays()
    with pytest.raises(CorruptGuestError, match="shift"):
        list(reader.entries(node(guest, shift, {0: 0x8000})))


def test_xarray_with_more_nodes_than_memory_is_corrupt() -> None:
    guest, reader = arrays()
    head = node(guest, 0, {0: 0x8000})
    for shift in range(6, 60, 6):  # each level leads to the one below it 64 times
        head = node(guest, shift, dict.fromkeys(range(64), head))
    with pytest.raises(CorruptGuestError, match="more nodes than there is memory"):
        list(reader.entries(head))


def test_enumeration_without_a_name_is_a_lookup_error() -> None:
    kind = SimpleNamespace(enumerators=(SimpleNamespace(name="I_NEW", value=8),))
    known = labels(cast("Type", kind))
    assert known["I_NEW"] == 8
    with pytest.raises(LookupError, match="could not find enumerator I_FREEING"):
        known["I_FREEING"]


def test_member_of_a_number_is_unsupported() -> None:
    guest = FakeGuest()
    guest.struct("one", ("a", "I"))
    with (
        pytest.raises(UnsupportedGuestError, match="laid out otherwise"),
        guest_reads("reading the layout of one"),
    ):
        Fields(guest.kernel, "struct one", "a.b")
