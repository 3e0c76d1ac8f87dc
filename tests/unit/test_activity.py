"""What the package manager was doing, from its processes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ouassister.guest_model import HeldLock
from ouassister.model import GuestPid, GuestView, Task, Uts
from ouassister.packages.activity import Activity, activity

SHELL = Task(GuestPid(9), GuestPid(8), b"sh", "S", 0, b"/usr/bin/dash", (), 1, False)
VIEW = GuestView(Uts("Linux", "web1", "6.1.0", "#1", "x86_64", "(none)"), "", 1, 1, 1, 1, (), ())


def lock(path: bytes, pid: int) -> HeldLock:
    return HeldLock("posix", True, GuestPid(pid), path, 254, 1, 7, 0, None)


def test_quiet_guest_does_nothing() -> None:
    other = replace(SHELL, cmdline=(b"/bin/sh", b"/root/x.postinst"))
    held = (lock(b"/run/lock", 9),)
    assert activity(replace(VIEW, tasks=(SHELL, other), held_locks=held)) == ()


@pytest.mark.parametrize(
    ("words", "package", "step"),
    [
        ((b"/bin/sh", b"/var/lib/dpkg/info/bcc.postinst", b"configure"), "bcc", "postinst"),
        ((b"/bin/sh", b"-e", b"/var/lib/dpkg/info/libc6:amd64.preinst"), "libc6:amd64", "preinst"),
        ((b"/var/lib/dpkg/tmp.ci/preinst", b"install"), "", "preinst"),
        ((b"/usr/bin/perl", b"/var/lib/dpkg/info/a+b.c.config"), "a+b.c", "config"),
    ],
)
def test_script_names_its_package(words: tuple[bytes, ...], package: str, step: str) -> None:
    found = activity(replace(VIEW, tasks=(replace(SHELL, cmdline=words),)))
    assert found == (Activity(GuestPid(9), "/usr/bin/dash", package, step, ()),)


@pytest.mark.parametrize(
    "word",
    [b"/var/lib/dpkg/info/\x1b[31m.postinst", b"/var/lib/dpkg/info/x.postinst\n", b"x.postinst"],
)
def test_odd_paths_name_nothing(word: bytes) -> None:
    assert activity(replace(VIEW, tasks=(replace(SHELL, cmdline=(b"sh", word)),))) == ()


def test_archive_on_its_way_in() -> None:
    words = (b"dpkg-deb", b"--fsys-tarfile", b"/var/cache/apt/archives/bcc_0.16.17-3.4_amd64.deb")
    task = replace(SHELL, exe=b"/usr/bin/dpkg-deb", cmdline=words)
    (found,) = activity(replace(VIEW, tasks=(task,)))
    assert (found.package, found.step) == ("bcc", "unpack")


def test_locks_name_their_holder() -> None:
    dpkg = replace(SHELL, pid=GuestPid(7), exe=b"/usr/bin/dpkg")
    held = (lock(b"/var/lib/dpkg/lock", 7), lock(b"/var/lib/dpkg/lock-frontend", 9))
    found = activity(replace(VIEW, tasks=(dpkg, SHELL), held_locks=held))
    assert [(one.pid, one.locks) for one in found] == [
        (7, ("/var/lib/dpkg/lock",)),
        (9, ("/var/lib/dpkg/lock-frontend",)),
    ]
