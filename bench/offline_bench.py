"""What an update of a sleeping guest takes offline, beside the same apt run in a plain chroot.

Usage: ``python -m bench.offline_bench RESULT``; the result goes into the file's ``offline``.

For each set of packages, both are warmed once (lists and archives are there, files are in the page
cache), and then measured in pairs, with each in turn before the other. The median of the pairs'
ratios counts. Of the update, everything counts but the phases that see the network: reading memory,
the shadow, the packages' scripts, the change set, its store; ``staged`` names packages that are
left to the guest. Of the chroot, apt-get's own time alone; its tree is a copy on a file system of
the host's kernel (`ouassister.demo.baseline`).

Both write to an ext4 with a journal, each in a file on the host's own file system: one without a
journal looks at every inode that was deleted in the last minutes before it makes a new one (Linux
v6.1 fs/ext4/ialloc.c, ``recently_deleted``), and the update before has deleted thousands.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from ouassister import pipeline
from ouassister.demo.baseline import chroot_install_s
from ouassister.model import Mode, Request
from ouassister.provider import vmtoml
from ouassister.sleeping import open_sleeping
from ouassister.store.database import Store
from ouassister.testing import build_image, clone, make_suspended
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.provider.vmtoml import VmConfig

_BUILD: Final = Path(__file__).parents[1] / "build"
_SETS: Final = (("bc",), ("postfix",), ("python3", "build-essential"))
_PAIRS: Final = 5
_DISK_BYTES: Final = 16 << 30  # of a sparse file
_INSIDE: Final = "--inside"
_BAR: Final = 1.3


def compare(config: VmConfig, packages: tuple[str, ...], work: Path) -> dict[str, Any]:
    """Measure one set of packages."""
    with open_sleeping(config) as sleeping:
        root = sleeping.layout.volumes[0].pieces[0]
        image = sleeping.disks[root.disk]
    with Store(work / "mounted" / "state") as store:
        staged: set[str] = set()

        def ours() -> tuple[float, dict[str, float]]:
            story = Timeline(None)
            report = pipeline.update_sleeping(
                config, Request(packages), store, story, pipeline.Options()
            )
            staged.update(one.name for one in report.modes if one.mode is Mode.STAGED)
            return report.offline_s, {one.name: one.seconds for one in report.phases}

        def theirs() -> tuple[float, dict[str, float]]:
            cache = store.vm_folder(config.name) / "cache"
            return chroot_install_s(image, root, cache, work, *packages), {}

        ours()
        theirs()
        pairs = [_pair(ours, theirs, first=turn % 2 == 0) for turn in range(_PAIRS)]
    phases = [phases for _ours, _theirs, phases in pairs]
    return {
        "packages": packages,
        "staged": sorted(staged),
        "ratio": round(median(mine / other for mine, other, _ in pairs), 2),
        "ratios": [round(mine / other, 2) for mine, other, _ in pairs],
        "offline_s": round(median(mine for mine, _, _ in pairs), 3),
        "chroot_s": round(median(other for _, other, _ in pairs), 3),
        "phases": {name: round(median(one[name] for one in phases), 3) for name in phases[0]},
    }


def _pair(
    ours: Callable[[], tuple[float, dict[str, float]]],
    theirs: Callable[[], tuple[float, dict[str, float]]],
    *,
    first: bool,
) -> tuple[float, float, dict[str, float]]:
    """Both, one after the other; ``first``: ours begins."""
    if first:
        mine, phases = ours()
        other, _ = theirs()
    else:
        other, _ = theirs()
        mine, phases = ours()
    return mine, other, phases


def main(result: Path) -> int:
    """Measure every set; 1 when the bar is missed."""
    image = build_image(_BUILD / "guests", progress=print)
    suspended = make_suspended(
        image, _BUILD / "guests" / f"{image.disk.parent.name}-suspended", progress=print
    )
    work = _BUILD / "offline-bench"
    shutil.rmtree(work, ignore_errors=True)
    (work / "mounted").mkdir(parents=True)
    disk = work / "disk.img"
    with disk.open("wb") as file:
        file.truncate(_DISK_BYTES)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(disk)], check=True)
    subprocess.run(["mount", "-o", "loop", str(disk), str(work / "mounted")], check=True)
    config = vmtoml.load(clone(suspended, work / "web1"))
    begun = time.strftime("%Y-%m-%dT%H:%M:%S")
    found = []
    for packages in _SETS:
        found.append(compare(config, packages, work))
        print(json.dumps(found[-1]), flush=True)
    subprocess.run(["umount", str(work / "mounted")], check=True)
    shutil.rmtree(work)
    held = all(one["ratio"] <= _BAR for one in found)
    told = json.loads(result.read_text()) if result.exists() else {}
    load = round(os.getloadavg()[0], 1)
    told["offline"] = {"begun": begun, "sets": found, "bar": _BAR, "held": held, "load": load}
    result.write_text(json.dumps(told, indent=1) + "\n")
    for one in found:
        word = "holds " if one["ratio"] <= _BAR else "MISSED"
        print(word, f"{' '.join(one['packages'])}: {one['ratio']} times a plain chroot")
    return 0 if held else 1


if __name__ == "__main__":
    if sys.argv[2:] != [_INSIDE]:  # mounts go with their namespace, however this ends
        command = [sys.executable, "-m", "bench.offline_bench", sys.argv[1], _INSIDE]
        os.execvp("unshare", ["unshare", "--mount", *command])
    sys.exit(main(Path(sys.argv[1])))
