"""A small guest tree, a change set of every kind for it, and an oracle that knows the outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

from ouassister.model import (
    Changeset,
    Entry,
    Expected,
    Fence,
    FileStamp,
    Identity,
    Kind,
)

BOOT_ID = "5d1b3b0e-54a7-4e6d-9f5e-0c7a3a1c9d11"
MACHINE_ID = "0123456789abcdef0123456789abcdef"
LOCKS = (b"/var/lib/dpkg/lock-frontend", b"/var/lib/dpkg/lock")
SAME, SAME_LINK = b"/usr/bin/same", b"/usr/lib/same-link"  # of everything()
SAME_LATE = b"/var/lib/dpkg/info/same.list"
STATE_DIR = b"/var/lib/ouassister"
RESERVED = b".ouassister-"
OLD = re.compile(rb"\.ouassister-[0-9a-f]{12}-undo")  # what was replaced, where there is no state
# VFS_CAP_REVISION_2 | VFS_CAP_FLAGS_EFFECTIVE, CAP_NET_RAW: uapi/linux/capability.h
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
# version 2; user::rw- user:1234:r-- group::r-- mask::r-- other::---: uapi/linux/posix_acl_xattr.h
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in (
        (1, 6, 0xFFFFFFFF),
        (2, 4, 1234),
        (4, 4, 0xFFFFFFFF),
        (0x10, 4, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    )
)
NS = 1_000_000_000
NOW = 1_700_000_000 * NS + 123_456_789

_STAMP = FileStamp("save", 1, 2, 3, 4, 5, "")
_TYPES = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
}


def at(root: Path, path: bytes) -> bytes:
    """The path on the host."""
    return os.fsencode(root) + path


def expected(root: Path, path: bytes) -> Expected:
    """What stands at a path."""
    found = os.lstat(at(root, path))
    return Expected(
        found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )


def below(root: Path, path: bytes) -> tuple[tuple[bytes, Expected], ...]:
    """Everything below a directory."""
    return tuple((p, expected(root, p)) for p in paths(root, path) if p != path)


def paths(root: Path, top: bytes = b"") -> list[bytes]:
    """The directory and everything below it, sorted; the applier's own files left out."""
    found = [top]
    for folder, dirs, files in os.walk(at(root, top or b"/")):
        prefix = folder[len(os.fsencode(root)) :].rstrip(b"/")
        dirs[:] = [n for n in dirs if prefix + b"/" + n != STATE_DIR and not OLD.fullmatch(n)]
        found += [prefix + b"/" + name for name in (*dirs, *files)]
    return sorted(found)


@dataclass(frozen=True)
class Seen:
    """All that must agree of one path."""

    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int  # 0 for directories whose time nobody promised
    content: str  # hash, target or device number
    xattrs: tuple[tuple[str, bytes], ...]
    link: bytes  # first path of the same inode


Snapshot = dict[bytes, Seen]


def snapshot(root: Path, timed: frozenset[bytes] = frozenset()) -> Snapshot:
    """The tree; directories' times only for those in ``timed``."""
    seen: Snapshot = {}
    first: dict[int, bytes] = {}
    for path in paths(root):
        if not path:
            continue
        host = at(root, path)
        status = os.lstat(host)
        kind = _TYPES[stat.S_IFMT(status.st_mode)]
        content = ""
        if kind is Kind.FILE:
            content = hashlib.sha256(Path(os.fsdecode(host)).read_bytes()).hexdigest()
        elif kind is Kind.SYMLINK:
            content = str(Path(os.fsdecode(host)).readlink())
        elif kind in (Kind.CHAR, Kind.BLOCK):
            content = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        names = sorted(os.listxattr(host, follow_symlinks=False))
        seen[path] = Seen(
            kind,
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            0 if kind is Kind.DIRECTORY and path not in timed else status.st_mtime_ns,
            content,
            tuple((n, os.getxattr(host, n, follow_symlinks=False)) for n in names),
            first.setdefault(status.st_ino, path) if kind is not Kind.DIRECTORY else path,
        )
    return seen


