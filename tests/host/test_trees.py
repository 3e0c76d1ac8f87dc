"""A small /sys and /dev, mounted: what the kernel makes of it, and of a server that dies."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import lacking

from ouassister.shadow.served import snapshot
from ouassister.shadow.served.snapshot import Node
from ouassister.shadow.trees import handover
from ouassister.shadow.trees.handover import Tree

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.host, pytest.mark.timeout(120)]


@pytest.fixture(scope="module", autouse=True)
def fuse() -> Iterator[None]:
    """Without udev, /dev/fuse may be closed to all but root."""
    device = Path("/dev/fuse")
    mode = stat.S_IMODE(device.stat().st_mode)
    mine = os.getuid() == 0
    if mine:
        device.chmod(0o666)
    yield
    if mine:
        device.chmod(mode)


INSIDE = Path(__file__).with_name("trees_inside.py")
FOLDER, FILE = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o444
SYSTEM = [
    Node(0, b"", stat.S_IFDIR | 0o555, links=3, number=1),
    Node(0, b"vda", FOLDER, links=2, number=2),
    Node(1, b"size", FILE, number=3, size=4096, content=b"8\n"),
    Node(1, b"stat", FILE, number=4, size=4096),
    Node(1, b"uevent", stat.S_IFREG | 0o644, number=5, size=4096, content=b""),
    Node(0, b"link", stat.S_IFLNK | 0o777, number=6, content=b"vda/size"),
]
DEVICES = [
    Node(0, b"", FOLDER, links=2, number=1),
    Node(0, b"vda", stat.S_IFBLK | 0o666, 0, 6, 1, 2, 0, os.makedev(254, 0), 10**18),
    # On the host, this is the null device.
    Node(0, b"null", stat.S_IFCHR | 0o666, 0, 0, 1, 3, 0, os.makedev(1, 3), 10**18),
]


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    """Somebody tells what /sys is, when it is asked for."""
    told = Tree(snapshot.encode(SYSTEM), ("another note",))
    with handover.listen(place) as listener:

        def tell() -> None:
            with contextlib.suppress(OSError):  # nobody asked
                handover.answer(listener, place, lambda: told)

        thread = threading.Thread(target=tell)
        thread.start()
        try:
            yield place
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        lacking("root")
    place = tmp_path / "trees"
    place.mkdir(mode=0o755)
    (place / "stage").mkdir()
    handover.write(place, handover.DEV, Tree(snapshot.encode(DEVICES), ("a note",)))
    handover.write(place, handover.SYS_FIRST, Tree(snapshot.encode(SYSTEM[:1])))
    assert handover.read_notes(place) == ("a note",)
    above = place
    while above != above.parent:  # other ids come through
        above.chmod(above.stat().st_mode | 0o011)
        above = above.parent
        if above == Path(tmp_path.anchor) / "tmp":
            break
    return place


def told(folder: Path, script: str, *more: str, error: str = "") -> list[str]:
    done = subprocess.run(
        [sys.executable, str(INSIDE), str(folder), script, *more],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
    )
    assert (done.returncode, done.stderr[-len(error) :] if error else done.stderr) == (0, error)
    return done.stdout.splitlines()


def test_files_are_shown_with_all_their_attributes(folder: Path) -> None:
    script = "stat -c '%n %a %h %i %s %F' sys sys/vda sys/vda/* sys/link; cat sys/link"
    assert told(folder, script) == [
        "sys 555 3 1 0 directory",
        "sys/vda 755 2 2 0 directory",
        "sys/vda/size 444 1 3 4096 regular file",
        "sys/vda/stat 444 1 4 4096 regular file",
        "sys/vda/uevent 644 1 5 4096 regular file",
        "sys/link 777 1 6 0 symbolic link",
        "8",
        "served",
    ]


def test_sys_is_read_when_somebody_looks(folder: Path) -> None:
    lines = told(folder, "stat -c '%F %h' dev/vda sys")
    assert lines == ["block special file 1", "directory 3", "served"]
    assert not (folder / "sys").exists()
    told(folder, "ls sys")
    assert (folder / "sys").exists()
    assert handover.read_notes(folder) == ("a note", "another note")


def test_what_every_program_asks_of_sys_waits_for_nobody(place: Path) -> None:
    first = [SYSTEM[0], Node(0, b"fs", stat.S_IFDIR | 0o755), Node(1, b"bpf", stat.S_IFDIR | 0o700)]
    (place / handover.SYS_FIRST).unlink()
    handover.write(place, handover.SYS_FIRST, Tree(snapshot.encode(first)))
    script = "stat -c %a sys/fs/bpf; test -e sys/fs/selinux || test -e sys/vda || echo none"
    assert told(place, script) == ["700", "none", "served"]
    assert not (place / "sys").exists()


def test_sys_that_nobody_tells_is_empty(place: Path) -> None:
    with handover.listen(place) as listener:
        thread = threading.Thread(target=lambda: handover.answer(listener, place, Tree))
        thread.start()
        assert told(place, "ls -la sys | wc -l; cat sys/vda") == [
            "3",
            "cat: sys/vda: No such file or directory",
            "served",
        ]
        thread.join()


@pytest.mark.parametrize(
    ("how", "error"),
    [("nobody listens", "Connection refused\n"), ("no answer", "nobody reads the guest's /sys\n")],
)
def test_sys_without_an_answer_ends_its_server(place: Path, how: str, error: str) -> None:
    with handover.listen(place) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        if how == "nobody listens":
            listener.close()
        else:
            thread.start()
        lines = told(place, "ls sys", error=error)
        assert lines[-1] == "the server of the shadow's /sys ended with 1"
        if how != "nobody listens":
            thread.join()


def test_what_is_not_told_and_what_is_written(folder: Path) -> None:
    script = "cat sys/vda/stat; echo 1 >sys/vda/size; echo add >sys/vda/uevent && cat records"
    lines = told(folder, script)
    assert lines[0] == "cat: sys/vda/stat: Input/output error"
    assert lines[1].endswith("cannot create sys/vda/size: Permission denied")
    assert '"read","/sys/vda/stat"' in lines[2]
    assert '"udevadm","trigger","--action=add","/sys/vda"' in lines[3]


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("mkdir sys/new", "Operation not permitted"),
        ("touch sys/new", "Permission denied"),
        ("rm sys/vda/size", "Operation not permitted"),
        ("mv sys/vda sys/new", "Operation not permitted"),
        ("ln -s a sys/new", "Operation not permitted"),
        ("chmod 600 sys/vda/size", "Read-only file system"),
        ("cat dev/vda", "Permission denied"),
        ("cat dev/null", "Permission denied"),
        ("echo x >dev/vda", "Permission denied"),
        ("dd if=/dev/zero of=dev/null count=1", "Permission denied"),
        ("mknod dev/new b 254 0", "Operation not permitted"),
    ],
)
def test_kernel_refuses(folder: Path, script: str, answer: str) -> None:
    lines = told(folder, script)
    assert answer in lines[0]
    assert lines[-1] == "served"


def test_files_in_dev_are_made_and_seen_at_once(folder: Path) -> None:
    script = """ls dev/new; mkdir dev/new; ls dev/new; echo a >dev/new/file; cat dev/new/file
    chmod 600 dev/vda; chown 0:5 dev/vda; stat -c '%A %g %t:%T' dev/vda; stat -c %Y dev/vda
    ln -s ../vda dev/new/link; stat -Lc %F dev/new/link; rm dev/vda; ls dev
    mv dev/new/file dev/moved; cat dev/moved; rm -r dev/new; ls dev; mkfifo dev/fifo
    (echo through >dev/fifo &) ; cat dev/fifo; truncate -s 3 dev/moved; stat -c %s dev/moved
    touch -d @5 dev/moved; stat -c %Y dev/moved"""
    assert told(folder, script) == [
        "ls: cannot access 'dev/new': No such file or directory",
        "a",
        "brw------- 5 fe:0", "1000000000",
        "block special file",
        "new", "null",
        "a",
        "moved", "null",
        "through", "3", "5",
        "served",
    ]  # fmt: skip


def test_server_that_died_is_noticed(folder: Path) -> None:
    lines = told(folder, "ls sys; ls dev", "kill")
    assert all("endpoint is not connected" in line for line in lines[:2])
    assert lines[-1] == "the server of the shadow's /sys ended with -9"
