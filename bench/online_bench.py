"""What a resumed guest feels of its update, beside its own tar(1) of the same files.

Usage: ``python -m bench.online_bench RESULT [PACKAGE...]``; the result goes into the file's
``online``.

For each case the guest is updated asleep, and then measured some times: one twin is resumed through
OUassister, from the first instruction to the open gate; another one is resumed by hand, with the
same layer as a disk, and runs ``tar x`` and ``sync``. The bar is 1.25 times tar and sync, and the
time that the guest takes to see the disk. The cases are one real package, packages of 10 to 10,000
small files, to see that the cost grows with what changed, and one of 10,000 files that the guest
has in an older version, of which 7,200 differ in nothing but their time: about what a big upgrade
brings. There, tar unpacks the package itself, as the layer lacks what has not changed.
`conventional_s` is the update by the guest's own apt with its links up, for the real package.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from tests.vm.repository import Package, Repository, build

from ouassister import pipeline
from ouassister.changeset import archive
from ouassister.demo.twin import update_inside
from ouassister.model import Request
from ouassister.provider import qemu, vmtoml
from ouassister.store.database import Store
from ouassister.testing import build_image, clone, guest_run, make_suspended
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from ouassister.provider.vmtoml import VmConfig

_BUILD: Final = Path(__file__).parents[1] / "build"
_REAL: Final = "bcc"
_FILES: Final = (10, 100, 1000, 10000)
_UPGRADED: Final = "oua-bench-upgraded"
_UPGRADED_FILES: Final = 10000
_SAME_OF_100: Final = 72
_FILE_BYTES: Final = 4000
_BLOCK: Final = 4096
_TIMES: Final = 3
_BAR: Final = 1.25
_LIMIT_S: Final = 600.0
# The guest's clock shows hundredths of a second.
_DISK: Final = """
while :; do
    for disk in /sys/block/vd* /sys/block/sd*; do
        serial=; read -r serial 2>/dev/null <$disk/serial  # which ends without a newline
        [ "$serial" = tar ] && break 2
    done
    sleep 0.01
