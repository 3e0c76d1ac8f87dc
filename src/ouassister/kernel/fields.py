"""Members of a structure, decoded from one read; variables by name and type.

drgn decodes one member at a time, with one call of ours for each. Where thousands of structures
are walked, one read and one ``struct.unpack`` for all members of interest is ten times faster.

Source: drgn 0.3 (``Object.member_``, ``Type``).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from drgn import Object, Type, TypeKind, sizeof

from ouassister.errors import UnsupportedGuestError
from ouassister.guest_model import VirtAddr

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel

_INTEGERS: Final = {1: "b", 2: "h", 4: "i", 8: "q"}
MAX_STRING: Final = 4096
_PAGE_SIZE: Final = 4096


class Fields:
    """Where some members of a structure lie.

    Args:
        kernel: The kernel.
        kind: The structure, by its C name or as a type.
        members: Names, with dots for members of members. Integers, enumerations, booleans and
            pointers read as ``int``, arrays of bytes as ``bytes``.

    Raises:
        AttributeError: A member does not exist; `guest_reads` makes it ours.
        LookupError: The type does not exist; `guest_reads` makes it ours.
    """

    def __init__(self, kernel: Kernel, kind: str | Type, *members: str) -> None:
        self._virtual = kernel.virtual
        of = kernel.type(kind) if isinstance(kind, str) else kind
        places = []
        for position, name in enumerate(members):
            member = Object(kernel.prog, of, address=0)
            for part in name.split("."):
                member = getattr(member, part)
            places.append((member.address_, _format(member.type_), position))
        places.sort()
        self.start: int = places[0][0]
        at, layout = self.start, "<"
        for offset, code, _ in places:
            layout += f"{offset - at}x{code}"  # overlapping members fail here, as they must
            at = offset + struct.calcsize("<" + code)
        self._struct = struct.Struct(layout)
        order = [place[2] for place in places]
        self._order = (
            None if order == sorted(order) else [order.index(i) for i in range(len(order))]
        )
        self.size: int = self._struct.size

    def read(self, address: int) -> tuple[Any, ...]:
        """Return the members, in the order they were named.

        Raises:
            NotMappedError: The address leads nowhere.
            PageAbsentError: The page was never saved.
        """
        values = self._struct.unpack(
            self._virtual.read(VirtAddr((address + self.start) % (1 << 64)), self.size)
        )
        return values if self._order is None else tuple(values[i] for i in self._order)


def has_member(kernel: Kernel, kind: str | Type, name: str) -> bool:
    """Tell whether a structure has a member; through anonymous members, too.

    Raises:
        LookupError: The type does not exist.
    """
    of = kernel.type(kind) if isinstance(kind, str) else kind
    found: bool = of.has_member(name)
    return found


def offset(kernel: Kernel, kind: str | Type, name: str) -> int:
    """Return the place of a member within its structure, in bytes; dots as in `Fields`."""
    of = kernel.type(kind) if isinstance(kind, str) else kind
    member = Object(kernel.prog, of, address=0)
    for part in name.split("."):
        member = getattr(member, part)
    found: int = member.address_
    return found


def size_of(kernel: Kernel, kind: str) -> int:
    """Return how many bytes a type takes; one without a name of its own, too."""
    found: int = sizeof(kernel.type(kind))
    return found


def length_of(kernel: Kernel, kind: str, name: str) -> int:
    """Return how many elements a member has that is an array."""
    return len(getattr(Object(kernel.prog, kernel.type(kind), address=0), name))


def read_bits(kernel: Kernel, kind: str, name: str, address: int) -> int:
    """Read a member that is a bit-field, of the structure at an address."""
    value: int = getattr(Object(kernel.prog, kernel.type(kind), address=address), name).value_()
    return value


def variable(kernel: Kernel, name: str) -> int:
    """Return the address of a variable of the kernel.

    Raises:
        UnsupportedGuestError: This kernel has none of that name.
    """
    address = kernel.symbols.address(name)
    if address is None:
        raise UnsupportedGuestError(f"this kernel has no variable {name}")
    return address


def constant(kernel: Kernel, enumeration: str, name: str) -> int:
    """Return the value of an enumerator.

    Raises:
        UnsupportedGuestError: The enumeration has none of that name.
    """
    for one in kernel.type(f"enum {enumeration}").enumerators or ():
        if one.name == name:
            return int(one.value)
    raise UnsupportedGuestError(f"this kernel has no {name} in enum {enumeration}")


def read_word(kernel: Kernel, address: int) -> int:
    """Read an ``unsigned long`` or a pointer."""
    return int.from_bytes(kernel.virtual.read(VirtAddr(address), 8), "little")


def read_string(kernel: Kernel, address: int, limit: int = MAX_STRING) -> bytes:
    """Read a string that ends with a NUL, or at the limit."""
    text = b""
    while len(text) < limit:
        # To the end of the page at most: the next one may not be there.
        count = min(limit - len(text), _PAGE_SIZE - address % _PAGE_SIZE)
        piece, nul, _ = kernel.virtual.read(VirtAddr(address), count).partition(b"\0")
        text += piece
        if nul:
            break
        address += count
    return text


def _format(kind: Type) -> str:
    kind = _plain(kind)
    if kind.kind == TypeKind.POINTER:
        return "Q"
    if kind.kind == TypeKind.ARRAY:
        if _plain(kind.type).size != 1:
            raise TypeError("an array of other than bytes")
        return f"{kind.length}s"
    if kind.kind == TypeKind.ENUM:
        kind = kind.type
    if kind.kind not in (TypeKind.INT, TypeKind.BOOL):
        raise TypeError(f"no number: {kind.type_name()}")
    code = _INTEGERS.get(kind.size or 0)
    if code is None:
        raise TypeError(f"no number of {kind.size} bytes")
    return code.upper() if kind.kind == TypeKind.BOOL or not kind.is_signed else code


def _plain(kind: Type) -> Type:
    while kind.kind == TypeKind.TYPEDEF:
        kind = kind.type
    return kind


class Labels(dict[str, int]):
    """Values of an enumeration by name; a name that it lacks is a LookupError of drgn's kind."""

    def __missing__(self, name: str) -> int:
        """Raise for a name that this kernel does not have."""
        raise LookupError(f"could not find enumerator {name}")


def labels(kind: Type) -> Labels:
    """Return the values of an enumeration."""
    return Labels({one.name: one.value for one in kind.enumerators or ()})
