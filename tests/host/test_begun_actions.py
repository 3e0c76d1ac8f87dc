"""Actions that go on behind the open gate: the shell's own waiting, on processes of this host."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from tests.unit.test_verify import changeset

from ouassister.model import Action
from ouassister.reflect import bootstrap, verify
from ouassister.restart.reach import Parts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.host

# In the place of the guest's: ends the old process, and needs a while for the new one.
_SYSTEMCTL = """#!/bin/sh
case $1 in
restart) rm {folder}/lives && kill {pid}; sleep 1.5; echo >{folder}/started ;;
list-units) ;;
*) [ "$1" != fail ] ;;
esac
"""
RESTART = Action(("systemctl", "restart"))


@pytest.fixture
def old(tmp_path: Path) -> Iterator[int]:
    """The process that is to be ended."""
    with subprocess.Popen(["sleep", "60"]) as process:
        (tmp_path / "lives").touch()
        tools = tmp_path / "bin"
        tools.mkdir()
        (tools / "systemctl").write_text(_SYSTEMCTL.format(folder=tmp_path, pid=process.pid))
        (tools / "dpkg").write_text("#!/bin/sh\n")
        for tool in tools.iterdir():
            tool.chmod(0o755)
        yield process.pid
        process.kill()


def run(command: list[str], folder: Path) -> bytes:
    """Run a command of ours with what it keeps in the guest in a folder."""
    shell, option, script, *words = command
    script = script.replace("state=/var/lib/ouassister", f"state={folder}")
    # Nobody reaps it here, as init does in the guest.
    assert '[ ! -e "/proc/$pid" ]' in script
    script = script.replace('[ ! -e "/proc/$pid" ]', "grep -q '^State:.Z' /proc/$pid/status")
    path = f"{folder}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        [shell, option, script, *words],
        env={"PATH": path},
        capture_output=True,
        check=False,
        timeout=30,
    )
    return done.stdout


def test_first_command_ends_when_what_is_old_has_ended(tmp_path: Path, old: int) -> None:
    parts = Parts(
        (Action(("true",)), RESTART, Action(("systemctl", "fail"))), 1, (old,), (RESTART,)
    )
    said = run(verify.begin_command(changeset(), parts), tmp_path)
    assert not (tmp_path / "started").exists()
    assert b"v marker" in said
    worker = verify.worker(said)
    os.kill(worker, 0)
    told = run(verify.follow_command(changeset(), parts, worker), tmp_path)
    assert (tmp_path / "started").exists()
    failed = bootstrap.failed_actions((*parts.begun, *parts.left), told)
    assert failed == ("systemctl fail: status 1",)
    assert not (tmp_path / "begun").exists()


def test_it_waits_for_the_actions_that_are_more_than_restarts(tmp_path: Path, old: int) -> None:
    slow = Action(("sleep", "1"))
    start = time.monotonic()
    parts = Parts((slow, RESTART), 1, (old,), ())
    run(verify.begin_command(changeset(), parts), tmp_path)
    assert time.monotonic() - start >= 1


def test_who_died_on_the_way_is_told(tmp_path: Path, old: int) -> None:
    parts = Parts((Action(("true",)), RESTART, Action(("true",))), 1, (old,), ())
    worker = verify.worker(run(verify.begin_command(changeset(), parts), tmp_path))
    os.kill(worker, signal.SIGKILL)
    told = run(verify.follow_command(changeset(), parts, worker), tmp_path)
    failed = bootstrap.failed_actions(parts.begun, told)
    assert failed == ("systemctl restart: status unknown", "true: status unknown")
