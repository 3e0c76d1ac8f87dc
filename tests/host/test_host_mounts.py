"""XFS and btrfs, mounted by this host's kernel from private copies, below a real shadow."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import lacking, need

from ouassister.changeset.landing import LAYER, Landing
from ouassister.disk.layout import Layout, Piece, Place, Volume
from ouassister.disk.matching import Image
from ouassister.disk.storage import create_overlays
from ouassister.errors import HostNotReadyError
from ouassister.model import Kind, Uts
from ouassister.shadow import sandbox
from ouassister.shadow.session import Shadow, ShadowSpec, launch, open_shadow
from ouassister.staging.land import land

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.host

MIB = 1 << 20
EXTRACT = "ouassister.changeset.extract"
UTS = Uts("Linux", "web1", "6.1.0", "#1", "x86_64", "(none)")
PROGRAMS = ("sh", "cat", "chmod", "chown", "rm", "mv", "mkdir", "stat", "ls", "getfacl")
_FILL = """set -e
mkdir -p a/b; echo told >a/b/file; chown 33:1000 a/b/file; chmod 640 a/b/file; ln a/b/file linked
setfacl -m u:1000:r a/b/file; touch -d '2001-02-03 04:05:06.789012345' a/b/file
echo old >changes; echo going >goes; echo moving >moves; chown 0:1000 .; chmod 2751 .; sync -f .
"""
_CHANGE = """set -e; cd /data; stat -c '%a %u %g' .
stat -c '%n %a %u %g %h %.9Y' a/b/file linked; cat a/b/file after; ls; getfacl -cn a/b/file
echo new >>changes; rm goes; chmod 600 a/b/file; mkdir d; echo made >d/new; chown 7:8 d/new
"""
_SEEN = """2751 0 1000
a/b/file 640 33 1000 2 981173106.789012345
linked 640 33 1000 2 981173106.789012345
told
moving
a
after
changes
goes
linked
user::rw-
user:1000:r--
group::r--
mask::r--
other::---

