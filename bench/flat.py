"""Write a sleeping guest's physical memory as one sparse file.

Usage: ``python -m bench.flat SAVE TARGET``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ouassister.kernel import open_guest
from ouassister.memory import open_save
from ouassister.model import PhysAddr

_MIB = 1 << 20


def flatten(save_file: Path, target: Path) -> None:
    """Write it; what is zero stays a hole."""
    with open_save(save_file) as save, target.open("wb") as flat:
        memory = open_guest(save).kernel.memory
        for segment in memory.segments:
            end = segment.address + segment.size_bytes
            for at in range(segment.address, end, _MIB):
                data = memory.read(PhysAddr(at), min(_MIB, end - at))
                if data.count(0) != len(data):
                    flat.seek(at)
                    flat.write(data)
        flat.truncate(max(one.address + one.size_bytes for one in memory.segments))


if __name__ == "__main__":
    flatten(Path(sys.argv[1]), Path(sys.argv[2]))
