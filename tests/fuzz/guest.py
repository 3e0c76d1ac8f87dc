"""The walkers over a real guest's memory, in which what they read is damaged.

Most of memory is never looked at. So each walk is first made over the memory as it is, and the
places that it reads are noted; a case changes one to four of these, and makes the same walk. The
save file is mapped copy-on-write, so that a change is undone by writing the old bytes back, and
nothing of the file is written.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unittest.mock import patch

from tests.fuzz import mutate
from tests.fuzz.engine import Target

from ouassister.errors import OUassisterError
from ouassister.guest_model import Subject
from ouassister.kernel import dentries, unflushed
from ouassister.kernel.flushed import unflushed_part
from ouassister.kernel.introspect import Guest, look, open_guest
from ouassister.kernel.reader import GuestReader
from ouassister.memory import PhysicalMemory, open_save
from ouassister.shadow import tmpfs_handover
from ouassister.shadow.devices.filesystem import DevFiles
from ouassister.shadow.served.snapshot import decode
from ouassister.shadow.sysfs.filesystem import SysFiles
from ouassister.shadow.tmpfs_handover import TmpfsHandOver
from ouassister.shadow.trees.collect import collect_devices, collect_system, collect_system_first
from ouassister.state.data import MappedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    from ouassister.memory import SaveFile
    from ouassister.model import PhysAddr

_PAGE: Final = 4096
_ROOM: Final = 1 << 30
_NAME_MAX: Final = 255
_TYPES: Final = ("task_struct", "list_head", "mount", "dentry", "inode", "super_block", "file",
                 "mm_struct", "xa_node", "page", "vm_area_struct", "maple_node")  # fmt: skip


class _Private(MappedFile):
    """A file whose copy in this process can be changed."""

    def trim(self) -> None:
        """Keep what was changed."""


def _map_private(path: Path) -> MappedFile:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _Private(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)


class _Traced(PhysicalMemory):
    """Memory that notes where in the file each read lies."""

    places: dict[tuple[int, int], None]

    def read(self, address: PhysAddr, size: int) -> bytes:
        """See `PhysicalMemory`."""
        if size and (address & (_PAGE - 1)) + size <= _PAGE:
            with contextlib.suppress(OUassisterError):
                place = self._page_offset(address)
                if place > 0:
                    self.places[place + (address & (_PAGE - 1)), size] = None
        return super().read(address, size)


class Walkers(Target):
    """All that is asked of a kernel.

    Args:
        path: A save file of a real guest, in a format that is not compressed.
    """

    cpu_s = 30.0
    memory_mib = 1024

    def __init__(self, path: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        mapped: list[MappedFile] = []

        def map_file(path: Path) -> MappedFile:
            mapped.append(_map_private(path))
            return mapped[-1]

        with patch("ouassister.memory.save.map_file", map_file):
            self._save: SaveFile = open_save(path)
        self._file = mapped[0]
        self._guest = open_guest(self._save)
        self._walks: dict[str, Callable[[Guest], object]] = {
            "open": lambda _guest: look(open_guest(self._save), self._save),
            "types": lambda _guest: look(open_guest(self._save), self._save, frozenset(Subject)),
            "look": lambda guest: look(guest, self._save),
            "dentries": self._dentries,
            "flushed": self._flushed,
            "unflushed": lambda guest: unflushed.collect(guest.kernel),
            "memory": self._memory,
            "trees": self._trees,
            **{
                str(subject): functools.partial(self._subject, subject=subject)
                for subject in Subject
            },
            str(Subject.TMPFS_CONTENT): self._tmpfs_content,
        }
        self._places = {name: self._trace(walk) for name, walk in self._walks.items()}
        self._places["types"] = list(self._type_words())

    # --- walks -----------------------------------------------------------------------------

    def _subject(self, guest: Guest, subject: Subject) -> None:
        look(guest, self._save, frozenset((subject,)))

    def _dentries(self, guest: Guest) -> None:
        _mount, root = GuestReader(guest).namespace.root
        for path, entry in dentries.below(guest.kernel, root, b"/"):
            assert entry.address_, path

    def _flushed(self, guest: Guest) -> None:
        for one in GuestReader(guest).block_devices.all:
            unflushed_part(guest.kernel, one.major, one.minor)

    def _tmpfs_content(self, guest: Guest) -> None:
        """Until it is handed over: what is written of it is read again without a doubt."""
        view = look(guest, self._save, frozenset((Subject.TMPFS_CONTENT,)))
        folder = self._folder / "tmpfs"
        folder.mkdir()
        try:
            tmpfs_handover.write(folder, view, _ROOM)
            for number in {place.number for place in tmpfs_handover.read_places(folder) or ()}:
                with contextlib.closing(TmpfsHandOver(folder / str(number))) as handover:
                    for record in handover.records():
                        assert len(record.name) <= _NAME_MAX, record.name
        finally:
            shutil.rmtree(folder)

    def _memory(self, guest: Guest) -> None:
        reader = GuestReader(guest)
        for pid in itertools.islice(reader.processes, 40, None, 4):
            memory = reader.memory(pid)
            if memory is not None:
                memory.arguments()
                memory.environment()

    def _trees(self, guest: Guest) -> None:
        """Until they are handed over: what is written of them is read again without a doubt."""
        devices = collect_devices(GuestReader(guest)).raw
        if devices is not None:
            DevFiles(decode(devices), lambda: (0, 0)).readdir("/", 0)
        collect_system_first(GuestReader(guest))
        system = collect_system(GuestReader(guest)).raw
        if system is not None:
            nodes = decode(system)
            SysFiles(nodes[:1], lambda: nodes, lambda *_: None, lambda _: None).readdir("/", 0)

    # --- what they read --------------------------------------------------------------------

    def _trace(self, walk: Callable[[Guest], object]) -> list[tuple[int, int]]:
        _Traced.places = {}
        memory = self._guest.kernel.memory
        self._forget()
        layout = self._save.layout
        memory.__class__ = _Traced
        self._save.layout = lambda hole: _traced(layout(hole))  # type: ignore[method-assign]
        try:
            walk(Guest(self._guest.kernel, []))
        finally:
            memory.__class__ = PhysicalMemory
            self._save.layout = layout  # type: ignore[method-assign]
        assert _Traced.places, "a walk that reads nothing"
        return list(_Traced.places)

    def _type_words(self) -> Iterator[tuple[int, int]]:
        """Where in the file the records of some types lie."""
        kernel = self._guest.kernel
        btf = kernel.types.btf
        start = kernel.symbols.address("__start_BTF") or 0
        header = int.from_bytes(kernel.virtual.read(start, 8)[4:8], "little")  # type: ignore[arg-type]
        for name in _TYPES:
            kind = kernel.types.struct(name)
            if kind is None:
                continue
            (type_id, *_) = btf.find(name, (4,))  # type: ignore[arg-type]
            first, last = btf._starts[type_id - 1], btf._starts[type_id]
            for word in range(first, last):
                physical = kernel.virtual.translate(start + header + 4 * word)
                place = kernel.memory._page_offset(physical)
                if place > 0:
                    yield place + (physical & (_PAGE - 1)), 4

    def _forget(self) -> None:
        virtual = self._guest.kernel.virtual
        virtual._pages.clear()
        virtual._tables.clear()

    # --- cases -----------------------------------------------------------------------------

    def make(self, random: Random) -> bytes:
        """See `Target`: a walk, and what is written where before it."""
        name = random.choice([*self._walks, *["types"] * 6])
        places = self._places[name]
        changes: dict[int, str] = {}
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            place, size = random.choice(places)
            at = place + random.randrange(size)
            width = random.choice((1, 2, 4, 8, 8, 8, 8))
            at -= at % width
            kind = random.random()
            if width == 8 and kind < 0.55:  # a pointer, as a rule: elsewhere, or into a circle
                other, other_size = random.choice(places)
                other += random.randrange(max(other_size - 7, 1)) & -8
                new = self._file[other : other + 8] if kind < 0.4 else self._file[at : at + 8]
                shift = random.choice((0, 0, 0, 8, 16, -8, 1 << 12, -(1 << 12)))
                new = ((int.from_bytes(new, "little") + shift) % (1 << 64)).to_bytes(8, "little")
            elif kind < 0.75:
                new = mutate.number(random, width)
            else:
                old = int.from_bytes(self._file[at : at + width], "little")
                new = (old ^ 1 << random.randrange(8 * width)).to_bytes(width, "little")
            changes[at] = new.hex()
        return json.dumps({"walk": name, "changes": changes}).encode()

    def run(self, case: bytes) -> None:
        """See `Target`."""
        value = json.loads(case)
        undo = []
        self._forget()
        try:
            for place, text in value["changes"].items():
                at, new = int(place), bytes.fromhex(text)
                undo.append((at, self._file[at : at + len(new)]))
                self._file[at : at + len(new)] = new
            self._walks[value["walk"]](Guest(self._guest.kernel, []))
        finally:
            for at, old in reversed(undo):
                self._file[at : at + len(old)] = old


def _traced(memory: PhysicalMemory) -> PhysicalMemory:
    memory.__class__ = _Traced
    return memory
