"""Memory of a made-up guest: structures at addresses, for walks that a hostile guest prepared."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from drgn import (
    Architecture,
    Object,
    Platform,
    PlatformFlags,
    Program,
    TypeEnumerator,
    TypeMember,
    offsetof,
)

from ouassister.memory import NotMappedError

if TYPE_CHECKING:
    from drgn import Type

    from ouassister.kernel.program import Kernel

SIZE = 1 << 20
_CODES = {"B": (1, False), "b": (1, True), "H": (2, False), "h": (2, True), "I": (4, False),
          "i": (4, True), "Q": (8, False), "q": (8, True)}  # fmt: skip


class FakeGuest:
    """A guest whose memory is written by hand; reads outside of it fault.

    A structure's members are given in order, as (name, kind); a kind is a letter as of
    ``struct``, "p" for a pointer, a number of bytes, or the name of a structure (with " *" for a
    pointer to it), or (kind, count) for an array. They are laid out one behind the other.
    """

    def __init__(self) -> None:
        self.memory = bytearray(SIZE)
        self.pages: dict[int, bytes] = {}  # physical, beside the memory
        self.variables: dict[str, int] = {}
        self.enumerations: dict[str, Type] = {}
        self.symbols = self
        self.structs: dict[str, Type] = {}
        flags = PlatformFlags.IS_64_BIT | PlatformFlags.IS_LITTLE_ENDIAN
        self.prog = Program(Platform(Architecture.X86_64, flags))
        self.prog.add_memory_segment(0, SIZE, lambda at, count, _o, _p: self.read(at, count))
        self.size_bytes = SIZE
        self.next = 0x1000

    @property
    def kernel(self) -> Kernel:
        return cast(
            "Kernel",
            SimpleNamespace(
                prog=self.prog,
                virtual=self,
                memory=self,
                symbols=self,
                levels=4,
                types=SimpleNamespace(struct=self.structs.get),
                type=self.type,
                container=self.container,
            ),
        )

    # --- what a kernel is asked ------------------------------------------------------------

    def read(self, address: int, size: int) -> bytes:
        if not 0 < address <= SIZE - size:
            raise NotMappedError(address)
        return bytes(self.memory[address : address + size])

    def translate(self, address: int) -> int:
        return address

    def address(self, name: str) -> int | None:
        return self.variables.get(name)

    def learn(self, names: object) -> None:
        pass

    def type(self, name: str) -> Type:
        if name.endswith(" *"):
            return self.prog.pointer_type(self.type(name.removesuffix(" *")))
        found = self.structs.get(name.removeprefix("struct ")) or self.enumerations.get(name)
        if found is None:
            raise LookupError(f"could not find '{name}'")
        return found

    def container(self, name: str, member: str, address: int) -> Object:
        kind = self.type(name)
        return Object(self.prog, kind, address=address - offsetof(kind, member))

    # --- what a test says ------------------------------------------------------------------

    def struct(self, name: str, *members: tuple[str, object]) -> Type:
        fields, at = [], 0
        for member, kind in members:
            of, size = self._kind(kind)
            fields.append(TypeMember(of, member, at * 8))
            at += size
        self.structs[name] = self.prog.struct_type(name, max(at, 1), fields)
        return self.structs[name]

    def enum(self, name: str, **values: int) -> None:
        labels = [TypeEnumerator(label, value) for label, value in values.items()]
        number = self.prog.int_type("unsigned int", 4, False)
        self.enumerations[f"enum {name}"] = self.prog.enum_type(name, number, labels)

    def _kind(self, kind: object) -> tuple[Type, int]:
        if isinstance(kind, tuple):
            of, size = self._kind(kind[0])
            return self.prog.array_type(of, kind[1]), size * kind[1]
        if isinstance(kind, int):
            return self.prog.array_type(self.prog.int_type("unsigned char", 1, False), kind), kind
        assert isinstance(kind, str)
        if kind == "p":
            return self.prog.pointer_type(self.prog.void_type()), 8
        if kind in _CODES:
            size, signed = _CODES[kind]
            return self.prog.int_type(f"int{size}", size, signed), size
        if kind.endswith(" *"):
            return self.type(kind), 8
        of = self.type(kind)
        return of, of.size or 0

    def place(self, address: int, layout: str, *values: object) -> int:
        """Write values at an address; return it."""
        data = struct.pack("<" + layout, *values)
        self.memory[address : address + len(data)] = data
        return address

    def new(self, size: int, align: int = 8) -> int:
        """Return the address of fresh memory."""
        self.next = -(-self.next // align) * align
        address = self.next
        self.next += size
        return address

    def put(self, name: str, /, **values: object) -> int:
        """Make a structure with members set; dots are written as two underscores."""
        address = self.new(self.structs[name].size or 8)
        self.set(name, address, **values)
        return address

    def set(self, name: str, address: int, /, **values: object) -> None:
        """Set members of a structure."""
        for member, value in values.items():
            of = Object(self.prog, self.structs[name], address=address)
            for part in member.split("__"):
                of = of.member_(part)
            size = of.type_.size if hasattr(of.type_, "size") else 8
            if isinstance(value, bytes):
                self.memory[of.address_ : of.address_ + len(value)] = value
            else:
                assert isinstance(value, int)
                raw = (value % (1 << 8 * size)).to_bytes(size, "little")
                self.memory[of.address_ : of.address_ + size] = raw

    def string(self, text: bytes) -> int:
        """Write a string; return its address."""
        address = self.new(len(text) + 1)
        self.memory[address : address + len(text)] = text
        return address
