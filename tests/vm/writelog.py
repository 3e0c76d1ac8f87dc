"""What a disk holds after a power cut, from a log of all that the guest wrote to it.

A process that is killed loses nothing of what it had written: the host's page cache keeps it. So
a killed QEMU alone is no power cut. QEMU's ``blklogwrites`` stands between the guest's disk and
its image and logs each write, with its data, and each flush, in their order. From that log the
disk is made anew: all that was written before the last flush, and of what came after it any part,
in pieces of 4 KiB, as a disk with a volatile write cache may have them. A write whose flush was
never asked for is at nobody's word.

Format: Linux ``drivers/md/dm-log-writes.c`` (``struct log_write_super``, ``log_write_entry``) as
QEMU writes it (``block/blklogwrites.c``).
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from ouassister.provider import vmtoml

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LOG: Final = "writes.log"
_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
_MAGIC: Final = 0x6A736677736872
_FLUSH, _FUA, _DISCARD = 1, 2, 4
_PIECE: Final = 4096


class Write(NamedTuple):
    """One entry: where its data is in the log, and where it belongs on the disk."""

    flags: int
    offset: int
    size: int
    at: int


def with_log(toml: Path) -> Path:
    """Log the writes to a VM's one disk from now on; returns the log."""
    config = vmtoml.load(toml)
    (disk,) = config.disks
    log = config.folder / LOG
    log.touch()
    node = f"driver=blklogwrites,node-name=logged,file={disk.node},log.driver=file"
    node += f",log.filename={LOG},log-super-update-interval=1"
    device = next(i for i, word in enumerate(config.command) if f"drive={disk.node}," in word)
    command = list(config.command)
    command[device] = command[device].replace(f"drive={disk.node},", "drive=logged,")
    command[device - 1 : device - 1] = ["-blockdev", node]
    toml.write_text(vmtoml.dump(replace(config, command=tuple(command))))
    return log


def without_log(toml: Path) -> None:
    """The disk itself again."""
    config = vmtoml.load(toml)
    command = list(config.command)
    node = next(i for i, word in enumerate(command) if word.startswith("driver=blklogwrites,"))
    del command[node - 1 : node + 1]
    command = [word.replace("drive=logged,", f"drive={config.disks[0].node},") for word in command]
    toml.write_text(vmtoml.dump(replace(config, command=tuple(command))))


def count(log: Path) -> int:
    """How many entries are whole."""
    with log.open("rb") as file:
        raw = file.read(_SUPER.size)
    if not any(raw):  # the file grows before its first block is written
        return 0
    magic, version, entries, _sector = _SUPER.unpack(raw)
    assert (magic, version) == (_MAGIC, 1)
    return int(entries)


def read(log: Path) -> list[Write]:
    """Every whole entry."""
    writes = []
    with log.open("rb") as file:
        magic, version, entries, sector = _SUPER.unpack(file.read(_SUPER.size))
        assert (magic, version) == (_MAGIC, 1)
        at = sector
        for _ in range(entries):
            file.seek(at)
            start, sectors, flags, _length = _ENTRY.unpack(file.read(_ENTRY.size))
            at += sector
            size = 0 if flags & _DISCARD else sectors * sector
            writes.append(Write(flags, start * sector, size, at))
            at += size
    return writes


def find(log: Path, words: bytes) -> int | None:
    """The entry that has these bytes at the start of a block, if it is there yet."""
    if not count(log):
        return None
    with log.open("rb") as file:
        for number, write in enumerate(read(log)):
            for piece in range(0, write.size, _PIECE):
                file.seek(write.at + piece)
                if file.read(len(words)) == words:
                    return number
    return None


def replay(log: Path, entries: int, disk: Path, lands: Callable[[], bool]) -> None:
    """Write the first entries to a raw disk; of what no flush made durable, what ``lands``."""
    writes = read(log)[:entries]
    flushed = max((i for i, write in enumerate(writes) if write.flags & _FLUSH), default=0)
    with log.open("rb") as source, disk.open("r+b") as target:
        for number, write in enumerate(writes):
            durable = number <= flushed or write.flags & _FUA
            for piece in range(0, write.size, _PIECE):
                if durable or lands():
                    source.seek(write.at + piece)
                    target.seek(write.offset + piece)
                    target.write(source.read(min(_PIECE, write.size - piece)))
