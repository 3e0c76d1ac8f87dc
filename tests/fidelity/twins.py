"""Two twins of one suspended guest: one updates itself, the other is updated in its sleep."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.fidelity import facts
from tests.fidelity.facts import Facts
from tests.vm.world import World

from ouassister.provider import qemu, vmtoml
from ouassister.testing import Recipe, build_image, clone, guest_run, make_suspended

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ouassister.provider.qemu import RunningVM

BUILD: Final = Path(__file__).parents[2] / "build"
_LIMIT_S: Final = 1800.0
_SETTLED_S: Final = 120.0
# Nothing but the update shall change the twins.
_QUIET: Final = "systemctl stop '*.timer'"
# As a careful administrator would: nobody is asked, and what was edited stays.
_APT: Final = (
    "DEBIAN_FRONTEND=noninteractive apt-get -q -y"
    " -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold"
)
_SETTLED: Final = (
    'for i in $(seq 300); do [ -z "$(systemctl list-jobs --no-legend)" ] && exit 0;'
    " sleep 0.2; done; systemctl list-jobs; exit 1"
)


class UpdateFailedError(Exception):
    """A twin could not be updated; says which, and how it ended."""


@dataclass(frozen=True)
class Pair:
    """What came of one update of both twins. ``since_s``: when they fell asleep."""

    theirs: Facts
    ours: Facts
    since_s: float
    staged: frozenset[str]
    reasons: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)


def sleeping(release: str, packages: Sequence[str], *, outdated: bool) -> Path:
    """The ``vm.toml`` of a suspended guest with these packages beside the usual ones; cached."""
    usual = Recipe(suite=release)
    recipe = Recipe(suite=release, packages=(*usual.packages, *packages))
    image = build_image(BUILD / "guests", recipe, outdated=outdated, progress=print)
    folder = BUILD / "guests" / f"{image.disk.parent.name}-suspended"
    return make_suspended(image, folder, progress=print)


def update_both(base: Path, folder: Path, packages: Sequence[str], *, upgrade: bool) -> Pair:
    """Update a pair of twins, each its way, and ask both.

    Raises:
        UpdateFailedError: One of them could not be updated.
    """
    subprocess.run(["make", "-s", "-C", str(Path(__file__).parents[1] / "view")], check=True)
    seconds: dict[str, float] = {}
    since_s = base.with_name("save.img").resolve().stat().st_mtime
    with _timed(seconds, "ours"):
        ours, report = _in_its_sleep(clone(base, folder / "ours"), folder / "home", packages,
                                     upgrade=upgrade)  # fmt: skip
    with _timed(seconds, "twin"):
        theirs = _by_itself(clone(base, folder / "twin"), packages, upgrade=upgrade)
    chosen = [one for one in report["modes"] if one["mode"] == "staged"]
    staged = frozenset(one["name"] for one in chosen)
    reasons = (*report["notes"], *(f"{one['name']}: {one['reason']}" for one in chosen))
    return Pair(theirs, ours, since_s, staged, reasons, seconds)


def _by_itself(toml: Path, packages: Sequence[str], *, upgrade: bool) -> Facts:
    config = vmtoml.load(toml)
    wish = "upgrade --with-new-pkgs" if upgrade else f"install {shlex.join(packages)}"
    with qemu.restore(config, links_up=True) as vm, _ended(vm):
        vm.qga()
        vm.cont()
        vm.qga().execute("guest-set-time", time=time.time_ns())
        for command in (_QUIET, f"{_APT} update", f"{_APT} {wish}"):
            done = guest_run(vm, command, timeout_s=_LIMIT_S, check=False)
            if done.exit_status != 0:
                words = (done.stdout + done.stderr).decode(errors="replace").strip()[-500:]
                raise UpdateFailedError(f"the twin: {command!r}: {words}")
        return _settled_facts(vm)


def _in_its_sleep(
    toml: Path, home: Path, packages: Sequence[str], *, upgrade: bool
) -> tuple[Facts, dict[str, Any]]:
    world = World(toml, home)
    words = [] if upgrade else [f"--install={name}" for name in packages]
    report: dict[str, Any] = {}
    for verb, arguments in (("update", words), ("resume", [])):
        done = world.run(verb, *arguments)
        if done.status not in (0, 12):
            raise UpdateFailedError(f"ours: {verb} ended with {done.status}: {done.value}")
        report = report or done.result
        if verb == "resume" and done.result["failed_actions"]:
            raise UpdateFailedError(f"ours: {'; '.join(done.result['failed_actions'])}")
    with qemu.attach(world.config) as vm, _ended(vm):
        guest_run(vm, _QUIET)
        return _settled_facts(vm), report


def _settled_facts(vm: RunningVM) -> Facts:
    done = guest_run(vm, _SETTLED, timeout_s=_SETTLED_S, check=False)
    if done.exit_status != 0:
        raise UpdateFailedError(f"jobs do not end: {done.stdout.decode(errors='replace')}")
    return facts.ask(vm)


@contextlib.contextmanager
def _ended(vm: RunningVM) -> Iterator[None]:
    """The guest does not outlive the block."""
    try:
        yield
    finally:
        vm.kill()


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 2)
