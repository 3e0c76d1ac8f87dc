"""The doctor looks at this host: each check has a purpose, and what is missing a way to get it."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ouassister import doctor
from ouassister.errors import HostNotReadyError
from ouassister.shadow import cgroups, ids

if TYPE_CHECKING:
    import pytest


def by_name() -> dict[str, doctor.Check]:
    checks = doctor.check_host()
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def test_every_check_has_a_purpose_and_a_finding(tmp_path: Path) -> None:
    checks = by_name()
    assert {"qemu-img", "ext4-view", "/dev/fuse", "overlayfs", "subordinate ids"} <= checks.keys()
    for check in checks.values():
        assert check.purpose
        assert check.detail


def test_host_is_only_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUASSISTER_HOME", str(tmp_path / "deep" / "home"))
    assert by_name()["free space"].detail.endswith(f"MiB in {tmp_path}/deep/home")
    assert list(tmp_path.iterdir()) == []


def test_missing_tool_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = by_name()["qemu-storage-daemon"]
    assert not check.ok
    assert check.detail == "apt-get install qemu-system-common"
    tool = tmp_path / "qemu-storage-daemon"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    found = by_name()["qemu-storage-daemon"]
    assert (found.ok, found.detail) == (True, str(tool))


def test_libvirt_may_be_missing_and_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("OUASSISTER_LIBVIRT_CLIENT", "virsh")
    check = by_name()["libvirt"]
    assert check.ok
    assert check.detail.startswith("not installed (apt-get install python3-libvirt")
    tool = tmp_path / "virsh"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(doctor, "_DAEMONS", (tmp_path / "sock",))
    assert by_name()["libvirt"].detail == f"{tool}; no system daemon answers"
    with socket.socket(socket.AF_UNIX) as daemon:
        monkeypatch.chdir(tmp_path)
        daemon.bind("sock")
        daemon.listen()
        assert by_name()["libvirt"].detail == f"{tool}; {tmp_path}/sock answers"


def test_user_needs_the_tool_that_maps_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "newuidmap" not in by_name()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "newuidmap" in by_name()


def test_user_without_subordinate_ids_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> ids.Ids:
        raise HostNotReadyError("user x has none", hint="as root: usermod x")

    monkeypatch.setattr(ids, "choose", none)
    check = by_name()["subordinate ids"]
    assert (check.ok, check.detail) == (False, "as root: usermod x")


def test_other_machine_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    check = by_name()["x86-64"]
    assert (check.ok, check.detail) == (False, "aarch64")


def test_host_without_control_groups_is_ready_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    place = cgroups.Place("pids", 2, Path("/sys/fs/cgroup/user.slice"))
    for places, words in (((place,), "pids (version 2)"), ((), "none may be made here; ")):
        monkeypatch.setattr(cgroups, "find", lambda found=places: found)
        check = by_name()["control groups"]
        assert check.ok
        assert check.detail.startswith(words)


def test_little_space_is_not_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setenv("OUASSISTER_HOME", str(tmp_path))
    for free, ok in ((1 << 30, True), ((1 << 30) - real.f_frsize, False)):
        values = list(real)
        values[4] = free // real.f_frsize  # f_bavail
        monkeypatch.setattr(os, "statvfs", lambda _path, v=values: os.statvfs_result(v))
        assert by_name()["free space"].ok is ok
