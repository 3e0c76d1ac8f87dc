"""QEMU's own programs hold the lock that `writer_of` asks about."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need

from ouassister.state.running import writer_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host

DEADLINE_S = 20.0


def daemon(image: Path, socket: Path, *, read_only: bool) -> subprocess.Popen[bytes]:
    how = f"read-only={'on' if read_only else 'off'}"
    process = subprocess.Popen(
        [
            need("qemu-storage-daemon"),
            "--blockdev", f"driver=file,filename={image},node-name=file,{how}",
            "--blockdev", f"driver=qcow2,file=file,node-name=disk,{how}",
            "--chardev", f"socket,id=ready,path={socket},server=on,wait=off",
            "--monitor", "chardev=ready",
        ]
    )  # fmt: skip
    deadline = time.monotonic() + DEADLINE_S
    while not socket.exists():  # options are handled in order: the disk is open by then
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("read_only", [False, True])
def test_writer_of_image_in_use_tells_writing_from_reading(
    tmp_path: Path, *, read_only: bool
) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run([need("qemu-img"), "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    assert not writer_of(image)
    process = daemon(image, tmp_path / "socket", read_only=read_only)
    try:
        assert writer_of(image) is not read_only
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
    assert not writer_of(image)
