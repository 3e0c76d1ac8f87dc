"""Probes under the real system call filter and its handlers, and a guest for them to ask about."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.conftest import lacking, need

from ouassister import codec
from ouassister.guest_model import GuestPid
from ouassister.model import Uts
from ouassister.shadow.syscalls.facts import GuestFacts, GuestMemory, GuestProcess
from ouassister.shadow.syscalls.numbers import I386, X86_64

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE: Final = Path(__file__).parents[2] / "src"
INSIDE: Final = Path(__file__).with_name("syscall_inside.py")
PROBE: Final = Path(__file__).with_name("syscall_probe.c")
THREADS: Final = Path(__file__).with_name("syscall_threads.c")
BASE: Final = 0x6FFF0000  # host ids that nobody has
BARE: Final = (
    *("-O1", "-Wall", "-Wextra", "-Werror", "-static", "-nostdlib", "-nostartfiles"),
    *("-ffreestanding", "-fno-pic", "-no-pie", "-fno-stack-protector"),
)

UTS: Final = Uts("Linux", "web1", "6.1.0-56-cloud-amd64", "#1 SMP Debian", "x86_64", "(none)")
INIT: Final = GuestProcess(GuestPid(1), b"systemd", 0, 0, (GuestPid(1),), group=1, session=1)
NGINX: Final = GuestProcess(
    GuestPid(571),
    b"nginx",
    33,
    33,
    (GuestPid(571), GuestPid(573)),
    nice=-5,
    policy=2,
    priority=7,
    group=570,
    session=569,
    limits=tuple((1000 + number, 2000 + number) for number in range(16)),
)
SHELL: Final = GuestProcess(GuestPid(801), b"bash", 1000, 1000)
FACTS: Final = GuestFacts(
    UTS,
    (INIT, NGINX, SHELL),
    cpus=3,
    memory=GuestMemory(8 << 30, 5 << 30, 1 << 20, 2 << 20, 6 << 30, 3 << 30),
    uptime_s=123456,
    loads=(65536, 32768, 16384),
    threads=99,
    mounted=(b"/", b"/boot"),
)

BOTH = pytest.mark.parametrize("bits", [64, 32])
OWN = 4_000_000  # the pid of the program
FILE = "/tmp/file"  # noqa: S108 - in the probe's own tree
DISK = "/tmp/disk"  # noqa: S108 - the same
NODES = "/tmp/%s/node"  # noqa: S108 - the same
PACKAGE = {"DPKG_MAINTSCRIPT_PACKAGE": "postfix"}


@dataclass(frozen=True)
class Outcome:
    """What a program printed, and what was written down of it."""

    status: int
    lines: list[str]
    records: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]

    @property
    def results(self) -> list[int]:
        return [int(line.split()[0]) for line in self.lines]

    def told(self, *keys: str) -> list[tuple[Any, ...]]:
        """These parts of each record."""
        return [tuple(record[key] for key in keys) for record in self.records]

    def buffer(self, line: int, number: int = 0) -> bytes:
        return bytes.fromhex(self.lines[line].split()[1 + number])


@dataclass
class Rig:
    """Compiles the probes once, and runs them."""

    folder: Path
    programs: dict[str, str] = field(default_factory=dict)

    def build(self) -> None:
        compiler = need("gcc")
        kinds: dict[str, tuple[str, ...]] = {
            "probe64": ("-m64", *BARE, str(PROBE)),
            "probe32": ("-m32", *BARE, str(PROBE)),
            "threads": ("-m64", "-O1", "-static", "-pthread", str(THREADS)),
        }
        for name, options in kinds.items():
            target = str(self.folder / name)
            subprocess.run([compiler, *options, "-o", target], check=True)
            self.programs[name] = target

    def run(
        self,
        argv: list[str],
        *,
        uid: int = 0,
        facts: GuestFacts = FACTS,
        environment: dict[str, str] | None = None,
        links: dict[str, str] | None = None,
        high_pids: bool = True,
    ) -> Outcome:
        request = {
            "source": str(SOURCE),
            "stage": str(self.folder / "stage"),
            "base": BASE,
            "facts": codec.to_value(facts),
            "programs": self.programs,
            "links": links or {},
            "argv": [f"/bin/{argv[0]}", *argv[1:]],
            "environment": environment or {},
            "uid": uid,
            "high_pids": high_pids,
            "timeout_s": 60,
        }
        done = subprocess.run(
            [sys.executable, "-I", str(INSIDE), json.dumps(request)],
            check=False,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr.decode()
        answer = json.loads(done.stdout)
        lines = base64.b64decode(answer["output"]).decode().splitlines()
        return Outcome(answer["status"], lines, answer["records"], answer["files"])

    def calls(self, *calls: str, bits: int = 64, **options: Any) -> Outcome:  # noqa: ANN401 - of `run`
        """Make system calls; each is a name and arguments, as the probe reads them."""
        numbers = X86_64 if bits == 64 else I386
        argv = [f"probe{bits}"]
        for one in calls:
            name, _, arguments = one.partition(":")
            argv.append(
                f"{numbers.get(name, name)}:{arguments}"
                if arguments
                else f"{numbers.get(name, name)}"
            )
        outcome = self.run(argv, **options)
        assert outcome.status == 0, outcome
        assert len(outcome.lines) == len(calls), outcome
        return outcome


@contextlib.contextmanager
def opened() -> Iterator[Rig]:
    """A rig, and nothing left of it."""
    if os.geteuid() != 0:
        lacking("writes the maps of a user namespace: needs root")
    # Not tmp_path: its parents are closed to the namespace's root.
    folder = Path(tempfile.mkdtemp(prefix="ouassister-syscalls-"))
    folder.chmod(0o755)
    try:
        (folder / "stage").mkdir(mode=0o755)
        os.chown(folder / "stage", BASE, BASE)
        rig = Rig(folder)
        rig.build()
        yield rig
    finally:
        shutil.rmtree(folder)


def words(*values: int, bits: int = 64) -> str:
    """Longs of an ABI, as a buffer of the probe."""
    kind = "q" if bits == 64 else "i"
    return "x" + struct.pack(f"<{len(values)}{kind}", *values).hex()
