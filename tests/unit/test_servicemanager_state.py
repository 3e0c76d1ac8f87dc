"""What memory tells of the service manager, and what it does not."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.servicemanager_client import make_tree

from ouassister import codec
from ouassister.model import (
    Cgroup,
    GuestPid,
    GuestView,
    Mount,
    OpenFile,
    ProcessFiles,
    Socket,
    Sockets,
    SwapArea,
    Task,
    TaskDetail,
    Tmpfs,
    TmpfsNode,
    Uts,
)
from ouassister.shadow.servicemanager.callers import Caller, Callers
from ouassister.shadow.servicemanager.state import Invocation, ManagerState, collect, path_unit
from ouassister.shadow.servicemanager.unitfiles import UnitFiles, is_unit_name, parse

if TYPE_CHECKING:
    from pathlib import Path


def task(pid: int, unit: str, cgroup: bytes, *, start_ns: int = 5_000) -> Task:
    detail = TaskDetail(
        GuestPid(pid), (GuestPid(pid), GuestPid(pid + 1)), 0, 0, 0, (), b"/", b"/", None,
        (Cgroup(1, "name=systemd", b"/x"), Cgroup(0, "", cgroup)), unit, "", "system.slice",
    )  # fmt: skip
    command = (b"/usr/sbin/x", b"-\xff\n", b"")
    return Task(
        GuestPid(pid), GuestPid(1), b"x", "S", 0, b"/usr/sbin/x", command, start_ns, False, detail,
    )  # fmt: skip


def node(path: bytes, target: bytes | None) -> TmpfsNode:
    return TmpfsNode(
        path, 1, 0o120777, 0, 0, 1, 0, 0, 30, 0, 7_000_000, 0, target, (), 0, 0,
    )  # fmt: skip


def view(**more: Any) -> GuestView:  # noqa: ANN401 - subjects
    tasks = (
        task(20, "a.service", b"/system.slice/a.service/below", start_ns=9_000),
        task(10, "a.service", b"/system.slice/a.service"),
        task(30, "", b"/"),
        task(40, "../evil.service", b"/"),
    )
    mounts = (
        Mount(b"/dev/vda1", b"/", "ext4", 254, 1, False),
        Mount(b"proc", b"/proc", "proc", 0, 5, False),
        Mount(b"systemd-1", b"/auto", "autofs", 0, 6, False),
        Mount(b"data", b"/srv/my-data \xff", "ext4", 254, 2, False),
    )
    uts = Uts("Linux", "g", "6.1", "#1", "x86_64", "")
    return GuestView(uts, "", 1000, 400, 1, 1 << 29, tasks, mounts, **more)


def test_processes_of_a_unit_are_together_the_oldest_first() -> None:
    state = collect(view())
    (unit,) = state.units
    assert (unit.unit, unit.cgroup) == ("a.service", "/system.slice/a.service")
    assert [process.pid for process in unit.processes] == [10, 20]
    assert unit.processes[0].threads == 2
    assert unit.processes[0].command == '/usr/sbin/x "-\ufffd\n"'
    assert state.booted_us == 600_000_000
    assert codec.from_value(ManagerState, json.loads(json.dumps(codec.to_value(state)))) == state


def test_what_was_not_asked_for_is_not_known() -> None:
    state = collect(view())
    assert state.invocations is None
    assert state.sockets is None
    assert state.swaps == ()


def test_links_of_systemd_tell_units_that_are_not_inactive() -> None:
    good = "0123456789abcdef" * 2
    nodes = (
        node(b"/systemd/units/invocation:b.service", good.encode()),
        node(b"/systemd/units/invocation:c.service", b"nothing"),
        node(b"/systemd/units/invocation:../x", good.encode()),
        node(b"/systemd/units/log-extra-fields:d.service", good.encode()),
        node(b"/elsewhere/invocation:e.service", good.encode()),
    )
    tmpfs = (Tmpfs(b"/dev/shm", 0, 29, ()), Tmpfs(b"/run", 0, 30, nodes))
    assert collect(view(tmpfs=tmpfs)).invocations == (Invocation("b.service", good, 7_000),)
    assert collect(view(tmpfs=tmpfs[:1])).invocations is None


def test_sockets_are_those_that_the_first_process_holds() -> None:
    def file(number: int) -> OpenFile:
        return OpenFile(3, b"socket:[%d]" % number, 0, True, True, 0, 0, 8, number, 0o140777, False)

    files = (
        ProcessFiles(GuestPid(1), (file(7), file(8))),
        ProcessFiles(GuestPid(10), (file(9),)),
    )
    bound = (
        Socket("unix-stream", b"/run/x", 0, True, 0, 7),
        Socket("tcp6", b"::", 22, True, 0, 8),
        Socket("tcp", b"0.0.0.0", 80, True, 0, 9),
    )
    assert collect(view(files=files, sockets=Sockets(bound, 0))).sockets == ("/run/x", "22")


def test_daemons_are_known_with_all_units_that_listen() -> None:
    def sock(number: int) -> OpenFile:
        return OpenFile(3, b"socket:[%d]" % number, 0, True, True, 0, 0, 8, number, 0o140777, False)

    def daemons(*bound: Socket) -> dict[str, tuple[str, ...]]:
        found = collect(view(files=files, sockets=Sockets(bound, 0))).daemons
        return {one.address: one.units for one in found}

    files = (
        ProcessFiles(GuestPid(10), (sock(7), sock(8))),
        ProcessFiles(GuestPid(20), (sock(7),)),
        ProcessFiles(GuestPid(40), (sock(9),)),  # of no unit
    )
    unit = "a.service"
    assert daemons(
        Socket("unix-stream", b"/var/run/x", 0, True, 0, 8),
        Socket("unix-stream", b"@a\0b", 0, True, 0, 8),
        Socket("unix-dgram", b"/run/datagrams", 0, False, 0, 8),
        Socket("tcp", b"0.0.0.0", 80, True, 0, 7),
        Socket("tcp6", b"::", 80, True, 0, 8),
        Socket("tcp6", b"::", 22, True, 0, 9),
        Socket("tcp", b"0.0.0.0", 22, True, 0, 8),
        Socket("tcp", b"0.0.0.0", 25, True, 0, 10),  # nobody has it
    ) == {"/run/x": (unit,), "@a@b": (unit,), "tcp:80": (unit,)}
    assert collect(view(files=files)).daemons == ()


def test_mounts_and_swaps_have_the_names_of_their_units() -> None:
    state = collect(view(swaps=(SwapArea(b"/dev/vda2", True, 1, 0, -2),)))
    assert [one.unit for one in state.mounts] == ["-.mount", "srv-my\\x2ddata\\x20\\xff.mount"]
    assert state.swaps == ("dev-vda2.swap",)
    assert path_unit(b"/.a/.b", "mount") == "\\x2ea-.b.mount"


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("a.service", True), ("a@.service", True), ("a@b@c.service", True), ("-.mount", True),
        ("dev-disk\\x2d.device", True), ("a", False), ("a.b", False), (".service", False),
        ("a/b.service", False), ("a.service\n", False), ("x" * 300 + ".service", False),
        ("@.service", False), ("\u00e4.service", False),
    ],
)  # fmt: skip
def test_names_of_units_are_those_that_systemd_takes(name: str, valid: bool) -> None:
    assert is_unit_name(name) is valid


def test_unit_files_are_read_as_systemd_reads_them() -> None:
    settings: dict[tuple[str, str], list[str]] = {}
    text = (
        "[Unit]\nWants=a.service \\\n# note\n  b.service\nnonsense\n;x=y\n[Service]\nExecStart=1\n"
    )
    parse(text, settings)
    parse("[Service]\nExecStart=\nExecStart=2\n", settings)
    assert settings == {
        ("Unit", "Wants"): ["a.service  b.service"],
        ("Service", "ExecStart"): ["2"],
    }


def test_hostile_trees_are_read_within_bounds(tmp_path: Path) -> None:
    make_tree(tmp_path)
    folder = tmp_path / "etc/systemd/system"
    (folder / "loop.service").symlink_to("loop.service")
    (folder / "big.service").write_text("[Service]\n" + "ExecStart=x\n" * 100_000)
    (folder / "folder.service").mkdir()
    (folder / "up.service").symlink_to("../../../../../../../../etc/passwd")
    files = UnitFiles(str(tmp_path))
    assert files.find("loop.service") is None
    assert files.find("folder.service") is None
    assert files.find("up.service") is None
    big = files.find("big.service")
    assert big is not None
    assert len(big.settings["Service", "ExecStart"]) < 10_000
    old = files.find("old.service")
    assert old is not None
    assert (old.source, old.last("Unit", "Description")) == ("/etc/init.d/old", "LSB: An old one")


def test_package_is_found_by_the_environment_of_a_process_or_of_its_parents(
    tmp_path: Path,
) -> None:
    for pid, parent, environ in (
        (100, 90, b"PATH=/bin\0"),
        (90, 80, b""),
        (80, 1, b"DPKG_MAINTSCRIPT_PACKAGE=nginx-common\0DPKG_MAINTSCRIPT_NAME=postinst\0"),
        (70, 1, b"DPKG_MAINTSCRIPT_PACKAGE=../../etc\0DPKG_MAINTSCRIPT_NAME=postinst\0"),
        (60, 60, b""),
    ):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "environ").write_bytes(environ)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) S) S {parent} 1 1")
    procfs = os.open(tmp_path, os.O_PATH)
    callers = Callers(procfs)
    assert callers.of(100) == Caller("nginx-common", "postinst")
    assert callers.of(70) == Caller()
    assert callers.of(60) == Caller()
    assert callers.of(12345) == Caller()
    os.close(procfs)