def inodes(root: Path) -> dict[bytes, tuple[int, int, int]]:
    """Inode, size and time of everything but directories; of directories the inode."""
    result = {}
    for path in paths(root):
        status = os.lstat(at(root, path or b"/"))
        if stat.S_ISDIR(status.st_mode):
            result[path] = (status.st_ino, 0, 0)
        else:
            result[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return result


@dataclass
class World:
    """A tree that plays the guest, and the change set in the making."""

    root: Path
    entries: list[Entry] = field(default_factory=list)
    layer: bytearray = field(default_factory=lambda: bytearray(b"\0" * 512))
    boot_id: str = BOOT_ID
    machine_id: str = MACHINE_ID
    locks: tuple[bytes, ...] = LOCKS

    @classmethod
    def make(cls, root: Path) -> World:
        """The least that every guest has."""
        world = cls(root)
        for path in (b"/etc", b"/proc/sys/kernel/random", b"/var/lib/dpkg/info", b"/usr/bin"):
            Path(os.fsdecode(at(root, path))).mkdir(parents=True)
        world.put(b"/proc/sys/kernel/random/boot_id", BOOT_ID.encode() + b"\n")
        world.put(b"/etc/machine-id", MACHINE_ID.encode() + b"\n")
        for lock in LOCKS:
            world.put(lock, b"")
        return world

    def host(self, path: bytes) -> Path:
        """The path on the host."""
        return Path(os.fsdecode(at(self.root, path)))

    def put(self, path: bytes, content: bytes, mode: int = 0o644) -> None:
        """Make a file in the guest, with an odd time."""
        host = self.host(path)
        host.parent.mkdir(parents=True, exist_ok=True)
        host.write_bytes(content)
        host.chmod(mode)
        os.utime(host, ns=(NOW - 77, NOW - 1_000_000_001 - len(path)))

    def add(
        self, path: bytes, kind: Kind, content: bytes = b"", mode: int = 0o644, **more: object
    ) -> Entry:
        """An entry that fits the tree as it stands."""
        here = expected(self.root, path) if os.path.lexists(at(self.root, path)) else None
        entry = Entry(path, kind, here, mtime_ns=NOW + len(self.entries) * 1001)
        entry = dataclasses.replace(entry, mode=0o777 if kind is Kind.SYMLINK else mode)
        if kind is Kind.FILE:
            digest = hashlib.sha256(content).hexdigest()
            entry = dataclasses.replace(entry, size=len(content), sha256=digest)
            if not more.get("same"):
                entry = dataclasses.replace(entry, offset=len(self.layer))
                self.layer += content + bytes(-len(content) % 512)
        if here and stat.S_ISDIR(here.mode) and kind is not Kind.DIRECTORY:
            entry = dataclasses.replace(entry, below=below(self.root, path))
        if kind is Kind.DELETE:
            entry = dataclasses.replace(entry, mode=0, mtime_ns=0)
        entry = dataclasses.replace(entry, **more)  # type: ignore[arg-type]
        self.entries.append(entry)
        return entry

    def changeset(self, number: int = 1) -> Changeset:
        """The change set with what was added so far."""
        return Changeset(
            changeset_id=hashlib.sha256(f"{number}".encode()).hexdigest(),
            vm="web1",
            created_at_s=NOW // NS,
            fence=Fence(_STAMP, ()),
            identity=Identity(self.boot_id, self.machine_id),
            changes=(),
            left_out=(),
            entries=tuple(self.entries),
            actions=(),
            lock_paths=self.locks,
            layer_sha256=hashlib.sha256(self.layer).hexdigest(),
            layer_size=len(self.layer),
            reboot_needed=False,
            filtered=(),
        )

    @property
    def timed(self) -> frozenset[bytes]:
        """Directories whose time the change set sets."""
        return frozenset(e.path for e in self.entries if e.kind is Kind.DIRECTORY)

    def same(self, path: bytes) -> Entry:
        """An entry for what the guest has but for its time."""
        host = self.host(path)
        if host.is_symlink():
            return self.add(path, Kind.SYMLINK, target=os.fsencode(host.readlink()), same=True)
        mode = stat.S_IMODE(host.stat().st_mode)
        return self.add(path, Kind.FILE, host.read_bytes(), mode, same=True)

    def after(self) -> Snapshot:
        """What the tree must be once the change set is applied, by its meaning alone."""
        result = snapshot(self.root)
        for entry in self.entries:
            old = result.pop(entry.path, None)
            if entry.kind is not Kind.DIRECTORY:
                for path in [p for p in result if p.startswith(entry.path + b"/")]:
                    del result[path]
            if entry.kind is Kind.DELETE:
                continue
            if entry.same:
                assert old is not None
                result[entry.path] = dataclasses.replace(old, mtime_ns=entry.mtime_ns)
                continue
            kept = dict(old.xattrs) if old and old.kind is entry.kind is Kind.DIRECTORY else {}
            seen = Seen(
                entry.kind,
                entry.mode,
                entry.uid,
                entry.gid,
                entry.mtime_ns,
                self._content(entry),
                tuple(sorted((kept | dict(entry.xattrs)).items())),
                entry.path,
            )
            if entry.kind is Kind.HARDLINK:
                seen = result[entry.target]
            result[entry.path] = seen
        for path, seen in result.items():
            if seen.link != path:
                group = [p for p, other in result.items() if other.link == seen.link]
                for member in group:
                    result[member] = dataclasses.replace(result[member], link=min(group))
        return result

    @staticmethod
    def _content(entry: Entry) -> str:
        if entry.kind is Kind.FILE:
            return entry.sha256
        if entry.kind is Kind.SYMLINK:
            return os.fsdecode(entry.target)
        if entry.kind in (Kind.CHAR, Kind.BLOCK):
            return f"{entry.major}:{entry.minor}"
        return ""


def everything(world: World) -> World:
    """A change set with every kind of entry, of attribute and of replacement."""
    root = world.root
    world.put(b"/usr/bin/tool", b"old tool", 0o755)
    world.put(b"/usr/bin/gone", b"old", 0o755)
    world.put(b"/usr/bin/kept", b"kept", 0o755)
    os.link(at(root, b"/usr/bin/kept"), at(root, b"/usr/bin/kept-too"))
    world.put(b"/usr/share/doc/old/changelog", b"changes")
    world.put(b"/usr/share/doc/old/deep/er/file", b"deep")
    world.host(b"/usr/share/doc/old/deep/link").symlink_to("nowhere")
    world.put(b"/usr/lib/was-dir/inner/file", b"inner")
    world.host(b"/usr/lib/was-link").symlink_to("kept")
    world.host(b"/usr/lib/turns").symlink_to("a")
    world.put(b"/etc/rights", b"same content", 0o600)
    world.put(b"/var/lib/dpkg/status", b"status: old\n")
    world.put(SAME, b"the same program", 0o4755)
    os.setxattr(world.host(SAME), "security.capability", CAPABILITY)
    world.put(SAME_LATE, b"/.\n")
    world.host(SAME_LINK).symlink_to("kept")
    meta = world.host(b"/usr/lib/meta")
    meta.mkdir()
    world.put(b"/usr/lib/meta/inside", b"x")
    os.setxattr(meta, "user.changes", b"from")
    os.setxattr(meta, "user.stays", b"here")
    os.utime(meta, ns=(NOW, NOW - 5))

    world.add(b"/var/lib/dpkg/status", Kind.FILE, b"status: new\n")
    world.add(b"/usr/bin/tool", Kind.FILE, b"new tool" * 200_000, 0o4755, uid=0, gid=44)
    world.add(b"/usr/bin/capable", Kind.FILE, b"cap", 0o750, uid=33, gid=33,
              xattrs=(("security.capability", CAPABILITY), ("user.note", b"\0\xff")))  # fmt: skip
    world.add(b"/usr/bin/acl", Kind.FILE, b"acl", 0o640, xattrs=(("system.posix_acl_access", ACL),))
    world.add(b"/usr/bin/linked", Kind.HARDLINK, target=b"/usr/bin/tool")
    world.add(b"/usr/bin/gone", Kind.DELETE)
    world.add(b"/usr/bin/empty", Kind.FILE, b"", 0o444)
    world.add(b'/usr/bin/odd \xff\n"\\name', Kind.FILE, b"odd", mtime_ns=-1)
    world.add(b"/usr/share/doc/old", Kind.DELETE)
    world.add(b"/usr/lib/was-dir", Kind.SYMLINK, target=b"../bin")
    world.add(b"/usr/lib/was-link", Kind.DIRECTORY, mode=0o755)
    world.add(b"/usr/lib/was-link/file", Kind.FILE, b"now a directory")
    world.add(b"/usr/lib/turns", Kind.SYMLINK, target=b"b", uid=7, gid=8)
    world.add(b"/usr/lib/meta", Kind.DIRECTORY, mode=0o2750, gid=5,
              xattrs=(("user.changes", b"to"), ("user.new", b"1")))  # fmt: skip
    world.add(b"/usr/lib/meta/added", Kind.FILE, b"added", 0o600)
    world.add(b"/usr/lib/new", Kind.DIRECTORY, mode=0o1777, uid=3, xattrs=(("user.d", b"1"),))
    world.add(b"/usr/lib/new/empty", Kind.DIRECTORY, mode=0o555)
    world.add(b"/usr/lib/new/sub", Kind.DIRECTORY, mode=0o2755, gid=9)
    world.add(b"/usr/lib/new/sub/fifo", Kind.FIFO, mode=0o620, gid=5)
    world.add(b"/usr/lib/new/sub/null", Kind.CHAR, mode=0o666, major=1, minor=3)
    world.add(b"/usr/lib/new/sub/disk", Kind.BLOCK, mode=0o660, gid=6, major=254, minor=300)
    world.add(b"/usr/lib/new/sub/setgid", Kind.FILE, b"s" * 4097, 0o2711, gid=42)
    world.add(b"/usr/lib/new/sub/link", Kind.SYMLINK, target=b"x" * 300,
              xattrs=(("trusted.mark", b"on a link"),))  # fmt: skip
    world.add(b"/usr/lib/new/sub/zhard", Kind.HARDLINK, target=b"/usr/lib/new/sub/setgid")
    world.add(b"/usr/lib/hard-to-inside", Kind.HARDLINK, target=b"/usr/lib/new/sub/setgid")
    world.add(b"/etc/rights", Kind.FILE, b"same content", 0o604)
    world.add(b"/top", Kind.FILE, b"in the root directory")
    world.add(b"/var/lib/dpkg/info/bcc.list", Kind.FILE, b"/.\n")
    for path in (SAME, SAME_LINK, SAME_LATE):
        world.same(path)
    return world
