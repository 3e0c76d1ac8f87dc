"""A program whose /proc goes away in the middle has not ended well, whatever it says itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import lacking
from tests.host.limits_rig import make_disk, opened

from ouassister.errors import HostNotReadyError
from ouassister.shadow.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.host, pytest.mark.timeout(120)]


def servers() -> Iterator[int]:
    """Processes of a keeper that hold a connection of FUSE; here that of /proc is the only one."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = b"ouassister.shadow.keeper" in (process / "cmdline").read_bytes()
            if ours and any(str(one.readlink()) == "/dev/fuse" for one in process.glob("fd/*")):
                yield int(process.name)
        except (FileNotFoundError, ProcessLookupError):
            continue


def test_server_of_proc_that_dies_fails_the_run(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        lacking("root")
    killed: list[int] = []

    def kill() -> None:
        end = time.monotonic() + 60
        while not killed and time.monotonic() < end:
            if (tmp_path / "work" / "shadow" / "log" / "started").exists():
                killed.extend(servers())
            time.sleep(0.05)  # between two looks
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        (tmp_path / "work" / "shadow" / "log" / "killed").touch()

    with opened(make_disk(tmp_path), tmp_path / "work", Limits()) as shadow:
        assert shadow.run(["cat", "/proc/self/stat"], package_cache=False, output="told") == 0
        killer = threading.Thread(target=kill)
        killer.start()
        script = "cd /run/ouassister/log; : >started; until [ -e killed ]; do sleep 0.1; done"
        with pytest.raises(HostNotReadyError, match="the server of /proc died"):
            shadow.run(["sh", "-c", script], package_cache=False, output="told", timeout_s=60)
        killer.join()
    assert len(killed) == 1
