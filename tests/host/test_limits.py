"""Programs that go too far: each is contained, named, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import lacking
from tests.host.limits_rig import BOMB, install, make_disk, opened

from ouassister.errors import DeadlineError, HostNotReadyError, WorkDiskFullError
from ouassister.shadow import cgroups, output, room
from ouassister.shadow.events import Outcome
from ouassister.shadow.limits import Bounds, Limits
from ouassister.shadow.servicemanager import RECORDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.shadow.session import Shadow

pytestmark = [pytest.mark.host, pytest.mark.timeout(300)]

GROUPED = pytest.mark.parametrize("grouped", [True, False])
MIB = 1 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0:
        lacking("the shadow's ids and small disks take root")
    return make_disk(tmp_path_factory.mktemp("limits"))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 192 MiB for the work folder."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192m", "tmpfs", str(place)]
    subprocess.run(mount, check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def groups() -> dict[int, list[Path]]:
    """Control groups by the process that made them; other runs on this host have some too."""
    found: dict[int, list[Path]] = {}
    for place in cgroups.find():
        for one in place.folder.glob("ouassister-*"):
            found.setdefault(int(one.name.split("-")[1]), []).append(one)
    return found


def left_behind() -> dict[int, list[Path]]:
    """Those whose maker has ended."""
    return {pid: made for pid, made in groups().items() if not Path("/proc", str(pid)).exists()}


def told(shadow: Shadow, outcome: Outcome) -> list[tuple[str, str, str]]:
    events = shadow.events()
    return [(one.package, one.script, one.detail) for one in events if one.outcome is outcome]


def run(
    shadow: Shadow, argv: list[str], *, timeout_s: float = 120, script_timeout_s: float = 300
) -> tuple[int, list[str]]:
    """Status, and what was printed by this run."""
    status = shadow.run(
        argv,
        package_cache=False,
        output="told",
        timeout_s=timeout_s,
        script_timeout_s=script_timeout_s,
    )
    return status, shadow.output_path("told").read_text().splitlines()


@pytest.mark.parametrize("name", ["oua-forever", "oua-held", "oua-chatty"])
def test_script_that_does_not_end_fails_its_package_and_no_other(
    disk: Path, tmp_path: Path, name: str
) -> None:
    with opened(disk, tmp_path / "work", Limits(output_bytes=MIB)) as shadow:
        status, lines = run(shadow, install(name, "oua-fine"), script_timeout_s=2, timeout_s=120)
        expired = [(one.package, one.script, one.limit_s) for one in shadow.expired]
        assert (status, expired) == (1, [(name, "postinst", 2)]), lines
        words = f"the postinst of {name} did not end within 2 s and was killed"
        assert told(shadow, Outcome.EXPIRED) == [(name, "postinst", words)]
        # What was printed after too much is dropped: the state is told by another program.
        _status, states = run(
            shadow, ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Abbrev}\n"]
        )
        assert {line.strip() for line in states} == {f"{name} iF", "oua-fine ii"}
        if name != "oua-chatty":
            assert f"dpkg: error processing package {name} (--install):" in lines
            assert any("killed by signal (Killed)" in line for line in lines), lines
            assert not [line for line in lines if line == "process sleep"]


def test_process_that_a_script_left_behind_is_no_script(disk: Path, tmp_path: Path) -> None:
    with opened(disk, tmp_path / "work", Limits()) as shadow:
        argv = install("oua-leaves")
        argv[2] = argv[2].replace("for c in", "sleep 4; for c in")
        status, lines = run(shadow, argv, script_timeout_s=1.5, timeout_s=120)
        assert (status, shadow.expired) == (0, []), lines
        assert "process sleep" in lines


@GROUPED
def test_fork_bomb_of_a_script_fails_its_package(
    disk: Path, tmp_path: Path, *, grouped: bool
) -> None:
    with opened(disk, tmp_path / "work", Limits(pids=150, grouped=grouped)) as shadow:
        argv = install("oua-bomb", "oua-fine")
        status, lines = run(shadow, argv, script_timeout_s=3, timeout_s=120)
        assert status == 1, lines
        assert [(one.package, one.script) for one in shadow.expired] == [("oua-bomb", "postinst")]
        assert "oua-fine ii" in [line.strip() for line in lines]
        left = [line for line in lines if line.startswith("process ")]
        assert left == ["process python", "process sh"], lines
        if grouped and "pids" in {place.controller for place in cgroups.find()}:
            words = "programs in the shadow reached the limit of 150 processes"
            assert ("", "", words) in told(shadow, Outcome.LIMITED)
    assert left_behind() == {}


@GROUPED
def test_fork_bomb_ends_with_the_programs_time(
    disk: Path, tmp_path: Path, *, grouped: bool
) -> None:
    with opened(disk, tmp_path / "work", Limits(pids=150, grouped=grouped)) as shadow:
        with pytest.raises(DeadlineError, match="did not end within 2 s and was killed"):
            run(shadow, [BOMB], timeout_s=2)
        assert run(shadow, ["true"])[0] == 0
        script = "n=0; while [ $n -lt 400 ]; do sleep 60 & n=$((n+1)); done"
        status, lines = run(shadow, ["sh", "-c", script], timeout_s=120)
        assert status != 0
        assert any("Cannot fork" in line for line in lines), lines
    assert left_behind() == {}
    assert not _alive(tmp_path / "work")


def _alive(work: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(work) in line:
            found.append(os.fsdecode(line))
    return found


def test_memory_is_bounded_or_its_taker_is_the_first_to_go(disk: Path, tmp_path: Path) -> None:
    with opened(disk, tmp_path / "work", Limits(memory_bytes=160 * MIB)) as shadow:
        if "memory" in {place.controller for place in cgroups.find()}:
            take = ["dd", "if=/dev/zero", "of=/dev/null", "bs=400M", "count=1"]
            status, _lines = run(shadow, take, timeout_s=120)
            assert status in (128 + 9, -9)
            words = f"programs in the shadow reached the limit of {160 * MIB} bytes of memory"
            assert told(shadow, Outcome.LIMITED) == [("", "", words)]
        assert run(shadow, ["true"])[0] == 0
    with opened(disk, tmp_path / "work2", Limits(grouped=False)) as shadow:
        assert run(shadow, ["cat", "/proc/self/oom_score_adj"]) == (0, ["1000"])
        blocks = run(shadow, ["stat", "-f", "-c", "%b %S", "/tmp", "/run", "/dev"])[1]  # noqa: S108
        sizes = {int(line.split()[0]) * int(line.split()[1]) for line in blocks}
        assert sizes == {256 * MIB}


def kill_stand_in(shadow: Shadow) -> None:
    """End whoever has the file open that the service manager's stand-in writes to."""
    record = shadow.output_path(RECORDS)
    end = time.monotonic() + 60
    killed = 0
    while not killed and time.monotonic() < end:
        time.sleep(0.05)  # between two looks
        for opened_file in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):  # it was closed, or is not there yet
                if opened_file.samefile(record):
                    os.kill(int(opened_file.parts[2]), signal.SIGKILL)
                    killed += 1
    assert killed


