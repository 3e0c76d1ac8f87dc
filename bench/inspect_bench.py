"""Time and memory of ``inspect``, beside volatility3 on the same save files.

Usage: ``python -m bench.inspect_bench RESULT``. volatility3 lies in a virtual environment of its
own (``make bench`` makes it). It is given a symbol file made from the guest's own BTF and kallsyms
(`bench.isf`; not timed), and guests with page tables of four levels, since it does not know five.
Both run from bytecode, as they do once they are installed. What it takes on a flat image of the
same memory is told as well (writing that is not timed).

Both must list the same processes, and of disks the same cached files. Its list of cached files is
made once; all else three times, in turn, and the median counts.
"""

from __future__ import annotations

import compileall
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

from ouassister.provider import vmtoml
from ouassister.testing import build_image, make_suspended

if TYPE_CHECKING:
    from collections.abc import Sequence

_SOURCE: Final = Path(__file__).parents[1] / "src"
_BUILD: Final = Path(__file__).parents[1] / "build"
_VOLATILITY: Final = _BUILD / "bench-venv" / "bin" / "vol"
_GUESTS: Final = ((512, "pc"), (4096, "q35"))
_REPEAT: Final = 3
_FEW: Final = 100
_PAIRS: Final = 7
_WALL_S, _RSS_MIB, _FASTER, _GROWTH = 1.5, 400, 10, 1.5


@dataclass(frozen=True)
class Cost:
    """One finished program."""

    wall_s: float
    cpu_s: float
    rss_mib: float
    output: bytes


def run(argv: Sequence[str]) -> Cost:
    """Run a program to its end; it must succeed.

    The highest memory of a child counts from before its execve(2), ours included (fs/exec.c,
    ``exec_mmap``): whatever needs much is done by other processes.
    """
    with tempfile.TemporaryFile() as output:
        start = time.monotonic()
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, argv)
        cpu = usage.ru_utime + usage.ru_stime
        return Cost(wall, cpu, usage.ru_maxrss / 1024, output.read())


def compare(toml: Path, work: Path) -> dict[str, Any]:
    """Measure both on one suspended guest, in turn."""
    save = vmtoml.load(toml).save
    symbols, flat = work / "symbols", work / "memory.raw"
    python = (sys.executable, "-m")
    run([*python, "bench.isf", str(save), str(symbols / "linux" / "guest.json")])
    run([*python, "bench.flat", str(save), str(flat)])
    theirs = (str(_VOLATILITY), "-q", "-r", "json", "-s", str(symbols), "-f")
    programs = {
        "": [*python, "ouassister", "inspect", "--json", str(toml)],
        "volatility_": [*theirs, str(save), "linux.pslist"],
        "volatility_flat_": [*theirs, str(flat), "linux.pslist"],
        "page_cache_": [*python, "bench.page_cache", str(save)],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in programs}
    for turn in range(_REPEAT + 1):
        for name, argv in programs.items():
            cost = run(argv)
            if turn > 0:  # before, files become warm, and volatility3 keeps what it learns
                costs[name].append(cost)
    costs["volatility_page_cache_"] = [run([*theirs, str(save), "linux.pagecache.Files"])]
    same_processes(costs[""][-1].output, costs["volatility_"][-1].output)
    same_files(costs["page_cache_"][-1].output, costs["volatility_page_cache_"][-1].output)
    found = {}
    for name, every in costs.items():
        found[f"{name}wall_s"] = round(median(cost.wall_s for cost in every), 3)
        found[f"{name}cpu_s"] = round(median(cost.cpu_s for cost in every), 3)
        found[f"{name}rss_mib"] = round(max(cost.rss_mib for cost in every), 1)
    found["volatility_s"] = found["volatility_wall_s"]
    return found


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


def growth(small: Path, large: Path) -> float:
    """How many times longer ``inspect`` takes on the larger guest; measured in turn."""
    pair: tuple[list[float], list[float]] = ([], [])
    for _ in range(_PAIRS):
        for toml, every in zip((small, large), pair, strict=True):
            argv = [sys.executable, "-m", "ouassister", "inspect", "--json", str(toml)]
            every.append(run(argv).wall_s)
    return round(median(pair[1]) / median(pair[0]), 2)


def bars(found: dict[str, dict[str, Any]], times: float) -> dict[str, bool]:
    """What was promised, and whether it holds."""
    small = found["512"]
    return {
        f"under {_WALL_S} s at 512 MiB": small["wall_s"] < _WALL_S,
        f"under {_RSS_MIB} MiB at 512 MiB": small["rss_mib"] < _RSS_MIB,
        f"4 GiB at most {_GROWTH} times that": times <= _GROWTH,
        f"{_FASTER} times faster than volatility3, processes": all(
            one["volatility_s"] >= _FASTER * one["wall_s"] for one in found.values()
        ),
        f"{_FASTER} times faster than volatility3, page cache": all(
            one["volatility_page_cache_wall_s"] >= _FASTER * one["page_cache_wall_s"]
            for one in found.values()
        ),
    }


def main(result: Path) -> int:
    """Measure every guest; 1 when a bar is missed."""
    if not compileall.compile_dir(_SOURCE, quiet=1):  # pip has done so with volatility3
        raise OSError(f"{_SOURCE} cannot be compiled")
    image = build_image(_BUILD / "guests", progress=print)
    image = replace(image, cmdline=f"{image.cmdline} no5lvl")
    found, tomls = {}, []
    for size, machine in _GUESTS:
        folder = _BUILD / "guests" / f"{image.disk.parent.name}-bench-{size}"
        toml = make_suspended(image, folder, memory_mib=size, machine=machine, progress=print)
        tomls.append(toml)
        with tempfile.TemporaryDirectory(dir=_BUILD) as work:
            found[str(size)] = compare(toml, Path(work))
        print(size, json.dumps(found[str(size)]))
    times = growth(*tomls)
    kept = bars(found, times)
    load = round(os.getloadavg()[0], 1)
    told = {"inspect": found, "growth": times, "bars": kept, "load": load}
    result.write_text(json.dumps(told, indent=1) + "\n")
    for name, held in kept.items():
        print("holds " if held else "MISSED", name)
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
