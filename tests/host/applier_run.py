"""Build the applier, and run it on a world."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need

from ouassister.changeset.medium import MediumInfo, write_medium
from ouassister.reflect.applier_protocol import ApplierResult, Outcome, parse_output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.host.applier_world import World

TOP = Path(__file__).parents[2]
EXIT_STATUS = {
    Outcome.APPLIED: 0,
    Outcome.ALREADY_APPLIED: 0,
    Outcome.REFUSED: 20,
    Outcome.UNDONE: 40,
    Outcome.NEEDS_PERSON: 41,
    Outcome.ROLLED_BACK: 0,
    Outcome.ALREADY_ROLLED_BACK: 0,
    Outcome.FORGOTTEN: 0,
}
DEADLINE_S = 60
ATTESTATION = '{"schema":1,"entries":3,'


@dataclass(frozen=True)
class Appliers:
    """The shipped program, the one that fails on command and the one that checks itself."""

    shipped: Path
    faults: Path
    asan: Path


def build() -> Appliers:
    """Build all three with guest/Makefile."""
    for tool in ("musl-gcc", "gcc", "make"):
        need(tool)
    done = subprocess.run(
        ["make", "-C", str(TOP / "guest"), "tests"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    out = TOP / "build" / "guest"
    if os.environ.get("OUASSISTER_ARCH") == "aarch64":
        return build_arm64()
    return Appliers(out / "applier-x86_64", out / "applier-faults", out / "applier-asan")


def build_arm64() -> Appliers:
    """The same for arm64, each behind a script that has QEMU's user mode run it."""
    for tool in ("aarch64-linux-gnu-gcc", "qemu-aarch64-static"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed ('make applier-arm64' installs it)")
    done = subprocess.run(
        ["make", "-C", str(TOP / "guest"), "arm64-tests"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = TOP / "build" / "guest"
    made = []
    for name in ("applier", "applier-faults"):
        script = out / f"run-{name}-aarch64"
        script.write_text(f'#!/bin/sh\nexec qemu-aarch64-static {out / name}-aarch64 "$@"\n')
        script.chmod(0o755)
        made.append(script)
    return Appliers(made[0], made[1], made[1])


@dataclass
class Stopped:
    """An applier that stands still, and later what it printed."""

    process: subprocess.Popen[bytes]
    output: bytes = b""

    @property
    def result(self) -> ApplierResult:
        """How it ended once it could go on."""
        return parse_output(self.output)


@dataclass
class Bench:
    """A medium for a world, and the programs."""

    appliers: Appliers
    medium: Path
    info: MediumInfo
    root: Path

    @classmethod
    def make(cls, appliers: Appliers, world: World, folder: Path, number: int = 1) -> Bench:
        """Write the world's change set to a medium."""
        layer, medium = folder / f"layer{number}", folder / f"medium{number}"
        layer.write_bytes(world.layer)
        info = write_medium(
            world.changeset(number), layer, appliers.shipped, medium, attestation=ATTESTATION
        )
        return cls(appliers, medium, info, world.root)

    def command(self, program: Path | None = None, sha256: str = "") -> list[str]:
        """The command line."""
        return [
            str(program or self.appliers.shipped),
            "apply",
            str(self.medium),
            "--medium-sha256",
            sha256 or self.info.header_sha256,
            "--root",
            str(self.root),
        ]

    def run(self, *more: str, **environment: str) -> ApplierResult:
        """Run it to its end; environment variables choose the build with faults."""
        program = self.appliers.faults if environment else None
        return self.result(self.raw([*self.command(program), *more], environment))

    def raw(
        self, command: list[str], environment: dict[str, str], stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command with nothing of our environment."""
        return subprocess.run(
            command,
            input=stdin,
            # One run, then the process ends: it frees nothing.
            env={"ASAN_OPTIONS": "detect_leaks=0", **environment},
            capture_output=True,
            check=False,
            timeout=DEADLINE_S,
        )

    @staticmethod
    def result(done: subprocess.CompletedProcess[bytes]) -> ApplierResult:
        """The result, which must agree with the exit status."""
        assert done.stderr == b"", done.stderr.decode()
        result = parse_output(done.stdout)
        assert done.returncode == EXIT_STATUS[result.outcome]
        return result

    def killed_at(self, place: str) -> None:
        """Run it to a step and kill it there."""
        done = self.raw(self.command(self.appliers.faults), {"OUA_KILL_AT": place})
        assert done.returncode == -signal.SIGKILL, (place, done.stdout, done.stderr)

    @contextlib.contextmanager
    def stopped_at(self, place: str) -> Iterator[Stopped]:
        """Run it to a step and stop it there; it goes on to its end when the body has ended."""
        with subprocess.Popen(
            self.command(self.appliers.faults),
            env={"OUA_STOP_AT": place},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                _, status = os.waitpid(process.pid, os.WUNTRACED)
                assert os.WIFSTOPPED(status), f"{place} was never reached"
                stopped = Stopped(process)
                yield stopped
                process.send_signal(signal.SIGCONT)
                stopped.output, errors = process.communicate(timeout=DEADLINE_S)
                assert errors == b"", errors.decode()
            except BaseException:
                process.kill()
                raise

    def steps(self, trace: Path) -> list[str]:
        """Run it whole, and say which steps it took, each as ``name:n``."""
        assert self.run(OUA_TRACE=str(trace)).outcome is Outcome.APPLIED
        return traced(trace)


def traced(trace: Path) -> list[str]:
    """Return the steps that a run wrote down, each as ``name:n``, and forget them."""
    counts: dict[str, int] = {}
    steps = []
    for name in trace.read_text().splitlines():
        counts[name] = counts.get(name, 0) + 1
        steps.append(f"{name}:{counts[name]}")
    trace.unlink()
    return steps


@contextlib.contextmanager
def mounted(folder: Path, *mount: str) -> Iterator[Path]:
    """Mount something in a mount namespace of its own; it goes with the namespace.

    Args:
        folder: Where a mount point is made.
        mount: Arguments of mount(8), without the mount point.

    Yields:
        The mount, through the namespace's root in /proc.
    """
    need("unshare")
    point = folder / "mount"
    point.mkdir(exist_ok=True)
    script = 'mount "$@" && echo ready && exec cat'
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *mount,
         str(point)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as keeper:  # fmt: skip
        assert keeper.stdout is not None
        assert keeper.stdin is not None
        try:
            assert keeper.stdout.readline() == b"ready\n"
            yield Path(f"/proc/{keeper.pid}/root{point}")
        finally:
            keeper.stdin.close()
            keeper.wait(DEADLINE_S)


def wait_until_gone(path: Path) -> None:
    """Wait for a loop device to let go of its file (it does so after the last unmount)."""
    deadline = time.monotonic() + DEADLINE_S
    while (
        str(path)
        in subprocess.run(
            ["losetup", "--list", "--noheadings", "--output", "BACK-FILE"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