@pytest.mark.parametrize(
    ("words", "timeout_s", "error", "told_as"),
    [
        ("sleep 6", 120, HostNotReadyError, "the stand-in of the service manager died"),
        ("sleep 600", 6, DeadlineError, "did not end within 6 s"),
    ],
)
def test_stand_in_that_died_costs_the_run_and_is_told_where_nothing_else_is(
    disk: Path, small: Path, words: str, timeout_s: float, error: type[Exception], told_as: str
) -> None:
    with opened(disk, small / "work", Limits()) as shadow, ThreadPoolExecutor(1) as beside:
        killing = beside.submit(kill_stand_in, shadow)
        with pytest.raises(error, match=told_as):
            run(shadow, ["sh", "-c", words], timeout_s=timeout_s)
        killing.result()


def test_disk_that_is_being_filled_keeps_a_reserve(disk: Path, small: Path) -> None:
    # Towards the end by little, as the reserve of a small disk is: looks of a busy host come late.
    fill = "n=0; while :; do dd if=/dev/zero of=/$n bs=64k count=1 2>/dev/null; n=$((n+1)); done"
    with opened(disk, small / "work", Limits()) as shadow:
        with pytest.raises(WorkDiskFullError, match="sh was ended: only a reserve is left"):
            run(shadow, ["sh", "-c", f"fallocate -l 140M /most; {fill}"], timeout_s=240)
        left = os.statvfs(small)
        assert left.f_bavail * left.f_frsize > room.reserve_bytes(192 * MIB) // 2
        with pytest.raises(WorkDiskFullError):  # and nothing is even started
            run(shadow, ["true"])


