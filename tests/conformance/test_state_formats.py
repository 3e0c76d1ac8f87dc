"""Each saved-state format, against the program that writes it."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.conformance.make_sample import command, save
from tests.conftest import need

from ouassister.memory import open_save
from ouassister.testing.state_format import check_state_format

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("memory_mib", [16, 96])
def test_qemu_stream_holds_every_rule(machine: str, memory_mib: int, tmp_path: Path) -> None:
    need("qemu-system-x86_64")
    with subprocess.Popen(command(machine, memory_mib), cwd=tmp_path) as process:
        try:
            sample, truth = save(process, tmp_path, memory_mib)
        finally:
            process.kill()
    check_state_format(open_save, sample, truth, tmp_path)


def test_check_finds_a_reader_that_returns_wrong_memory(tmp_path: Path) -> None:
    need("qemu-system-x86_64")
    with subprocess.Popen(command("pc", 16), cwd=tmp_path) as process:
        try:
            sample, truth = save(process, tmp_path, 16)
        finally:
            process.kill()
    raw = bytearray(truth[0].read_bytes())
    raw[0x500] ^= 1
    truth[0].write_bytes(raw)
    with pytest.raises(AssertionError, match="memory differs at 0x0"):
        check_state_format(open_save, sample, truth, tmp_path)
