"""Packages that do not end well: they reach nothing of the host, and take nobody with them."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest
from tests.cases import harmful
from tests.cases.conftest import alone
from tests.fidelity import compare, twins
from tests.vm.world import NOTHING, Done, World, leftovers

from ouassister.testing import clone

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cases.canaries import Canaries
    from tests.vm.repository import Repository

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]

# System calls of escape.c that no guest may make here, and that the report has to name.
TOLD: Final = (
    *("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "setns", "unshare", "pivot_root"),
    *("bpf", "keyctl", "add_key", "request_key", "io_uring_setup", "perf_event_open"),
    *("userfaultfd", "kexec_load", "init_module", "delete_module", "iopl", "ioperm"),
    *(
        "clock_settime",
        "clock_adjtime",
        "sethostname",
        "swapon",
        "acct",
        "syslog",
        "quotactl",
        "reboot",
    ),
    *("open_by_handle_at", "mknodat", "mount", "umount2", "socket"),
)


@pytest.fixture
def world(sleeper: Path, tmp_path: Path) -> World:
    """A fresh twin of the sleeper; nothing here wakes it up."""
    return World(clone(sleeper, tmp_path / "vm"), tmp_path / "home", 600.0)


def _log(world: World) -> str:
    (log,) = world.home.glob("vms/*/last-run.log")
    return log.read_text(errors="replace")


def _staged(done: Done) -> dict[str, str]:
    modes = done.result["modes"]
    return {one["name"]: one["reason"] for one in modes if one["mode"] == "staged"}


def test_package_that_tries_every_way_out_reaches_nothing_and_is_told_of(
    world: World, host: Canaries
) -> None:
    before, hashes = host.state(), world.hashes()
    done = world.run("update", "--install", "oua-escape")
    log = _log(world)
    assert harmful.END in log, (done, log[-3000:])
    assert re.findall("^REACHED.*", log, re.MULTILINE) == []
    assert host.harm(before) == []
    assert world.hashes() == hashes
    assert leftovers(world.home) == NOTHING
    told = "\n".join(done.result["notes"])
    assert "ptrace" in _staged(done)["oua-escape"]
    assert [name for name in TOLD if not re.search(rf"\b{name}\b", told)] == [], told


def test_fork_bomb_ends_with_its_package(world: World, host: Canaries) -> None:
    alone()
    before = host.state()
    done = world.run("update", "--install", "oua-bombs", "--install", "oua-well")
    assert host.harm(before) == []
    assert leftovers(world.home) == NOTHING
    assert "oua-bombs" in _staged(done), done.result["notes"]


def test_disk_fill_ends_before_the_host_has_no_room(world: World, tmp_path: Path) -> None:
    """On a disk of 1 GiB of its own: other programs of the host always find room on it."""
    alone()
    small, image = tmp_path / "small", tmp_path / "small.ext4"
    small.mkdir()
    with image.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(small)], check=True)
    try:
        cramped = World(world.toml, small / "home", 600.0)
        with ThreadPoolExecutor(1) as beside:
            run = beside.submit(cramped.run, "update", "--install", "oua-fills")
            least = shutil.disk_usage(small).free
            while not run.done():
                least = min(least, shutil.disk_usage(small).free)
                time.sleep(0.01)  # between two looks
        done = run.result()
        assert (done.status, done.code) == (31, "work-disk-full"), done
        assert leftovers(cramped.home) == NOTHING
        assert cramped.run("update", "--install", "oua-well").status == 0
        assert least > 32 << 20, f"{least >> 20} MiB were left at times"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_package_whose_script_fails_is_staged_with_its_dependents_and_fails_alike(
    sleeper: Path, tmp_path: Path, repository: Repository
) -> None:
    alone()
    wish = ("oua-well", "oua-fails", "oua-needs-fails")
    pair = twins.update_both(sleeper, tmp_path, twins.Wish(wish, repository.port, may_fail=True))
    assert pair.staged.keys() == {"oua-fails", "oua-needs-fails"}
    assert "post-installation script" in pair.staged["oua-fails"]
    assert "install ok half-configured" in "\n".join(pair.theirs.tables["packages"])
    assert pair.ours.tables["packages"] == pair.theirs.tables["packages"]
    # The gate is closed, and what a later resume takes up is there yet, the medium too; dpkg's
    # last state but one is of another step.
    ours = ("ouassister", "vdb", "./var/lib/dpkg/status-old: ")
    found, _used = compare.differences(pair.theirs, pair.ours, pair.since_s, compare.load())
    assert [line for line in found if not any(word in line for word in ours)] == []


def test_package_that_waits_for_ever_is_staged_and_the_rest_is_emulated(world: World) -> None:
    alone()
    done = world.run("update", "--install", "oua-waits", "--install", "oua-well",
                     "--script-timeout", "10")  # fmt: skip
    assert done.status == 0, done
    assert _staged(done).keys() == {"oua-waits"}
    assert "oua-well" in [one["name"] for one in done.result["changes"]]
    assert leftovers(world.home) == NOTHING
