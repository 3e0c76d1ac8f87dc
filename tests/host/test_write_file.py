"""The shell's function that makes a file in the guest's memory."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
from typing import TYPE_CHECKING

from ouassister.model import WRITE_FILE, Action
from ouassister.reflect import bootstrap

if TYPE_CHECKING:
    from pathlib import Path


def test_a_shell_writes_the_file_whole_or_says_so(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20 + b"the end"
    text = base64.b64encode(content).decode()
    pieces = [text[at : at + 240] for at in range(0, len(text), 240)]
    rights = ("0604", str(os.getuid()), str(os.getgid()))
    (tmp_path / "words").write_text("before")
    good = Action((WRITE_FILE, f"{tmp_path}/words", *rights, *pieces))
    bad = Action((WRITE_FILE, f"{tmp_path}/no/words", *rights, *pieces))
    empty = Action((WRITE_FILE, f"{tmp_path}/empty", *rights))
    command = bootstrap.actions_command([good, bad, empty])
    done = subprocess.run(command, capture_output=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert (first, third) == (b"0 0", b"2 0")
    assert second != b"1 0"
    assert (tmp_path / "words").read_bytes() == content
    assert stat.S_IMODE((tmp_path / "words").stat().st_mode) == 0o604
    assert (tmp_path / "empty").read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "words"]
