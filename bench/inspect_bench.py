"""Time and memory of ``inspect``, beside volatility3 on the same suspended guests.

Usage: ``python -m bench.inspect_bench RESULT``. volatility3 lies in a virtual environment of its
own (``make bench`` makes it), and is given what it is quickest with, none of which is timed:

* a symbol file made from the guest's own BTF and kallsyms (`bench.isf`);
* a flat image of the guest's memory: its reader of QEMU's format looks at one page at a time, and
  does not find a kernel's banner that lies across two;
* a guest with page tables of four levels, since it does not know five.

Both must list the same processes, and of disks the same cached files. Its list of cached files is
made once; all else three times, in turn, and the median counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from bench.isf import export
from ouassister.kernel import open_guest
from ouassister.memory import open_save
from ouassister.model import PhysAddr
from ouassister.provider import vmtoml
from ouassister.testing import build_image, make_suspended

if TYPE_CHECKING:
    from collections.abc import Sequence

_BUILD: Final = Path(__file__).parents[1] / "build"
_VOLATILITY: Final = _BUILD / "bench-venv" / "bin" / "vol"
_GUESTS: Final = ((512, "pc"), (4096, "q35"))
_REPEAT: Final = 3
_FEW: Final = 100
_MIB: Final = 1 << 20
_WALL_S, _RSS_MIB, _FASTER, _GROWTH = 1.5, 400, 10, 1.5


@dataclass(frozen=True)
class Cost:
    """One finished program."""

    wall_s: float
    rss_mib: float
    output: bytes


def run(argv: Sequence[str]) -> Cost:
    """Run a program to its end; it must succeed."""
    with tempfile.TemporaryFile() as output:
        start = time.monotonic()
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, argv)
        return Cost(wall, usage.ru_maxrss / 1024, output.read())


def flatten(save_file: Path, target: Path) -> None:
    """Write guest-physical memory as one sparse file."""
    with open_save(save_file) as save, target.open("wb") as flat:
        memory = open_guest(save).kernel.memory
        for segment in memory.segments:
            for at in range(segment.address, segment.address + segment.size_bytes, _MIB):
                size = min(_MIB, segment.address + segment.size_bytes - at)
                data = memory.read(PhysAddr(at), size)
                if data.count(0) != size:
                    flat.seek(at)
                    flat.write(data)
        flat.truncate(max(one.address + one.size_bytes for one in memory.segments))


def compare(toml: Path, work: Path) -> dict[str, Any]:
    """Measure both on one suspended guest, in turn."""
    save = vmtoml.load(toml).save
    symbols, flat = work / "symbols", work / "memory.raw"
    export(save, symbols / "linux" / "guest.json")
    flatten(save, flat)
    ours = [sys.executable, "-m", "ouassister", "inspect", "--json", str(toml)]
    files = [sys.executable, "-m", "bench.page_cache", str(save)]
    theirs = [str(_VOLATILITY), "-q", "-r", "json", "-s", str(symbols), "-f", str(flat)]
    # Each once unmeasured: files become warm, and volatility3 keeps what it learns of symbols.
    run(ours)
    run([*theirs, "linux.pslist"])
    inspect, pages, pslist, cached = [], [], [], []
    for _ in range(_REPEAT):
        inspect.append(run(ours))
        pslist.append(run([*theirs, "linux.pslist"]))
        pages.append(run(files))
    cached.append(run([*theirs, "linux.pagecache.Files"]))  # takes minutes
    same_processes(inspect[-1].output, pslist[-1].output)
    same_files(pages[-1].output, cached[-1].output)
    wall = {
        name: round(median(cost.wall_s for cost in costs), 3)
        for name, costs in (
            ("wall_s", inspect),
            ("volatility_s", pslist),
            ("page_cache_s", pages),
            ("volatility_page_cache_s", cached),
        )
    }
    memory = {
        name: round(max(cost.rss_mib for cost in costs), 1)
        for name, costs in (
            ("rss_mib", inspect),
            ("volatility_rss_mib", pslist),
            ("page_cache_rss_mib", pages),
            ("volatility_page_cache_rss_mib", cached),
        )
    }
    return wall | memory


def same_processes(ours: bytes, theirs: bytes) -> None:
    """Both list the same processes."""
    mine = {(task["pid"], task["comm"]) for task in json.loads(ours)["result"]["tasks"]}
    other = {(task["PID"], task["COMM"]) for task in json.loads(theirs)}
    assert other, "volatility3 found no process"  # noqa: S101
    assert {pid for pid, _ in mine} == {pid for pid, _ in other}, mine ^ other  # noqa: S101


def same_files(ours: bytes, theirs: bytes) -> None:
    """What volatility3 finds cached of disks is in our list, with as many pages."""
    mine = {}
    for line in ours.splitlines():
        device, inode, pages, _ = line.split(b" ", 3)
        mine[device.decode(), int(inode)] = int(pages)
    other = {
        (row["Device"], row["InodeNum"]): row["CachedPages"]
        for row in json.loads(theirs)
        if not row["Device"].startswith("0:")
    }
    assert len(other) > _FEW, "volatility3 found no cached files"  # noqa: S101
    wrong = {key: (pages, mine.get(key)) for key, pages in other.items() if mine.get(key) != pages}
    assert not wrong, f"{len(wrong)} of {len(other)} cached files differ: {wrong}"  # noqa: S101


def bars(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What was promised, and whether it holds."""
    small, large = found["512"], found["4096"]
    return {
        f"under {_WALL_S} s at 512 MiB": small["wall_s"] < _WALL_S,
        f"under {_RSS_MIB} MiB at 512 MiB": small["rss_mib"] < _RSS_MIB,
        f"4 GiB at most {_GROWTH} times that": large["wall_s"] <= _GROWTH * small["wall_s"],
        f"{_FASTER} times faster than volatility3, processes": all(
            one["volatility_s"] >= _FASTER * one["wall_s"] for one in found.values()
        ),
        f"{_FASTER} times faster than volatility3, page cache": all(
            one["volatility_page_cache_s"] >= _FASTER * one["page_cache_s"]
            for one in found.values()
        ),
    }


def main(result: Path) -> int:
    """Measure every guest; 1 when a bar is missed."""
    image = build_image(_BUILD / "guests", progress=print)
    image = replace(image, cmdline=f"{image.cmdline} no5lvl")
    found = {}
    for size, machine in _GUESTS:
        folder = _BUILD / "guests" / f"{image.disk.parent.name}-bench-{size}"
        toml = make_suspended(image, folder, memory_mib=size, machine=machine, progress=print)
        with tempfile.TemporaryDirectory(dir=_BUILD) as work:
            found[str(size)] = compare(toml, Path(work))
        print(size, json.dumps(found[str(size)]))
    kept = bars(found)
    load = round(os.getloadavg()[0], 1)
    result.write_text(json.dumps({"inspect": found, "bars": kept, "load": load}, indent=1) + "\n")
    for name, held in kept.items():
        print("holds " if held else "MISSED", name)
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