done
"""
_TAR: Final = f"""{_DISK}
read -r seen rest </proc/uptime
tar -x -f /dev/${{disk##*/}} -C / && sync && read -r done rest </proc/uptime && echo $seen $done
"""
_INSTALL: Final = f"""{_DISK}
tar -x -f /dev/${{disk##*/}} -C /root
dpkg --force-unsafe-io -i /root/*.deb && rm /root/*.deb && sync
"""


def _package(files: int) -> Package:
    # Each another content: nothing is to be had twice.
    content = {
        f"/usr/share/oua-bench/{number % 100}/{number}": f"{number:08d}" * (_FILE_BYTES // 8)
        for number in range(files)
    }
    return Package(f"oua-bench-{files}", files=content)


def _build_upgraded(folder: Path, work: Path) -> Path:
    """Two versions of one package: the new one in ``folder``, the old one as a tar for a disk."""

    def content(version: str) -> dict[str, str]:
        return {
            f"/usr/share/oua-upgraded/{number % 100}/{number}": (
                f"{number:06d}{'--' if number % 100 < _SAME_OF_100 else version}"
            )
            * (_FILE_BYTES // 8)
            for number in range(_UPGRADED_FILES)
        }

    work.mkdir()
    # Both are made in the same second, else: dpkg-deb cuts times to this one (its manual page).
    os.environ["SOURCE_DATE_EPOCH"] = str(int(time.time()) - 86400)
    old = build(Package(_UPGRADED, "1.0", files=content("v1")), work)
    del os.environ["SOURCE_DATE_EPOCH"]
    build(Package(_UPGRADED, "2.0", files=content("v2")), folder)
    return _disk_of(old, work)


def _disk_of(deb: Path, work: Path) -> Path:
    disk = work / "deb.img"
    with tarfile.open(disk, "w") as tar:
        tar.add(deb, deb.name)
    return disk


def _unpacked(deb: Path, work: Path) -> Path:
    """What a package holds, as a tar for a disk."""
    disk = work / "data.img"
    with disk.open("wb") as file:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], check=True, stdout=file)
    os.truncate(disk, -(-disk.stat().st_size // _BLOCK) * _BLOCK)
    return disk


def _prepare(suspended: Path, folder: Path, port: int, old: Path | None) -> Path:
    """A suspended twin that has the bench's repository beside its own, and an old package."""
    toml = clone(suspended, folder)
    config = replace(vmtoml.load(toml), local_mirrors=(("127.0.0.1", port),))
    toml.write_text(vmtoml.dump(config))
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            if old is not None:
                vm.attach_medium(old, "tar")
            vm.cont()
            if old is not None:
                guest_run(vm, _INSTALL, timeout_s=_LIMIT_S)
                vm.detach_medium()
            source = f"deb [trusted=yes] http://127.0.0.1:{port}/ ./\n".encode()
            vm.qga().write_file("/etc/apt/sources.list.d/bench.list", source)
            guest_run(vm, "sync")
            config.save.unlink()  # a link to the other guest's
            vm.suspend()
        except BaseException:
            vm.kill()
            raise
    return toml


def _ours(toml: Path, package: str, work: Path) -> tuple[dict[str, Any], Path]:
    """Update a twin asleep and resume it; return the figures, and its layer."""
    shutil.rmtree(work, ignore_errors=True)
    config = vmtoml.load(clone(toml, work / "vm"))
    with Store(work.parent / "state") as store:
        options = pipeline.Options()
        report = pipeline.update_sleeping(
            config, Request((package,)), store, Timeline(None), options
        )
        _changeset, layer = archive.load(store.changesets(config.name), report.changeset_id)
        medium = work / "layer.img"
        shutil.copy(layer, medium)
        os.truncate(medium, -(-medium.stat().st_size // _BLOCK) * _BLOCK)
        resumed = pipeline.resume(config, store, Timeline(None))
        with qemu.attach(config) as vm:
            vm.kill()
    phases = {one.name: one.seconds for one in (*resumed.phases, *resumed.guest_phases)}
    figures = {"files": report.files, "bytes": report.layer_bytes, "online_s": resumed.online_s}
    return figures | {"phases": phases}, medium


def _theirs(toml: Path, medium: Path, work: Path) -> tuple[float, float]:
    """Resume a twin that unpacks the layer by itself: seconds to the disk, and of tar and sync."""
    shutil.rmtree(work, ignore_errors=True)
    config = vmtoml.load(clone(toml, work))
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.attach_medium(medium, "tar")
            start = time.monotonic()
            vm.cont()
            told = guest_run(vm, _TAR, timeout_s=_LIMIT_S).stdout.split()
            seconds = time.monotonic() - start
        finally:
            vm.kill()
    seen, done = map(float, told)
    return seconds - (done - seen), done - seen


def _measure(toml: Path, package: str, work: Path, whole: Path | None) -> dict[str, Any]:
    """Measure one case; ``whole`` is what tar unpacks, unless that is the layer."""
    runs, tars = [], []
    for _ in range(_TIMES):
        figures, medium = _ours(toml, package, work / "ours")
        runs.append(figures)
        tars.append(_theirs(toml, whole or medium, work / "theirs"))
    bars = [seen + _BAR * tar for seen, tar in tars]
    return {
        "package": package,
        "files": runs[0]["files"],
        "bytes": runs[0]["bytes"],
        "online_s": round(median(one["online_s"] for one in runs), 3),
        "seen_s": round(median(seen for seen, _ in tars), 3),
        "tar_s": round(median(tar for _, tar in tars), 3),
        "bar_s": round(median(bars), 3),
        "phases": {
            name: round(median(one["phases"][name] for one in runs), 3)
            for name in runs[0]["phases"]
        },
    }


def _plot(cases: list[dict[str, Any]]) -> list[str]:
    """Draw time over files: a star for each 50 ms."""
    return [f"{one['files']:>6} files {'*' * round(one['online_s'] * 20)}" for one in cases]


def _conventional(config: VmConfig) -> float:
    return update_inside(config, _REAL, Timeline(None)).seconds


def main(result: Path, wanted: list[str]) -> int:
    """Measure every case, or those that are wanted; 1 when a bar is missed."""
    image = build_image(_BUILD / "guests", progress=print)
    suspended = make_suspended(
        image, _BUILD / "guests" / f"{image.disk.parent.name}-suspended", progress=print
    )
    work = _BUILD / "online-bench"
    shutil.rmtree(work, ignore_errors=True)
    packages = work / "packages"
    packages.mkdir(parents=True)
    begun = time.strftime("%Y-%m-%dT%H:%M:%S")
    for files in _FILES:
        build(_package(files), packages)
    names = [_REAL, *(f"oua-bench-{files}" for files in _FILES), _UPGRADED]
    names = [name for name in names if not wanted or name in wanted]
    old = _build_upgraded(packages, work / "old") if _UPGRADED in names else None
    cases = []
    with Repository(packages) as repository:
        repository.publish()
        toml = _prepare(suspended, work / "base", repository.port, old)
        for name in names:
            new = packages / f"{_UPGRADED}_2.0_all.deb"
            whole = _unpacked(new, work) if name == _UPGRADED else None
            cases.append(_measure(toml, name, work, whole))
            print(json.dumps(cases[-1]), flush=True)
    if _REAL in names:
        config = vmtoml.load(clone(suspended, work / "twin"))
        cases[0]["conventional_s"] = _conventional(config)
    shutil.rmtree(work)
    held = all(one["online_s"] <= one["bar_s"] for one in cases)
    told = json.loads(result.read_text()) if result.exists() else {}
    load = round(os.getloadavg()[0], 1)
    told["online"] = {"begun": begun, "cases": cases, "held": held, "load": load}
    result.write_text(json.dumps(told, indent=1) + "\n")
    for one in cases:
        word = "holds " if one["online_s"] <= one["bar_s"] else "MISSED"
        told = f"{one['online_s']} s; tar {one['tar_s']} s, disk seen {one['seen_s']} s"
        print(word, f"{one['package']}: {told}, bar {one['bar_s']} s")
    print("\n".join(_plot([one for one in cases if one["package"] not in (_REAL, _UPGRADED)])))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
