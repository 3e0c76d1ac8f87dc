"""Packages that do not end well, or that want out of the sandbox."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.vm.repository import Package

if TYPE_CHECKING:
    from tests.cases.canaries import Canaries

_SOURCE: Final = Path(__file__).with_name("escape.c")
_PROGRAM: Final = "/usr/lib/oua-escape/escape"
_TARGETS: Final = "/usr/share/oua-escape/targets"
END: Final = "escape: all was tried"
BOMB: Final = 4000  # processes: what a fork bomb may reach for
FILL_MIB: Final = 2048  # what a disk fill reaches for: more than the disk that it is let loose on

FAILS: Final = Package(
    "oua-fails",
    files={"/usr/share/oua-fails": "here\n"},
    scripts={"postinst": "echo broken on purpose >&2\nexit 3"},
)
# Below it nothing ends well either.
NEEDS_FAILS: Final = Package(
    "oua-needs-fails", depends="oua-fails", files={"/usr/share/oua-needs-fails": "here\n"}
)
WELL: Final = Package("oua-well", files={"/usr/share/oua-well": "here\n"})
WAITS: Final = Package(
    "oua-waits",
    files={"/usr/share/oua-waits": "here\n"},
    scripts={"postinst": "echo waiting\nsleep infinity"},
)
# Bounded, as the machine that it runs on is ours: beyond a few thousand it has shown all.
BOMBS: Final = Package(
    "oua-bombs",
    scripts={
        "postinst": f"n=0\nwhile [ $n -lt {BOMB} ]; do sleep 30 & n=$((n + 1)); done\n"
        'echo "bomb: $n processes"\nkill $(jobs -p)'
    },
)
FILLS: Final = Package(
    "oua-fills",
    scripts={"postinst": f"dd if=/dev/zero of=/var/lib/oua-fill bs=1M count={FILL_MIB}"},
)


def escape(canaries: Canaries, folder: Path) -> Package:
    """The package that tries every way out; ``folder`` takes its program."""
    program = folder / "escape"
    flags = ("-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-static", "-O1", "-s")
    subprocess.run(["gcc", *flags, "-o", str(program), str(_SOURCE)], check=True)
    return Package(
        "oua-escape",
        files={_TARGETS: canaries.targets()},
        copies={_PROGRAM: program},
        scripts={"postinst": f"{_PROGRAM} {_TARGETS}"},
    )


def packages(canaries: Canaries, folder: Path) -> tuple[Package, ...]:
    """All of them."""
    return (FAILS, NEEDS_FAILS, WELL, WAITS, BOMBS, FILLS, escape(canaries, folder))
