"""What every reader of a saved-state format has to hold, as one check for ours and for others'.

The oracle is the program that saved the VM: while it was paused it wrote the same memory out in
another way, of which a digest of each MiB is kept (`Truth`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ouassister.errors import PageAbsentError, StateError, UnsupportedError
from ouassister.model import PhysAddr
from ouassister.state.fence import stamp

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import BinaryIO

_MIB = 1 << 20
_PAGE = 4096
_ZEROS = bytes(_PAGE)


class _Memory(Protocol):
    def read(self, address: PhysAddr, size: int) -> bytes:
        """Read guest-physical memory."""


class _Save(Protocol):
    @property
    def memory(self) -> _Memory:
        """The guest's RAM."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What a part of guest-physical memory holds: a digest of each MiB, from its start on."""

    address: int
    size_bytes: int
    digests: tuple[bytes, ...]

    @classmethod
    def read(cls, address: int, source: BinaryIO) -> Truth:
        """Take the memory from a file or pipe, to its end."""
        size = 0
        digests = []
        while part := source.read(_MIB):
            size += len(part)
            digests.append(_digest(part))
        return cls(address, size, tuple(digests))


def _digest(part: bytes) -> bytes:
    """SHA-256 of the pages that are not zero, each behind its number: as safe, and faster."""
    digest = hashlib.sha256(len(part).to_bytes(4, "little"))
    for at in range(0, len(part), _PAGE):
        page = part[at : at + _PAGE]
        if page != _ZEROS:
            digest.update(at.to_bytes(4, "little"))
            digest.update(page)
    return digest.digest()


def check_state_format(
    open_state: Callable[[Path], AbstractContextManager[_Save]],
    sample: Path,
    truth: tuple[Truth, ...],
    folder: Path,
    *,
    cuts: int = 16,
    ends_exactly: bool = True,
) -> None:
    """Hold a reader against a sample; raises AssertionError with the rule that it breaks.

    Args:
        open_state: The reader.
        sample: A save file, made by the real program.
        truth: Parts of the same guest-physical memory.
        folder: An empty folder for spoilt copies.
        cuts: At how many places the file is cut short.
        ends_exactly: Whether the format's last byte is needed.
    """
    before = stamp(sample)
    check_memory(open_state, sample, truth)
    assert stamp(sample) == before, "the save file was touched"  # noqa: S101
    size = sample.stat().st_size
    spoilt = folder / "spoilt"
    shutil.copyfile(sample, spoilt)
    places = [size * part // cuts for part in range(cuts)]
    for place in sorted([*places, *([size - 1] if ends_exactly else [])], reverse=True):
        os.truncate(spoilt, place)
        _check_refused(open_state, spoilt, f"a file cut short at {place}")
    with sample.open("rb") as source:
        head = source.read(4096)
    spoilt.write_bytes(bytes([head[0] ^ 0xFF]) + head[1:])
    _check_refused(open_state, spoilt, "a file of no known format")
    spoilt.unlink()


def check_memory(
    open_state: Callable[[Path], AbstractContextManager[_Save]],
    sample: Path,
    truth: tuple[Truth, ...],
) -> None:
    """Hold what a reader reads against what the real program read."""
    with open_state(sample) as save:
        for part in truth:
            _check_part(save.memory, part)
        assert save.memory.read(PhysAddr(0), 0) == b"", "zero bytes are b''"  # noqa: S101
        try:
            save.memory.read(PhysAddr(1 << 60), 1)
        except PageAbsentError:
            return
        raise AssertionError("memory that no guest has was read")


def _check_part(memory: _Memory, part: Truth) -> None:
    end = part.address + part.size_bytes
    for index, digest in enumerate(part.digests):
        address = part.address + index * _MIB
        try:
            read = memory.read(PhysAddr(address), min(_MIB, end - address))
        except PageAbsentError as error:
            raise AssertionError(f"RAM is missing at {error.address:#x}") from error
        if _digest(read) != digest:
            raise AssertionError(f"memory differs at {address:#x}")


def _check_refused(
    open_state: Callable[[Path], AbstractContextManager[_Save]], spoilt: Path, what: str
) -> None:
    try:
        with open_state(spoilt):
            pass
    except (StateError, UnsupportedError):
        return
    raise AssertionError(f"{what} was taken for whole")
