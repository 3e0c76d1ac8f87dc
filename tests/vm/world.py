"""Running the command line as a user would, and looking at what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouassister.provider import vmtoml
from ouassister.sleeping import chain
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from ouassister.provider.qemu import RunningVM


@dataclass(frozen=True)
class Done:
    """One finished command."""

    status: int
    value: Any  # parsed standard output
    stderr: str

    @property
    def result(self) -> Any:  # noqa: ANN401 - JSON
        assert "result" in self.value, (self.value, self.stderr[-2000:])
        return self.value["result"]

    @property
    def code(self) -> str:
        """The error's stable code."""
        assert "error" in self.value, (self.value, self.stderr[-2000:])
        code: str = self.value["error"]["code"]
        return code


@dataclass(frozen=True)
class World:
    """A sleeping VM with a home of its own."""

    toml: Path
    home: Path
    timeout_s: float = 300.0

    @property
    def config(self) -> vmtoml.VmConfig:
        return vmtoml.load(self.toml)

    def command(self, verb: str, *words: str) -> list[str]:
        vm = [] if verb == "list" else [str(self.toml)]
        return [sys.executable, "-m", "ouassister", verb, "--json", *vm, *words]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "OUASSISTER_HOME": str(self.home)}

    def run(self, verb: str, *words: str) -> Done:
        done = subprocess.run(
            self.command(verb, *words),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=self.timeout_s,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file of the sleeping VM."""
        found = {}
        for path in (self.config.save.resolve(), *chain(self.config)):
            with path.open("rb") as file:
                found[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
        return found


def until(process: subprocess.Popen[bytes], words: bytes) -> None:
    """Read the story until it says ``words``."""
    assert process.stderr is not None
    seen = b""
    end = time.monotonic() + 120
    while words not in seen:
        assert select.select([process.stderr], [], [], end - time.monotonic())[0], seen
        chunk = os.read(process.stderr.fileno(), 65536)
        assert chunk, seen
        seen += chunk


def use_mirror(toml: Path, port: int) -> None:
    """Say in a ``vm.toml`` that the repository on loopback is meant."""
    config = replace(vmtoml.load(toml), local_mirrors=(("127.0.0.1", port),))
    toml.write_text(vmtoml.dump(config))


def use_source(vm: RunningVM, port: int) -> None:
    """Let the guest's apt know the repository on the host's loopback, and no other."""
    source = f"deb [trusted=yes] http://127.0.0.1:{port}/ ./\n"
    guest_run(vm, "rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*")
    vm.qga().write_file("/etc/apt/sources.list", source.encode())


def with_capture(world: World) -> Path:
    """Record the frames of the VM's network from now on; returns the capture."""
    config = world.config
    option = f"filter-dump,id=frames,netdev={config.nets[0].netdev},file=frames.pcap"
    captured = replace(config, command=(*config.command, "-object", option))
    world.toml.write_text(vmtoml.dump(captured))
    return config.folder / "frames.pcap"


def leftovers(home: Path) -> dict[str, list[str]]:
    """What a run may never leave: processes, mounts, loop devices, work folders."""
    word = str(home)
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                raw = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            line = raw.replace(b"\0", b" ").decode(errors="replace")
            if word in line and int(entry.name) != os.getpid() and "pytest" not in line:
                processes.append(line)
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    loops = subprocess.run(["losetup", "-l", "-n"], capture_output=True, text=True, check=False)
    return {
        "processes": processes,
        "mounts": [line for line in mounts if word in line],
        "loops": [line for line in loops.stdout.splitlines() if word in line],
        "folders": [str(path) for path in home.glob("vms/*/runs/*")],
    }


NOTHING: dict[str, list[str]] = {"processes": [], "mounts": [], "loops": [], "folders": []}
