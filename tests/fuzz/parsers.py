"""Targets that read a file or a piece of memory: save formats, types, symbols, hand-over."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from drgn import Object, TypeKind, sizeof
from tests.fuzz import mutate
from tests.fuzz.engine import CORPUS, Target
from tests.unit.test_btf import program

from ouassister import codec
from ouassister.changeset import archive
from ouassister.disk import raw_inode
from ouassister.disk.handover import HandOver
from ouassister.errors import OUassisterError
from ouassister.kernel import vmcoreinfo
from ouassister.kernel.btf import Btf
from ouassister.kernel.kallsyms import Kallsyms
from ouassister.kernel.program import guest_reads
from ouassister.memory import NotMappedError, VirtualMemory, open_save
from ouassister.model import Changeset, PhysAddr, VirtAddr

if TYPE_CHECKING:
    from random import Random

    from drgn import Type

    from ouassister.memory import PhysicalMemory

_MAX_TYPES: Final = 200
_MAX_PAGES: Final = 64
_PAGE: Final = 4096


class FileTarget(Target):
    """Cases are damaged members of a folder of the corpus."""

    folder: str

    @functools.cached_property
    def seeds(self) -> list[bytes]:
        """The corpus."""
        found = [path.read_bytes() for path in sorted((CORPUS / self.folder).iterdir())]
        assert found, f"the corpus of {self.folder} is empty"
        return found

    @functools.cached_property
    def _structure(self) -> list[list[int]]:
        return [mutate.structure(seed) for seed in self.seeds]

    def make(self, random: Random) -> bytes:
        """See `Target`."""
        index = random.randrange(len(self.seeds))
        return mutate.damage(random, self.seeds[index], self._structure[index], self.seeds)


class Save(FileTarget):
    """Every save format: opened, described, searched and read."""

    folder = "save"
    memory_mib = 512  # what xz may take to expand

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def run(self, case: bytes) -> None:
        """See `Target`."""
        path = self._folder / "save"
        path.write_bytes(case)
        spool = self._folder / "spool"
        try:
            with open_save(path, spool=spool) as save:
                self._read(save.candidates())
                save.require_full("test")
                save.description()
        finally:
            for one in spool.glob("*"):
                one.unlink()

    @staticmethod
    def _read(layouts: list[PhysicalMemory]) -> None:
        notes = vmcoreinfo.Notes(layouts[0])
        for memory in layouts:
            for segment in memory.segments:
                end = min(segment.size_bytes, _MAX_PAGES * _PAGE)
                for at in itertools.chain(range(0, end, _PAGE), (segment.size_bytes - 8,)):
                    try:
                        memory.read(PhysAddr(segment.address + at), 16)
                    except OUassisterError:
                        continue
            for note in notes.find(memory):
                note.symbol("_stext")
            for address in itertools.islice(memory.find(b"\x41" * 8), 1000):
                assert memory.read(address, 8) == b"\x41" * 8


class Types(FileTarget):
    """BTF, and what drgn makes of it: names, sizes, members, values."""

    folder = "btf"

    def run(self, case: bytes) -> None:
        """See `Target`."""
        btf = Btf(case)
        prog, types = program(btf)
        for type_id in range(min(len(btf), _MAX_TYPES) + 2):
            try:
                with guest_reads("fuzzing types"):
                    kind = types.type(type_id)
                    self._look(kind)
                    if kind.kind in (TypeKind.STRUCT, TypeKind.UNION) and kind.tag:
                        types.struct(kind.tag)
                        self._values(Object(prog, kind, address=0))
            except OUassisterError:
                continue
        with guest_reads("fuzzing types"):
            types.constant("RED")
            types.function("call")

    def _look(self, kind: Type) -> None:
        kind.type_name()
        if kind.is_complete() and kind.kind not in (TypeKind.VOID, TypeKind.FUNCTION):
            sizeof(kind)
        if kind.kind in (TypeKind.STRUCT, TypeKind.UNION):
            for member in kind.members or ():
                str(member.type)
            kind.has_member("next")

    def _values(self, one: Object) -> None:
        for member in one.type_.members or ():
            if member.name:
                value = one.member_(member.name)
                if value.type_.kind in (TypeKind.INT, TypeKind.POINTER, TypeKind.ENUM):
                    value.value_()


class _Image:
    """A piece of kernel memory in one stretch."""

    def __init__(self, start: int, data: bytes) -> None:
        self._start, self._data = start, data

    def read(self, address: VirtAddr, size: int) -> bytes:
        at = address - self._start
        if not 0 <= at <= len(self._data) - size:
            raise NotMappedError(address)
        return self._data[at : at + size]


class Symbols(FileTarget):
    """VMCOREINFO and kallsyms, told or scanned for: a page of note, then read-only data."""

    folder = "kallsyms"

    def run(self, case: bytes) -> None:
        """See `Target`."""
        note = vmcoreinfo.parse(case[:_PAGE], PhysAddr(0))
        if note is None:
            return
        start = note.symbol("_stext") or 0
        image = cast("VirtualMemory", _Image(start, case[_PAGE:]))
        with guest_reads("fuzzing symbols"):
            symbols = Kallsyms(image, note, ("linux_banner", "__start_BTF"))
            symbols.learn(("symbol_1", "symbol_2"))
            for name in ("symbol_1", "init_uts_ns", "none"):
                symbols.address(name)


class PageTables(FileTarget):
    """The page walk over tables that point anywhere: the case is all of memory."""

    folder = "pagetables"

    def run(self, case: bytes) -> None:
        """See `Target`."""
        memory = cast("PhysicalMemory", _Image(0, case))
        for levels in (4, 5):
            space = VirtualMemory(memory, PhysAddr(0), levels)
            for bit in range(12, 64):
                for address in (1 << bit, (1 << bit) - 1, (-1 << bit) % (1 << 64)):
                    with guest_reads("fuzzing page tables"):
                        try:
                            space.read(VirtAddr(address), 32)
                        except NotMappedError:
                            continue


class Handed(FileTarget):
    """The hand-over from memory to the sandbox, and inodes of a disk beside it."""

    folder = "handover"
    internal = True  # only we write it

    def __init__(self) -> None:
        self._path = Path(tempfile.mkdtemp(prefix="fuzz-")) / "handover"

    def run(self, case: bytes) -> None:
        """See `Target`."""
        self._path.write_bytes(case)
        hand_over = HandOver(self._path)
        for _ in hand_over.names():
            pass
        for inode in hand_over.inodes[:64]:
            for size in (128, 160, 256):
                raw = bytearray(case[-size:].rjust(size, b"\0"))
                raw_inode.difference(raw, inode, late=True)
                raw_inode.settle(raw, inode)
                assert raw_inode.size(raw) >= 0


class Manifest(FileTarget):
    """The manifest of a change set, with the identifier that fits what it says."""

    folder = "manifest"

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def run(self, case: bytes) -> None:
        """See `Target`."""
        name = "0" * 64
        with contextlib.suppress(ValueError, RecursionError):
            draft = codec.from_value(Changeset, json.loads(case))
            name = codec.digest(draft, without="changeset_id")
            case = codec.canonical(dataclasses.replace(draft, changeset_id=name))
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        try:
            (folder / archive.MANIFEST).write_bytes(case)
            (folder / archive.LAYER).write_bytes(b"")
            changeset, _layer = archive.load(self._folder, name)
            for line in archive.describe(changeset):
                line.encode()
        finally:
            archive.discard(folder)


TARGETS: Final[dict[str, type[Target]]] = {
    "save": Save,
    "btf": Types,
    "kallsyms": Symbols,
    "pagetables": PageTables,
    "handover": Handed,
    "manifest": Manifest,
}
