"""Makes a save file with QEMU itself, and the same memory as a flat file."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from ouassister.provider.qmp import Qmp
from ouassister.provider.sockets import connect

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path


def command(machine: str, memory_mib: int) -> list[str]:
    """A VM with firmware and no disk: enough RAM contents, no operating system."""
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu is not None
    argv = [qemu, "-machine", f"{machine},accel=tcg", "-m", str(memory_mib), "-nodefaults"]
    return [*argv, "-display", "none", "-qmp", "unix:qmp.sock,server=on,wait=off"]


def save(
    process: subprocess.Popen[bytes], folder: Path, memory_mib: int
) -> tuple[Path, dict[int, Path]]:
    """Stop the VM, write its memory flat (``pmemsave``) and as a stream.

    Returns:
        The stream, and flat files by address. Video memory and ROMs lie over RAM from 640 KiB to
        1 MiB: what a processor sees there is not what is saved.
    """
    stream = folder / "save.img"
    truth = {0: folder / "low.img", 1 << 20: folder / "high.img"}
    sizes = {0: 640 << 10, 1 << 20: (memory_mib - 1) << 20}
    while True:
        assert process.poll() is None
        try:
            connect(folder / "qmp.sock").close()
            break
        except OSError:
            os.sched_yield()
    with Qmp(folder / "qmp.sock", timeout_s=30) as qmp:
        qmp.execute("stop")
        for start, path in truth.items():
            part = {"val": start, "size": sizes[start], "filename": str(path)}
            qmp.execute_with("pmemsave", part)
        file = os.open(stream, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            qmp.execute("migrate-set-parameters", max_bandwidth=1 << 40)
            qmp.send_fd("save", file)
            qmp.execute("migrate", uri="fd:save")
            while (status := qmp.execute("query-migrate").get("status")) != "completed":
                assert status in ("setup", "active", "device", None), status
        finally:
            os.close(file)
        qmp.execute("quit")
    process.wait(timeout=30)
    return stream, truth