"""


@dataclass(frozen=True)
class Disks:
    """Images of a root file system and of what is beside it."""

    folder: Path
    images: dict[str, Path]

    def hashes(self) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.images.values()]

    def layout(self, fstype: str, root: bytes = b"/") -> Layout:
        disk = {"xfs": "vdb", "btrfs": "vdc"}[fstype]
        sizes = {name: path.stat().st_size for name, path in self.images.items()}
        return Layout(
            (
                Volume("vda", 254, 0, "ext4", (Piece("vda", 0, sizes["vda"]),)),
                Volume(disk, 254, 16, fstype, (Piece(disk, 0, sizes[disk]),), root),
            ),
            (Place(0, b"/", b"/", read_only=False), Place(1, b"/", b"/data", read_only=False)),
        )


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Disks:
    """Read only. XFS needs its log replayed; what is told of btrfs lies on a subvolume."""
    if os.geteuid() != 0:
        lacking("mounting XFS and btrfs takes root")
    kernel = Path("/proc/filesystems").read_text().split()
    for fstype in ("xfs", "btrfs"):
        if fstype not in kernel and subprocess.run(["modprobe", fstype], check=False).returncode:
            lacking(f"this host's kernel has no {fstype}")
    folder = tmp_path_factory.mktemp("disks")
    tree = folder / "tree"
    for name in ("data", "dev", "proc", "sys", "run", "tmp", "etc"):
        (tree / name).mkdir(parents=True)
    for program in PROGRAMS:
        _install(Path(need(program)).resolve(), tree / "usr" / "bin" / program, tree)
    for name in ("bin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    images = {name: folder / f"{name}.raw" for name in ("vda", "vdb", "vdc")}
    for path, size in zip(images.values(), (48, 320, 128), strict=True):
        with path.open("wb") as file:
            file.truncate(size * MIB)
    _do(need("mke2fs"), "-q", "-t", "ext4", "-d", str(tree), str(images["vda"]))
    _do(need("mkfs.xfs"), "-q", str(images["vdb"]))
    _do(need("mkfs.btrfs"), "-q", str(images["vdc"]))
    with _mounted(images["vdb"], folder / "xfs") as place:
        _do("sh", "-c", f"cd {place}; {_FILL}")
        (place / "moves").rename(place / "after")
        # What was not in its place yet stays in the log.
        _do(need("xfs_io"), "-x", "-c", "shutdown -f", str(place))
    with _mounted(images["vdc"], folder / "btrfs") as place:
        for name in ("@data", "@other"):
            _do(need("btrfs"), "-q", "subvolume", "create", str(place / name))
        _do("sh", "-c", f"cd {place}/@data; {_FILL} mv moves after")
        shutil.copytree(tree, place / "@root", symlinks=True)
        (place / "file").touch()
        (place / "link").symlink_to("@data")
    return Disks(folder, images)


def _install(program: Path, target: Path, tree: Path) -> None:
    """Copy a program with its libraries, wherever those lie, into one folder of each kind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(program, target)
    told = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    for word in told.split():
        if word.startswith("/"):
            folder = "lib64" if "ld-linux" in word else "lib"
            (tree / "usr" / folder).mkdir(exist_ok=True)
            shutil.copy(word, tree / "usr" / folder)


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def _mounted(image: Path, place: Path) -> Iterator[Path]:
    place.mkdir()
    _do("mount", "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        _do("umount", str(place))


@contextmanager
def _shadow(disks: Disks, layout: Layout, work: Path) -> Iterator[tuple[Shadow, int]]:
    """A shadow, and the pid of its keeper."""
    work.mkdir(mode=0o711)
    images = {name: Image(path, "raw") for name, path in disks.images.items()}
    with ExitStack() as stack:
        launched = stack.enter_context(launch((EXTRACT,)))
        spec = ShadowSpec(
            work=work,
            cache=work / "cache",
            storage=create_overlays(layout.volumes, images, work),
            layout=layout,
            uts=UTS,
            avoid=(disks.folder,),
        )
        yield stack.enter_context(open_shadow(launched, spec)), launched.keeper.pid


def _loops() -> set[str]:
    """Loop devices over what a storage daemon serves, or served: its mount may be gone by now."""
    found = set()
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            name = path.read_text().strip()
        except FileNotFoundError:  # released meanwhile
            continue
        if name == "/" or f"/{sandbox.EXPORTS}/" in name:
            found.add(f"{path.parts[3]} over {name}")
    return found


def _await_no_loops() -> None:
    end = time.monotonic() + 20
    while (left := _loops()) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == set()


@pytest.mark.parametrize(("fstype", "root"), [("xfs", b"/"), ("btrfs", b"/@data")])
def test_what_is_mounted_is_the_guests_and_changes_are_found(
    disks: Disks, tmp_path: Path, fstype: str, root: bytes
) -> None:
    before = disks.hashes()
    with _shadow(disks, disks.layout(fstype, root), tmp_path / "work") as (shadow, _):
        assert _loops()
        shadow.mount()
        status = shadow.run(["sh", "-c", _CHANGE], package_cache=False, output="seen")
        assert (status, shadow.output_path("seen").read_text()) == (0, _SEEN)
        trees = [
            {
                "upper": sandbox.upper(1),
                "lower": sandbox.lower(1),
                "image": None,
                "places": [("/", "/data")],
            }
        ]
        with Landing(tmp_path / "store") as landing:
            found = land(shadow, {"trees": trees}, landing)
            digest = hashlib.sha256((landing.place / LAYER).read_bytes()).hexdigest()
    assert found.layer_sha256 == digest
    entries = {entry.path: entry for entry in found.entries}
    assert {path: entry.kind for path, entry in entries.items()} == {
        b"/data/a/b/file": Kind.FILE,
        b"/data/changes": Kind.FILE,
        b"/data/d": Kind.DIRECTORY,
        b"/data/d/new": Kind.FILE,
        b"/data/goes": Kind.DELETE,
    }
    changed = entries[b"/data/a/b/file"]
    assert (changed.mode, changed.uid, changed.gid) == (0o600, 33, 1000)
    assert changed.mtime_ns == 981173106789012345
    assert changed.expected is not None
    assert changed.expected.mtime_ns == 981173106789012345
    assert "system.posix_acl_access" in dict(changed.xattrs)
    assert (entries[b"/data/d/new"].uid, entries[b"/data/d/new"].gid) == (7, 8)
    assert disks.hashes() == before
    _await_no_loops()


def test_subvolume_is_a_root(disks: Disks, tmp_path: Path) -> None:
    volumes = disks.layout("btrfs", b"/@root").volumes[1:]
    layout = Layout(
        (*volumes, replace(volumes[0], root=b"/@data")),
        (Place(0, b"/", b"/", read_only=False), Place(1, b"/", b"/data", read_only=False)),
    )
    with _shadow(disks, layout, tmp_path / "work") as (shadow, _):
        shadow.mount()
        script = "cat /data/linked; mkdir /etc/new; mv /data/changes /etc/new; ls / /etc/new"
        status = shadow.run(["sh", "-c", script], package_cache=False, output="seen")
        seen = shadow.output_path("seen").read_text()
        uppers = shadow.spec.shared / "upper"
        assert (uppers / "0" / "etc" / "new" / "changes").read_text() == "old\n"
        assert (uppers / "1" / "changes").exists()  # as a whiteout
    assert (status, seen.splitlines()[0], seen.splitlines()[-1]) == (0, "told", "changes"), seen
    assert "data" in seen.splitlines()


def test_subvolumes_share_a_mount_and_have_unions_of_their_own(
    disks: Disks, tmp_path: Path
) -> None:
    layout = disks.layout("btrfs", b"/@data")
    other = replace(layout.volumes[1], root=b"/@other")
    layout = replace(layout, volumes=(*layout.volumes, other))
    with _shadow(disks, layout, tmp_path / "work") as (one, _):
        assert len(_loops()) == 1
        one.mount()
        status = one.run(["sh", "-c", "echo x >/data/new"], package_cache=False)
        assert status == 0
        uppers = one.spec.shared / "upper"
        assert [path.name for path in (uppers / "1").iterdir()] == ["new"]
        assert list((uppers / "2").iterdir()) == []
    _await_no_loops()


@pytest.mark.parametrize(
    ("root", "what"),
    [
        (b"/@gone", "No such file"),
        (b"/link/a", "symbolic links"),
        (b"/file", "is no directory"),
    ],
)
def test_part_that_is_not_what_memory_says_is_refused(
    disks: Disks, tmp_path: Path, root: bytes, what: str
) -> None:
    with (
        pytest.raises(HostNotReadyError, match=what),
        _shadow(disks, disks.layout("btrfs", root), tmp_path / "work"),
    ):
        pass
    _await_no_loops()


def test_what_the_hosts_kernel_does_not_mount_is_named(disks: Disks, tmp_path: Path) -> None:
    broken = disks.folder / "broken.raw"
    broken.write_bytes(bytes(MIB))
    images = Disks(disks.folder, {**disks.images, "vdb": broken})
    with (
        pytest.raises(HostNotReadyError, match=r"kernel does not mount vdb \(xfs\): "),
        _shadow(images, images.layout("xfs"), tmp_path / "work"),
    ):
        pass
    _await_no_loops()


@pytest.mark.parametrize("victims", ["keeper", "init", "daemon", "all"])
@pytest.mark.parametrize("fstype", ["xfs", "btrfs"])
def test_nothing_is_left_after_sigkill(
    disks: Disks, tmp_path: Path, fstype: str, victims: str
) -> None:
    with _shadow(disks, disks.layout(fstype), tmp_path / "work") as (shadow, keeper):
        shadow.mount()
        assert _loops()
        family = _descendants(keeper)
        daemons = {pid for pid, name in family.items() if name.startswith("qemu-storage")}
        assert daemons
        # Whoever holds the mounts must not be who serves what is below them.
        namespaces = {_mount_namespace(pid) for pid in daemons}
        for pid in family.keys() - daemons - {keeper}:
            assert _mount_namespace(pid) not in namespaces, family[pid]
        init = min(_children(keeper))
        chosen = {"keeper": [keeper], "init": [init], "daemon": [*daemons], "all": [*family]}
        for pid in chosen[victims]:
            with contextlib.suppress(ProcessLookupError):  # an earlier one took it along
                os.kill(pid, signal.SIGKILL)
        if victims != "daemon":  # else the rest ends with the shadow
            _await_no_loops()
    _await_no_loops()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for task in tasks for word in task.read_text().split()]


def _descendants(pid: int) -> dict[int, str]:
    """A process and all that it started, by pid, with their names."""
    found = {pid: Path(f"/proc/{pid}/comm").read_text().strip()}
    for child in _children(pid):
        found |= _descendants(child)
    return found


def _mount_namespace(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/mnt").readlink())


def test_who_is_not_the_hosts_root_is_refused() -> None:
    program = (
        "from pathlib import Path; from ouassister.disk.layout import *;"
        "from ouassister.shadow import host_mounts;"
        "volume = Volume('vda', 254, 1, 'xfs', (Piece('vda', 0, 512),));"
        "host_mounts.mount(Path('/nowhere'), Layout((volume,), ()), 1, 1, ids=65536)"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        "OSError: the host's kernel mounts XFS and btrfs for the host's root alone" in done.stderr
    )
