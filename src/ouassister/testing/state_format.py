"""What every reader of a saved-state format has to hold, as one check for ours and for others'.

The oracle is the program that saved the VM: it wrote the same memory to a flat file as well.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Protocol

from ouassister.errors import PageAbsentError, StateError, UnsupportedError
from ouassister.model import PhysAddr
from ouassister.state.fence import stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

_PAGE = 4096


class _Memory(Protocol):
    def read(self, address: PhysAddr, size: int) -> bytes:
        """Read guest-physical memory."""


class _Save(Protocol):
    @property
    def memory(self) -> _Memory:
        """The guest's RAM."""


def check_state_format(
    open_state: Callable[[Path], AbstractContextManager[_Save]],
    sample: Path,
    truth: Mapping[int, Path],
    folder: Path,
) -> None:
    """Hold a reader against a sample; raises AssertionError with the rule that it breaks.

    Args:
        open_state: The reader.
        sample: A save file, made by the real program.
        truth: Parts of the same guest-physical memory, flat, by their first address.
        folder: An empty folder for spoilt copies.
    """
    before = stamp(sample)
    _check_memory(open_state, sample, truth)
    assert stamp(sample) == before, "the save file was touched"  # noqa: S101
    size = sample.stat().st_size
    for part in range(16):
        _check_refused(open_state, sample, folder, size * part // 16, "a file cut short")
    _check_refused(open_state, sample, folder, size - 1, "a file without its last byte")
    spoilt = folder / "spoilt"
    shutil.copyfile(sample, spoilt)
    with spoilt.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 0xFF]))
    try:
        with open_state(spoilt):
            pass
    except UnsupportedError:
        return
    raise AssertionError("a file of no known format was taken")


def _check_memory(
    open_state: Callable[[Path], AbstractContextManager[_Save]],
    sample: Path,
    truth: Mapping[int, Path],
) -> None:
    with open_state(sample) as save:
        for address, path in truth.items():
            _check_part(save.memory, address, path)
        assert save.memory.read(PhysAddr(0), 0) == b"", "zero bytes are b''"  # noqa: S101
        try:
            save.memory.read(PhysAddr(1 << 60), 1)
        except PageAbsentError:
            return
        raise AssertionError("memory that no guest has was read")


def _check_part(memory: _Memory, address: int, path: Path) -> None:
    with path.open("rb") as flat:
        while page := flat.read(_PAGE):
            try:
                read = memory.read(PhysAddr(address), len(page))
            except PageAbsentError as error:
                raise AssertionError(f"RAM is missing at {address:#x}") from error
            assert read == page, f"memory differs at {address:#x}"  # noqa: S101
            address += len(page)


def _check_refused(
    open_state: Callable[[Path], AbstractContextManager[_Save]],
    sample: Path,
    folder: Path,
    size: int,
    what: str,
) -> None:
    spoilt = folder / "cut"
    with sample.open("rb") as source, spoilt.open("wb") as target:
        target.write(source.read(size))
    try:
        with open_state(spoilt):
            pass
    except (StateError, UnsupportedError):
        return
    raise AssertionError(f"{what} at {size} was taken for whole")
