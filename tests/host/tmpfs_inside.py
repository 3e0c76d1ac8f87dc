"""The half of test_tmpfs_rebuild.py that mounts: a real tmpfs, and another made from its record.

Usage: ``python tmpfs_inside.py FOLDER``, as root. It prints one JSON object. The first tmpfs is
mounted and filled with all that a tmpfs can have by the kernel's own calls; the second one is made
in a user namespace from a hand-over of what the first one holds.
"""

# Guest paths are bytes, which pathlib does not take.
# ruff: noqa: PTH101, PTH102, PTH103, PTH115, PTH123, PTH208, PTH211

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import socket
import stat
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouassister.errors import OUassisterError
from ouassister.guest_model import Tmpfs, TmpfsContent, TmpfsFile, TmpfsNode
from ouassister.model import GuestView, Mount, Uts
from ouassister.shadow import mounts, raw, sandbox, tmpfs_fill, tmpfs_handover
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BASE = 0x6FFF0000  # host ids that nobody has
NOBODY = 0xFFFF_FFFF
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in [(1, 7, NOBODY), (2, 4, 1000), (4, 5, NOBODY), (16, 5, NOBODY), (32, 0, NOBODY)]
)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
TIME = 981173106_123456789
MANY = 700  # files of a usual /run


def main() -> None:
    folder = Path(sys.argv[1])
    raw.unshare(raw.CLONE_NEWNS)
    raw.mount("", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    source = folder / "source"
    source.mkdir()
    raw.mount("tmpfs", str(source), "tmpfs", 0, "mode=751,size=8m,nr_inodes=2000")
    populate(os.fsencode(source))
    handed = folder / "handed"
    handed.mkdir()
    written = tmpfs_handover.write(handed, view(os.fsencode(source)), 1 << 30)
    place = folder / "mounts"
    place.mkdir()
    os.chown(place, BASE, BASE)
    for one in (folder, folder.parent):
        one.chmod(0o755)
    answer = in_user_namespace(lambda: inside(folder, handed, place))
    answer |= {"source": describe(os.fsencode(source)), "written": written}
    print(json.dumps(answer))


def populate(top: bytes) -> None:
    """Whatever a tmpfs can hold."""
    here = top + b"/"
    os.makedirs(here + b"d/" * 60)
    with open(here + b"d/" * 60 + b"bottom", "wb") as file:
        file.write(b"x" * 5000)
    for name in (b"plain", b"..hidden", b"new\nline \x1b[31m\xff\\", b"l" * 255, b"setuid"):
        with open(here + name, "wb") as file:
            file.write(name)
    os.mkdir(here + b"d.after")  # sorts before d/ by bytes, and after it in the tree
    os.link(here + b"plain", here + b"d/hard")
    os.link(here + b"plain", here + b"a-first")
    os.mkdir(here + b"sticky")
    os.chown(here + b"sticky", 7, 65535)
    os.chmod(here + b"sticky", 0o3770)  # noqa: S103 - what a guest may have
    os.symlink(b"/etc/passwd", here + b"outside")
    os.symlink(b"../" * 300, here + b"up")
    os.chown(here + b"up", 5, 6, follow_symlinks=False)
    os.symlink(b"/proc/self/fd/0", here + b"magic")
    with open(here + b"hole", "wb") as file:
        file.seek(5_000_000)
        file.write(b"middle")
        file.truncate(1 << 40)
    os.mkfifo(here + b"fifo", 0o620)
    os.chmod(here + b"fifo", 0o620)
    for name, mode, device in ((b"char", stat.S_IFCHR, (1, 3)), (b"block", stat.S_IFBLK, (7, 2)),
                               (b"nothing", stat.S_IFCHR, (0, 0))):  # fmt: skip
        os.mknod(here + name, mode | 0o600, os.makedev(*device))
    listening = socket.socket(socket.AF_UNIX)
    os.chdir(top)
    listening.bind("socket")
    listening.listen()
    os.chdir("/")
    os.setxattr(here + b"plain", "trusted.x", b"v\0x")
    os.setxattr(here + b"setuid", "security.capability", CAPABILITY)
    for name in (b"setuid", b"sticky"):
        os.setxattr(here + name, "system.posix_acl_access", ACL)
    os.setxattr(here + b"sticky", "system.posix_acl_default", ACL)
    os.chown(here + b"..hidden", 70000, 3)
    os.mkdir(here + b"ouassister")
    with open(here + b"ouassister/theirs", "wb") as file:
        file.write(b"hidden")
    os.mkdir(here + b"many")
    for number in range(MANY):
        with open(here + b"many/%d" % number, "wb") as file:
            file.write(b"%d\n" % number)
    for name in (b"plain", b"fifo", b"outside", b"sticky", b"d"):
        os.utime(here + name, ns=(TIME, TIME + 1), follow_symlinks=False)


def view(top: bytes) -> GuestView:
    """What a sleeping kernel would tell of it, mounted at /run; and one that cannot be read."""
    nodes, files, links = [], [], []
    first: dict[int, bytes] = {}
    for path, status in walk(top):
        name = path[len(top) :] or b"/"
        nodes.append(
            TmpfsNode(
                path=name, inode=status.st_ino, mode=status.st_mode, uid=status.st_uid,
                gid=status.st_gid, links=status.st_nlink, size=status.st_size,
                major=os.major(status.st_rdev), minor=os.minor(status.st_rdev),
                atime_ns=status.st_atime_ns, mtime_ns=status.st_mtime_ns,
                ctime_ns=status.st_ctime_ns,
                target=os.readlink(path) if stat.S_ISLNK(status.st_mode) else None,
                xattrs=attributes(path), swapped=0, absent=0,
            )
        )  # fmt: skip
        if stat.S_ISREG(status.st_mode):
            if first.setdefault(status.st_ino, name) != name:
                links.append((name, first[status.st_ino]))
            else:
                files.append(TmpfsFile(name, tuple(runs(path))))
    statfs = os.statvfs(top)
    content = TmpfsContent(
        Tmpfs(b"/run", 0, 23, tuple(nodes)), statfs.f_blocks * statfs.f_frsize, statfs.f_files,
        (9,), tuple(links), tuple(files), (),
    )  # fmt: skip
    full = TmpfsContent(
        Tmpfs(b"/full", 0, 25, tuple(
            dataclasses.replace(nodes[0], path=path, mode=mode, size=size)
            for path, mode, size in ((b"/", stat.S_IFDIR | 0o755, 0),
                                     (b"/fits", stat.S_IFREG | 0o644, 4096),
                                     (b"/larger", stat.S_IFREG | 0o644, 5 * 4096))
        )),
        4 * 4096, 0, (), (), (
            TmpfsFile(b"/fits", ((0, b"x" * 4096),)),
            TmpfsFile(b"/larger", ((0, b"y" * 5 * 4096),)),
        ), (),
    )  # fmt: skip
    damaged = TmpfsContent(Tmpfs(b"/tmp", 0, 24, ()), 0, 0, (), (), (), ((b"", "it is odd"),))
    return GuestView(
        uts=Uts("Linux", "g", "6.1", "#1", "x86_64", ""), boot_id="", suspended_at_s=0, uptime_s=0,
        cpus=1, memory_bytes=1 << 29, tasks=(),
        mounts=(
            Mount(b"/dev/vda", b"/", "ext4", 254, 0, False, None, b"/", 1, 0),
            Mount(b"tmpfs", b"/run", "tmpfs", 0, 23, False, None, b"/", 9, 1),
            Mount(b"tmpfs", b"/mnt", "tmpfs", 0, 23, True, None, b"/d", 10, 1),
            Mount(b"tmpfs", b"/tmp", "tmpfs", 0, 24, False, None, b"/", 11, 1),
            Mount(b"tmpfs", b"/tmp/in/it", "tmpfs", 0, 23, True, None, b"/sticky", 12, 11),
            Mount(b"tmpfs", b"/full", "tmpfs", 0, 25, False, None, b"/", 13, 1),
        ),
        tmpfs_content=(content, damaged, full),
    )  # fmt: skip


def inside(folder: Path, handed: Path, place: Path) -> dict[str, Any]:
    """Make it again as the root of a user namespace, and try what programs would try."""
    raw.mount("", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    os.chdir(folder)
    before = time.process_time()
    notes = tmpfs_fill.fill({"folder": "handed", "mounts": "mounts"})
    seconds = time.process_time() - before
    top = place / "0"
    statfs = os.statvfs(top)
    answer = {
        "notes": notes,
        "seconds": seconds,
        "rebuilt": describe(os.fsencode(top)),
        "damaged": describe(os.fsencode(place / "1")),
        "full": describe(os.fsencode(place / "2")),
        "limits": [statfs.f_blocks * statfs.f_frsize, statfs.f_files],
        "places": [[to_text(one.target), one.noexec] for one in tmpfs_handover.read_places(handed)
                   or ()],
    }  # fmt: skip
    client = socket.socket(socket.AF_UNIX)
    os.chdir(top)
    answer["connect"] = errno_of(lambda: client.connect("socket"))
    answer["fifo"] = errno_of(lambda: os.open("fifo", os.O_WRONLY | os.O_NONBLOCK))
    for name in ("char", "block", "nothing"):
        answer[name] = errno_of(lambda name=name: os.open(name, os.O_RDONLY))  # type: ignore[misc]
    os.symlink("sticky", "moved")
    sources = mounts.Sources([str(top), str(place)])
    bind = mounts.BindPart(str(top), b"/sticky", os.fsencode(top / "d.after"), True, noexec=True)
    bind.execute(sources)
    answer["written to"] = errno_of(lambda: os.mkdir("d.after/x"))
    answer["flags"] = os.statvfs(top / "d.after").f_flag
    for link in (b"/moved", b"/magic", b"/up"):
        through = mounts.BindPart(str(top), b"/sticky", os.fsencode(top) + link)
        answer["target" + link.decode()] = errno_of(lambda one=through: one.execute(sources))  # type: ignore[misc]
        part = mounts.BindPart(str(top), link, os.fsencode(top / "d"))
        answer["part" + link.decode()] = errno_of(lambda one=part: one.execute(sources))  # type: ignore[misc]
    cover = mounts.Tmpfs(str(top / "moved"), exact=True)
    answer["cover"] = errno_of(lambda: cover.execute(sources))
    sources.close()
    again = tmpfs_handover.TmpfsHandOver(handed / "0")
    (place / "twice").mkdir()
    (place / "twice/plain").write_text("here before")
    try:
        tmpfs_fill.fill_folder(place / "twice", again, b"/run")
    except FileExistsError:
        answer["over another"] = "refused"
    except OUassisterError as error:
        answer["over another"] = error.message
    again.close()
    assert sandbox.OWN_FOLDER == b"/run/ouassister"
    return answer


def errno_of(action: Callable[[], object]) -> str:
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def in_user_namespace(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run it in a child that is the root of a user namespace with the ids of a guest."""
    ready, unshared = os.pipe()
    wait, mapped = os.pipe()
    result, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(mapped)
        raw.unshare(raw.CLONE_NEWUSER | raw.CLONE_NEWNS)
        os.write(unshared, b"x")
        os.read(wait, 1)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        with open(said, "w") as pipe:
            json.dump(action(), pipe)
        os._exit(0)
    os.close(said)
    os.read(ready, 1)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{child}/{name}").write_text(f"0 {BASE} 65536\n")
    os.close(mapped)
    with open(result) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    answer: dict[str, Any] = json.loads(text)
    return answer


def walk(top: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    yield top, os.lstat(top)
    for name in sorted(os.listdir(top)):
        path = top + b"/" + name
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            yield from walk(path)
        else:
            yield path, status


def runs(path: bytes) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        at = 0
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: no data behind
                return
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            yield at, os.pread(file.fileno(), end - at, at)
            at = end


def attributes(path: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(
        (name.encode(), os.getxattr(path, name, follow_symlinks=False))
        for name in sorted(os.listxattr(path, follow_symlinks=False))
    )


def describe(top: bytes) -> dict[str, Any]:
    """Everything that a program can tell of each file."""
    found = {}
    for path, status in walk(top):
        regular = stat.S_ISREG(status.st_mode)
        digest = hashlib.sha256(repr([*runs(path)]).encode()).hexdigest() if regular else ""
        found[to_text(path[len(top) :] or b"/")] = {
            "mode": stat.filemode(status.st_mode),
            "owner": [status.st_uid, status.st_gid],
            "links": status.st_nlink,
            "device": status.st_rdev,
            "size": status.st_size,
            "blocks": status.st_blocks,
            "mtime": status.st_mtime_ns,
            "target": to_text(os.readlink(path)) if stat.S_ISLNK(status.st_mode) else "",
            "xattrs": [[name.decode(), to_text(value)] for name, value in attributes(path)],
            "digest": digest,
        }
    return found


if __name__ == "__main__":
    main()
