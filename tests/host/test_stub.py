"""The stub arrives byte by byte through a shell, and becomes the applier of a medium."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import need

from ouassister.changeset.medium import BLOCK, MediumInfo
from ouassister.reflect import bootstrap

pytestmark = pytest.mark.host

GUEST = Path(__file__).parents[2] / "guest"


@pytest.fixture(scope="module")
def stub() -> Path:
    need("make")
    subprocess.run(["make", "-s", "-C", str(GUEST), "all"], check=True)
    return GUEST.parent / "build" / "guest" / "stub-x86_64"


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_any_bytes_pass_through_printf_of_a_shell(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(shell)
    target = tmp_path / "stub"
    monkeypatch.setattr(bootstrap, "_FILE", str(target))
    content = bytes(range(256)) * 2 + b"%s\\n'\"$(x)"
    command = bootstrap.apply_command(content, "s", MediumInfo(1, "0" * 64, 0), 0)
    # Not a program: the shell's exec of it fails, after it was written.
    subprocess.run([shell, *command[1:]], check=False, capture_output=True)
    assert target.read_bytes() == content
    assert target.stat().st_mode & 0o777 == 0o700


def test_stub_removes_itself_and_waits_for_its_disk(stub: Path, tmp_path: Path) -> None:
    copy = tmp_path / "stub"
    copy.write_bytes(stub.read_bytes())
    copy.chmod(0o700)
    with subprocess.Popen([str(copy), "no-such-serial", "1", str(copy), "apply"]) as process:
        end = time.monotonic() + 10
        while copy.exists() and time.monotonic() < end:
            os.sched_yield()
        assert not copy.exists()
        assert process.poll() is None  # it waits for its disk
        process.kill()


def test_stub_with_too_few_arguments_refuses(stub: Path) -> None:
    assert subprocess.run([str(stub)], check=False).returncode == 2


def test_stub_is_small_enough_for_one_command(stub: Path) -> None:
    """qemu-ga takes requests of up to 4 MiB; a Linux argument has at most 128 KiB."""
    assert stub.stat().st_size < BLOCK
    assert sys.byteorder == "little"
