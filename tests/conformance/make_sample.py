"""A small 64-bit guest under QEMU, and its memory as QEMU itself reads it.

The guest (``guest.S``) fills pages all over its memory and halts; it is ready within a second.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import need

from ouassister.provider.qmp import Qmp
from ouassister.provider.sockets import connect
from ouassister.testing.state_format import Truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_HERE = Path(__file__).parent
MIB = 1 << 20
GIB = 1 << 30
READY = b"R"  # what the guest says on port 0xe9 and on the serial line
# Video memory and ROMs lie over RAM there: what a processor sees is not what is saved.
COVERED = (640 << 10, MIB)


def assemble(folder: Path) -> Path:
    """Make the guest's image."""
    source = str(_HERE / "guest.S")
    subprocess.run([need("gcc"), "-m64", "-c", "-o", "guest.o", source], cwd=folder, check=True)
    subprocess.run(
        [need("ld"), "-Ttext=0x100000", "--oformat", "binary", "-o", "guest.bin", "guest.o"],
        cwd=folder,
        check=True,
    )
    return folder / "guest.bin"


class Guest:
    """A running QEMU whose guest is ready and stopped."""

    def __init__(self, folder: Path, qmp: Qmp, parts: tuple[tuple[int, int], ...]) -> None:
        self.folder = folder
        self.qmp = qmp
        self._parts = parts

    def truth(self, edges: int = 0) -> tuple[Truth, ...]:
        """Read the guest's RAM through QEMU's ``pmemsave``.

        Args:
            edges: Of each part only so many bytes at both ends; all of it by default.
        """

        def save(path: str, address: int, size: int) -> None:
            self.qmp.execute("pmemsave", val=address, size=size, filename=path, timeout_s=120)

        parts = [one for part in self._parts for one in ends(part, edges)]
        return tuple(piped(self.folder, save, part) for part in parts)

    def migrate(self, uri: str, parameters: dict[str, object] | None = None) -> None:
        """Save it to the end."""
        wanted = {"max-bandwidth": 1 << 40, **(parameters or {})}
        self.qmp.execute_with("migrate-set-parameters", wanted)
        self.qmp.execute("migrate", uri=uri)
        while (status := self.qmp.execute("query-migrate").get("status")) != "completed":
            assert status in ("setup", "active", "device", None), status

    def migrate_to(self, path: Path) -> None:
        """Save it to a file through a descriptor."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self.qmp.send_fd("save", file)
            self.migrate("fd:save")
        finally:
            os.close(file)

    def dump(self, path: str, format: str, *, paging: bool = False) -> None:
        """Dump its memory."""
        arguments: dict[str, object] = {"paging": paging, "protocol": f"file:{path}"}
        if format != "elf":
            arguments["format"] = format
        self.qmp.execute_with("dump-guest-memory", arguments)


@contextlib.contextmanager
def running(
    folder: Path,
    machine: str,
    memory_mib: int,
    hole: int,
    options: Sequence[str] = (),
    *,
    inside: Callable[[Sequence[str]], list[str]] = list,
) -> Iterator[Guest]:
    """Run the guest until it is ready, and stop it.

    Args:
        folder: The working folder.
        machine: QEMU's ``-machine``, without the accelerator.
        memory_mib: Size of memory.
        hole: Where its PCI hole starts.
        options: More of QEMU's options.
        inside: Wraps the command, for a QEMU that lies elsewhere; sees ``folder`` as its own
            current one.
    """
    assemble(folder)
    argv = ["qemu-system-x86_64", "-machine", f"{machine},accel=tcg", "-m", str(memory_mib)]
    argv += ["-nodefaults", "-display", "none", "-kernel", "guest.bin", "-debugcon", "stdio"]
    argv += ["-qmp", "unix:qmp.sock,server=on,wait=off", *options]
    with subprocess.Popen(inside(argv), cwd=folder, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == READY, "QEMU or the guest ended"
            connect(folder / "qmp.sock").close()
            with Qmp(folder / "qmp.sock", timeout_s=30) as qmp:
                qmp.execute("stop")
                yield Guest(folder, qmp, ram_parts(memory_mib << 20, hole))
                qmp.execute("quit")
            process.wait(timeout=30)
        finally:
            process.kill()
    (folder / "qmp.sock").unlink(missing_ok=True)


def ram_parts(size: int, hole: int) -> tuple[tuple[int, int], ...]:
    """Address and size of each part of RAM that a processor sees as it is."""
    parts = [(0, COVERED[0]), (COVERED[1], min(size, hole) - COVERED[1])]
    return (*parts, *([(4 * GIB, size - hole)] if size > hole else []))


def hang_up(fifo: Path) -> None:
    """Let go of a reader whose writer never came."""
    with contextlib.suppress(OSError):  # nobody reads any more: the writer was there
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))


def ends(part: tuple[int, int], size: int) -> list[tuple[int, int]]:
    """Address and size of both ends of a part, or of all of it."""
    start, whole = part
    if size == 0 or whole <= 2 * size:
        return [part]
    return [(start, size), (start + whole - size, size)]


def piped(folder: Path, save: Callable[[str, int, int], None], part: tuple[int, int]) -> Truth:
    """Have memory written into a pipe: nothing of it comes to lie on the disk."""
    fifo = folder / "memory.fifo"
    os.mkfifo(fifo)
    address, size = part
    try:
        with ThreadPoolExecutor(1) as beside:
            writing = beside.submit(save, fifo.name, address, size)
            writing.add_done_callback(lambda _done: hang_up(fifo))
            with fifo.open("rb") as source:
                truth = Truth.read(address, source)
            writing.result()
    finally:
        fifo.unlink()
    assert truth.size_bytes == size
    return truth