def test_download_keeps_a_reserve_of_its_own_disk(disk: Path, tmp_path: Path, small: Path) -> None:
    fill = (
        "cd /var/cache/apt/archives; fallocate -l 140M most;"
        " while :; do dd if=/dev/zero bs=64k count=1 2>/dev/null; done >x"
    )
    cache = small / "cache"
    with opened(disk, tmp_path / "work", Limits(), cache) as shadow:
        with pytest.raises(WorkDiskFullError, match=f"only a reserve is left at {cache}"):
            shadow.run(["sh", "-c", fill], output="told", timeout_s=240)
        left = os.statvfs(small)
        assert left.f_bavail * left.f_frsize > room.reserve_bytes(192 * MIB) // 2


def test_file_that_is_larger_than_the_disk_is_refused_at_once(disk: Path, small: Path) -> None:
    with opened(disk, small / "work", Limits()) as shadow:
        before = os.statvfs(small).f_bavail
        status, lines = run(shadow, ["fallocate", "-l", "1G", "/large"], timeout_s=60)
        assert status != 0
        assert any("File too large" in line for line in lines), lines
        assert os.statvfs(small).f_bavail > before - 1000


def test_endless_output_is_cut_and_its_program_ends_with_its_time(
    disk: Path, tmp_path: Path
) -> None:
    with opened(disk, tmp_path / "work", Limits(output_bytes=MIB)) as shadow:
        with pytest.raises(DeadlineError):
            run(shadow, ["yes"], timeout_s=2)
        kept = shadow.output_path("told").read_bytes()
        assert kept == (b"y\n" * MIB)[:MIB] + output.CUT
        # Up to the limit everything is kept, what is printed last included.
        shadow.run(["sh", "-c", "echo one; echo two >&2"], package_cache=False, output="few")
        assert shadow.output_path("few").read_text() == "one\ntwo\n"


def test_endless_system_calls_do_not_stop_the_clock(disk: Path, tmp_path: Path) -> None:
    """Each of them wakes the supervisor, which must look at the time all the same."""
    with opened(disk, tmp_path / "work", Limits()) as shadow:
        script = "while :; do kill -0 77 2>/dev/null; done"
        with pytest.raises(DeadlineError):
            run(shadow, ["sh", "-c", f"{script} & {script} & {script}"], timeout_s=2)


def test_group_of_a_keeper_that_was_killed_is_removed() -> None:
    if not cgroups.find():
        lacking("nobody may make a control group here")
    child = os.fork()
    if child == 0:
        Bounds(Limits())
        os._exit(0)
    os.waitpid(child, 0)
    assert child in left_behind()
    cgroups.forget(child)
    assert child not in groups()


def _tell(writer: int, record: dict[str, Any]) -> None:
    os.write(writer, str(record).encode())


def test_group_that_cannot_be_entered_is_told_and_other_limits_hold() -> None:
    if not cgroups.find():
        lacking("nobody may make a control group here")
    bounds = Bounds(Limits(pids=77))
    cgroups.forget(os.getpid())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        bounds.enter(1 << 40, lambda record: _tell(writer, record))
        os._exit(0)
    os.close(writer)
    with open(reader) as told_of:  # noqa: PTH123 - a descriptor
        assert "the control group cannot be entered: No such device" in told_of.read()
    os.waitpid(child, 0)


def test_group_with_a_process_in_it_is_not_removed() -> None:
    if not cgroups.find():
        lacking("nobody may make a control group here")
    bounds = Bounds(Limits())
    with tempfile.TemporaryFile() as end:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            bounds.enter(1 << 40, lambda _record: os.truncate(end.fileno(), 1))
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
        groups_of = Path(f"/proc/{child}/cgroup")
        while "ouassister-" not in groups_of.read_text() and not os.fstat(end.fileno()).st_size:
            pass
        assert os.fstat(end.fileno()).st_size == 0
        with pytest.raises(OSError, match="busy"):
            cgroups.forget(os.getpid(), 0.1)
        os.close(writer)
        os.waitpid(child, 0)
    bounds.remove()
    assert os.getpid() not in groups()
