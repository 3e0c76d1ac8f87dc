"""ext4-view shows what the kernel's own ext4 shows, and damaged file systems do not harm it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from tests.conftest import lacking, need

from ouassister.disk import ext4_view

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.host, pytest.mark.timeout(300)]

ASAN: Final = Path(__file__).parents[2] / "build" / "ext4" / "ext4-view-asan"
SIZE: Final = 48 << 20
KINDS: Final = {
    "usual": ("-t", "ext4"),
    "small-blocks": ("-t", "ext4", "-b", "1024"),
    "inline": ("-t", "ext4", "-I", "512", "-O", "inline_data,ea_inode"),
    "blocks": ("-t", "ext4", "-O", "^extent,^64bit"),
    "ext2": ("-t", "ext2", "-I", "128"),
}
# Run inside of the mounted file system; what one kind cannot hold, it does without.
BUILD: Final = r"""
import contextlib, os, random, struct, sys
rng = random.Random(7)
when = lambda: rng.randrange(2**31) * 10**9 + rng.randrange(10**9)
for number in range(40):
    folder = f"d{number % 7}/e{number % 3}"
    os.makedirs(folder, exist_ok=True)
    name = f"{folder}/" + rng.choice(["a", "b c", "\xe9", "n\n", "x" * 240]) + str(number)
    size = rng.choice([0, 1, 50, 130, 511, 4096, 70_000, 900_000])
    with open(name, "wb") as file:
        if number % 5 == 0:
            file.seek(rng.randrange(1 << 22))  # a hole
        file.write(rng.randbytes(size))
    os.chmod(name, rng.choice([0o644, 0o4755, 0o2711, 0]))
    os.chown(name, rng.randrange(70_000), rng.randrange(70_000))
    if number % 4 == 0:
        os.link(name, f"{folder}/link{number}")
    with contextlib.suppress(OSError):
        os.setxattr(name, "user.small", rng.randbytes(20))
        if number % 2:
            os.setxattr(name, "security.selinux", b"system_u:object_r:etc_t:s0\0")
        if number % 3 == 0:
            os.setxattr(name, "user.large", rng.randbytes(900))
        if number % 9 == 0:
            os.setxattr(name, "user.huge", rng.randbytes(20_000))
    moment = when()
    os.utime(name, ns=(moment, moment))
acl = lambda name: b"\2\0\0\0" + b"".join(
    struct.pack("<HHI", *entry) for entry in
    [(1, 6, 2**32 - 1), (2, 4, name), (4, 4, 2**32 - 1), (16, 4, 2**32 - 1), (32, 4, 2**32 - 1)])
with contextlib.suppress(OSError):
    os.makedirs("listed")
    os.setxattr("listed", "system.posix_acl_default", acl(70))
    open("listed/heir", "w").close()
    os.setxattr("listed/heir", "user.beside", b"x")
    open("guarded", "w").close()
    os.setxattr("guarded", "system.posix_acl_access", acl(65_534))
for length in (1, 59, 60, 61, 500, 1000):
    os.symlink("t" * length, f"d0/link{length}")
os.mkfifo("d1/fifo")
os.mknod("d1/null", 0o20666, os.makedev(1, 3))
os.mknod("d1/large", 0o60600, os.makedev(300, 70_000))
os.makedirs("many")
for number in range(3000):
    os.symlink("x", f"many/{number:05}" + "y" * (number % 90))
with open("spare", "wb") as file:
    file.write(b"begin")
    with contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, 3 << 20)  # blocks that were never written
"""


def made(folder: Path, kind: str) -> Path:
    """A file system that the kernel has filled; its journal is empty."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run([need("mke2fs"), "-q", "-F", *KINDS[kind], str(image)], check=True)
    shell = 'mount -o loop "$1" "$2" || exit 77; cd "$2" && "$3" -I -c "$4" && cd / && umount "$2"'
    (folder / "mounted").mkdir()
    arguments = [str(image), str(folder / "mounted"), sys.executable, BUILD]
    alone = ["unshare", "-m", "--propagation", "private", "sh", "-c", shell, "sh"]
    done = subprocess.run([*alone, *arguments], check=False)
    if done.returncode == 77:
        lacking("no loop device to mount ext4 from")
    assert done.returncode == 0
    return image


