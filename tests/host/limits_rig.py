"""A real shadow over a small tree with this host's dpkg, and packages that go too far."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.conftest import need
from tests.vm.repository import Package, build

from ouassister.disk.layout import Layout, Piece, Place, Volume
from ouassister.disk.matching import Image
from ouassister.disk.storage import create_overlays
from ouassister.model import Uts
from ouassister.shadow.session import Shadow, ShadowSpec, launch, open_shadow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.shadow.limits import Limits

UTS: Final = Uts("Linux", "web1", "6.1.0", "#1", "x86_64", "(none)")
PROGRAMS: Final = (
    *("sh", "cat", "rm", "mv", "mkdir", "dd", "env", "sleep", "setsid", "yes", "stat"),
    *("dpkg", "dpkg-deb", "dpkg-query", "dpkg-split", "tar", "fallocate", "true"),
)
BOMB: Final = "/usr/bin/bomb"
SOURCE: Final = Path(__file__).with_name("fork_bomb.c")
# What hangs is the shell that waits for the end of a pipe. Who holds it went away from all that
# would betray whose child it is: parent, session, environment.
_HOLD: Final = "x=$(env -i setsid sh -c 'trap \"\" HUP TERM; /bin/sleep 2000 & /bin/sleep 2001 &')"
PACKAGES: Final = (
    Package("oua-fine", scripts={"postinst": "echo fine is configured"}),
    Package("oua-forever", scripts={"postinst": "sleep 1000"}),
    Package("oua-held", scripts={"postinst": _HOLD}),
    Package("oua-bomb", scripts={"postinst": BOMB}),
    Package("oua-chatty", scripts={"postinst": "yes endless"}),
    Package("oua-leaves", scripts={"postinst": "setsid sleep 3000 &"}),
)


def make_disk(folder: Path) -> Path:
    """An ext4 with the tree."""
    tree = folder / "tree"
    for name in ("dev", "proc", "sys", "run", "tmp", "etc", "root", "debs"):
        (tree / name).mkdir(parents=True)
    for name in ("lib/apt/lists", "cache/apt"):
        (tree / "var" / name).mkdir(parents=True)
    for name in ("info", "updates", "triggers"):
        (tree / "var/lib/dpkg" / name).mkdir(parents=True)
    for name in ("status", "available"):
        (tree / "var/lib/dpkg" / name).touch()
    for program in PROGRAMS:
        _install(Path(need(program)).resolve(), tree / "usr" / "bin" / program, tree)
    compile_ = [need("gcc"), "-O1", "-static", str(SOURCE), "-o", f"{tree}{BOMB}"]
    subprocess.run(compile_, check=True)
    for name in ("bin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    for package in PACKAGES:
        shutil.copy(build(package, folder), tree / "debs" / f"{package.name}.deb")
    disk = folder / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    make = [need("mke2fs"), "-q", "-t", "ext4", "-d", str(tree), str(disk)]
    subprocess.run(make, check=True, capture_output=True)
    return disk


def _install(program: Path, target: Path, tree: Path) -> None:
    """Copy a program with its libraries, wherever those lie, into one folder of each kind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(program, target)
    told = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    for word in told.split():
        if word.startswith("/"):
            folder = "lib64" if "ld-linux" in word else "lib"
            (tree / "usr" / folder).mkdir(exist_ok=True)
            shutil.copy(word, tree / "usr" / folder)


@contextlib.contextmanager
def opened(disk: Path, work: Path, limits: Limits, cache: Path | None = None) -> Iterator[Shadow]:
    """A shadow with its tree mounted; nothing of it is left afterwards."""
    size = disk.stat().st_size
    layout = Layout(
        (Volume("vda", 254, 0, "ext4", (Piece("vda", 0, size),)),),
        (Place(0, b"/", b"/", read_only=False),),
    )
    work.mkdir(mode=0o711)
    with ExitStack() as stack:
        launched = stack.enter_context(launch(()))
        spec = ShadowSpec(
            work=work,
            cache=cache or work / "cache",
            storage=create_overlays(layout.volumes, {"vda": Image(disk, "raw")}, work),
            layout=layout,
            uts=UTS,
            avoid=(disk.parent,),
            limits=limits,
        )
        shadow = stack.enter_context(open_shadow(launched, spec))
        shadow.mount()
        yield shadow


def install(*names: str) -> list[str]:
    """Install packages, then tell their state and every process that is still there."""
    debs = " ".join(f"/debs/{name}.deb" for name in names)
    script = (
        f"dpkg --force-bad-path --log=/dev/null -i {debs}; s=$?;"
        " dpkg-query -W -f '${Package} ${db:Status-Abbrev}\\n';"
        " for c in /proc/[0-9]*/comm; do read n <$c && echo process $n; done; exit $s"
    )
    return ["sh", "-c", script]
