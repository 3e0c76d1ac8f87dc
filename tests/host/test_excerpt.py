"""The excerpt of package lists, made by the awk program that runs in the guest."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from ouassister.packages import apt, apt_output

if TYPE_CHECKING:
    from pathlib import Path

SIMULATION = """\
Reading package lists...
Inst libfoo1 [1.0-1] (1.0-2+deb12u1 Debian:12.15/oldstable, Debian-Security:12 [amd64]) []
Inst foo (2:3.0~rc1 Debian:12.15/oldstable [all])
Inst bar:i386 (7 Debian:12 [i386])
Remv gone [1]
Conf foo (2:3.0~rc1 Debian:12.15/oldstable [all])
"""
MAIN = """\
Package: foo
Version: 2:3.0~rc1
Architecture: all
Description: kept
 Package: other

Package: foo
Version: 2:2.9
Architecture: all

Package: libfoo1
Architecture: amd64
Version: 1.0-2+deb12u1

Package: foobar
Version: 2:3.0~rc1
Architecture: all

Package: gone
Version: 1
Architecture: amd64

Package: bar
Version: 7
Architecture: amd64
"""
OTHER = """\
Version: 7
Architecture: i386
Package: bar
Depends: foo
"""

pytestmark = pytest.mark.host


def excerpt(folder: Path, lists: dict[str, str], simulation: str = SIMULATION) -> dict[str, str]:
    source, target, log = (folder / name for name in ("lists", "target", "simulate"))
    source.mkdir()
    target.mkdir()
    log.write_text(simulation)
    for name, text in lists.items():
        (source / name).write_text(text)
    command = ["awk", "-v", f"target={target}", "-f", str(apt.EXCERPT_SCRIPT), str(log), "RS="]
    files = [str(path) for path in sorted(source.glob("*_Packages"))]
    subprocess.run([*command, *files], check=True)
    return {path.name: path.read_text() for path in target.iterdir()}


def test_planned_versions_are_kept_and_nothing_else(tmp_path: Path) -> None:
    made = excerpt(tmp_path, {"a_Packages": MAIN, "b_Packages": OTHER})
    stanzas = MAIN.split("\n\n")
    assert made == {"a_Packages": f"{stanzas[0]}\n\n{stanzas[2]}\n\n", "b_Packages": OTHER + "\n"}


def test_a_list_without_a_planned_version_is_left_out(tmp_path: Path) -> None:
    assert excerpt(tmp_path, {"a_Packages": "Package: x\nVersion: 1\nArchitecture: all\n"}) == {}


def test_an_empty_list_is_no_obstacle(tmp_path: Path) -> None:
    made = excerpt(tmp_path, {"a_Packages": "", "b_Packages": OTHER})
    assert made == {"b_Packages": OTHER + "\n"}


def test_another_solution_is_told() -> None:
    changes = apt_output.parse_changes(SIMULATION)
    lines = SIMULATION.splitlines()
    assert apt_output.same_changes(changes, SIMULATION)
    assert apt_output.same_changes(changes, "\n".join(reversed(lines)))
    assert not apt_output.same_changes(changes, "\n".join(lines[:-2]))
    assert not apt_output.same_changes(changes, SIMULATION.replace("2:3.0~rc1", "2:3.1"))
    assert not apt_output.same_changes(changes, SIMULATION + "Inst nonsense\n")