@contextlib.contextmanager
def mounted(command: list[str], folder: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        lacking("mounts need root here")
    folder.mkdir(exist_ok=True)
    subprocess.run([*command, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def told(root: Path, labelled: list[str]) -> dict[str, tuple[object, ...]]:
    """Everything of each path but the times of the last read, and labels of SELinux."""
    found: dict[str, tuple[object, ...]] = {}
    for place, folders, files in os.walk(root):
        for name in [".", *folders, *files]:
            path = os.path.join(place, name)  # noqa: PTH118 - "." stays
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content = ""
            if kind == stat.S_IFREG:
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            elif kind == stat.S_IFLNK:
                content = str(Path(path).readlink())
            names = sorted(os.listxattr(path, follow_symlinks=False))
            if "security.selinux" in names:
                labelled.append(path)  # hidden (ext4/attributes.c)
                names.remove("security.selinux")
            found[os.path.relpath(path, root)] = (
                status.st_mode, status.st_ino, status.st_nlink, status.st_uid, status.st_gid,
                status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_blocks,
                status.st_rdev, content,
                [(one, os.getxattr(path, one, follow_symlinks=False)) for one in names],
            )  # fmt: skip
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_shown_that_the_kernel_shows(tmp_path: Path, kind: str) -> None:
    image = made(tmp_path, kind)
    labelled: list[str] = []
    shown: list[str] = []
    with mounted(["mount", "-o", "loop,ro", str(image)], tmp_path / "kernel") as tree:
        truth = told(tree, labelled)
    with mounted([str(ext4_view.PROGRAM), str(image)], tmp_path / "ours") as tree:
        found, again = told(tree, shown), told(tree, shown)
        for path in map(Path, labelled):  # nor by its name
            with pytest.raises(OSError, match="No data"):
                os.getxattr(tree / path.relative_to(tmp_path / "kernel"), "security.selinux")
        flags = subprocess.run(["lsattr", "-d", tree], capture_output=True, check=True).stdout
    assert len(truth) > 3000
    assert "system.posix_acl_access" in str(truth["listed/heir"]) or kind == "ext2"
    assert found == truth
    assert again == truth
    assert labelled
    assert shown == []
    assert flags.startswith(b"--------")


def test_names_and_parts_are_found_by_themselves(tmp_path: Path) -> None:
    """Not only as a walk finds them: no folder was listed before, and reads begin anywhere."""
    image = made(tmp_path, "usual")
    with mounted([str(ext4_view.PROGRAM), str(image)], tmp_path / "ours") as tree:
        assert (tree / "many" / ("02999" + "y" * 29)).is_symlink()
        with pytest.raises(FileNotFoundError):
            (tree / "many" / "02999").lstat()
        with pytest.raises(NotADirectoryError):
            (tree / "spare" / "x").lstat()
        with (tree / "spare").open("rb") as file:
            assert os.pread(file.fileno(), 10, 3) == b"in" + bytes(8)
            assert os.pread(file.fileno(), 10, (3 << 20) - 4) == bytes(4)
            assert os.pread(file.fileno(), 10, 3 << 20) == b""
        with pytest.raises(OSError, match="Read-only"):
            (tree / "new").touch()


def test_what_was_read_once_asks_the_server_nothing(tmp_path: Path) -> None:
    """Names, absent ones too, what stat(2) tells, folders, links, pages, and each open.

    The server is stopped meanwhile. It is still asked for extended attributes, and by statfs(2) and
    ioctl(2).
    """
    image = made(tmp_path, "usual")
    walk = (  # os.open: open() asks by ioctl(2) whether it is a terminal
        "import os, sys\n"
        "for place, folders, files in os.walk(sys.argv[1]):\n"
        "    for name in folders + files:\n"
        "        path, told = os.path.join(place, name), ''\n"
        "        if os.path.islink(path): told = os.readlink(path)\n"
        "        elif os.path.isfile(path):\n"
        "            file = os.open(path, 0); told = os.read(file, 1 << 24); os.close(file)\n"
        "        print(path, os.lstat(path), told, os.path.lexists(path + '.none'))\n"
        "print('whole')"
    )
    with mounted([str(ext4_view.PROGRAM), str(image)], tmp_path / "ours") as tree:
        command = ["timeout", "10", sys.executable, "-I", "-c", walk, str(tree)]
        (server,) = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and is_of(entry, tree)
        ]
        for _ in range(5):  # a host that reclaims memory forgets what it was told
            first = [subprocess.run(command, capture_output=True, check=True) for _ in range(2)]
            os.kill(server, signal.SIGSTOP)
            try:
                again = subprocess.run(command, capture_output=True, check=False)
            finally:
                os.kill(server, signal.SIGCONT)
            if again.returncode == 0:
                break
    assert again.stdout.endswith(b"whole\n")
    assert (again.stdout, again.stderr) == (first[1].stdout, first[1].stderr)


def is_of(process: Path, tree: Path) -> bool:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False
    return words[0] == str(ext4_view.PROGRAM).encode() and str(tree).encode() in words


def test_journal_that_is_not_replayed_is_refused(tmp_path: Path) -> None:
    image = made(tmp_path, "usual")
    subprocess.run(
        [need("debugfs"), "-w", "-R", "feature needs_recovery", str(image)],
        check=True,
        capture_output=True,
    )
    (tmp_path / "ours").mkdir()
    assert "replayed" in ext4_view.mount(image, tmp_path / "ours")
    assert "no ext4" in ext4_view.mount(Path("/etc/passwd"), tmp_path / "ours")


@pytest.mark.parametrize("seed", range(12))
def test_damage_is_an_error_and_never_more(tmp_path: Path, seed: int) -> None:
    """A walk over a file system with wrong bytes in it: what checks itself does not stop."""
    if not ASAN.exists():
        lacking("'make guest-tests' builds it")
    rng = random.Random(seed)  # noqa: S311 - reproducible
    image = made(tmp_path, list(KINDS)[seed % len(KINDS)])
    subprocess.run(  # else a checksum refuses all of it
        [need("debugfs"), "-w", "-R", "feature ^metadata_csum", str(image)],
        check=True,
        capture_output=True,
    )
    data = bytearray(image.read_bytes())
    used = [at for at in range(4096, SIZE, 512) if any(data[at : at + 512])]
    for at in rng.sample(used, len(used) // 40):
        for _ in range(rng.randrange(1, 6)):
            data[at + rng.randrange(512)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    image.write_bytes(data)
    folder = tmp_path / "ours"
    folder.mkdir()
    started = subprocess.run([str(ASAN), str(image), str(folder)], capture_output=True, check=False)
    assert b"Sanitizer" not in started.stderr
    if started.returncode:
        return
    try:
        walk = r'find "$1" -xdev -ls; find "$1" -xdev -type f -exec cat {} +; getfattr -Rd "$1"'
        subprocess.run(["timeout", "60", "sh", "-c", walk, "sh", str(folder)],
                       capture_output=True, check=False)  # fmt: skip
        assert os.statvfs(folder).f_namemax == 255  # it is still there
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
