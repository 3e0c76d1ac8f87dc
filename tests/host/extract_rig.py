"""A user namespace with a union in it, for the tests of extraction, and their oracle.

The oracle describes trees path by path: a lower tree to which a change set was applied must be
described as the union was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conftest import lacking, need

from ouassister.changeset.extract import Extraction, outcome
from ouassister.disk import ext4_view
from ouassister.model import Entry, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

Tree = dict[str, dict[str, Any]]

INSIDE = Path(__file__).with_name("extract_inside.py")
SOURCE = Path(__file__).parents[2] / "src"
SHIFTED = 0x6FFF0000  # host ids that nobody has
IDS = 65536


class Namespace:
    """A user namespace with a full map, and a mount namespace, until it is closed.

    Args:
        base: Host id of the namespace's root.
    """

    def __init__(self, base: int) -> None:
        self.base = base
        # The holder echoes one line, which proves that unshare(1) has done its work.
        self._holder = subprocess.Popen(
            ["unshare", "-U", "-m", "--propagation", "private", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(b"\n")
        self._holder.stdin.flush()
        assert self._holder.stdout.readline() == b"\n"
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{self._holder.pid}/{name}").write_text(f"0 {base} {IDS}\n")

    def run(self, argv: list[str]) -> subprocess.CompletedProcess[bytes]:
        """Run a program as the namespace's root; exec as its root gives all its capabilities."""
        enter = ["nsenter", "-t", str(self._holder.pid), "-U", "-m", "-S", "0", "-G", "0", "--"]
        return subprocess.run(enter + argv, check=False, stdout=subprocess.PIPE, timeout=300)

    def close(self) -> None:
        self._holder.communicate()


class Rig:
    """A work folder that the namespace's root owns, and the steps of one extraction."""

    def __init__(self, work: Path, space: Namespace) -> None:
        self.work = work
        self.space = space
        self.image: str | None = None
        self.output = "."

    def inside(self, **request: object) -> subprocess.CompletedProcess[bytes]:
        whole = {
            "work": str(self.work),
            "source": str(SOURCE),
            "program": str(ext4_view.PROGRAM),
            "image": self.image,
            "output": self.output,
        } | request
        return self.space.run([python_for_all(), "-I", str(INSIDE), json.dumps(whole)])

    def build(self, seed: int) -> None:
        (self.work / "lower").mkdir()
        own(self.work / "lower", self.space.base)
        done = self.inside(do="build", seed=seed, root="lower", script=[])
        assert done.returncode == 0

    def build_image(self, seed: int, script: tuple[str, ...] = ()) -> None:
        """Make the lower tree with the kernel's ext4, for ext4-view to mount."""
        image, mounted = self.work / "image", self.work / "kernel"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run([need("mke2fs"), "-q", "-t", "ext4", str(image)], check=True)
        mounted.mkdir()
        request = {
            "do": "build",
            "work": str(self.work),
            "root": "kernel",
            "seed": seed,
            "script": script,
        }
        # In a mount namespace of its own: one that somebody else makes meanwhile would inherit
        # the mount, keep it after umount(8), and leave the journal to be replayed.
        commands = 'mount -o loop "$1" "$2" || exit 77; "$3" -I "$4" "$5" && umount "$2"'
        arguments = [str(image), str(mounted), sys.executable, str(INSIDE), json.dumps(request)]
        shell = ["unshare", "-m", "--propagation", "private", "sh", "-c", commands, "sh"]
        done = subprocess.run(shell + arguments, check=False)
        if done.returncode == 77:
            lacking("no loop device to mount ext4 from")
        assert done.returncode == 0
        own(image, self.space.base)
        # /dev/fuse may be closed to all but root.
        device = self.work / "fuse"
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(10, 229))
        device.chmod(0o666)
        bind = ["mount", "--bind", str(device), "/dev/fuse"]
        assert self.space.run(bind).returncode == 0
        self.image = "image"

    def update(
        self,
        script: tuple[str, ...] = (),
        *,
        seed: int = 0,
        operations: int = 0,
        upper_script: tuple[str, ...] = (),
    ) -> Extraction:
        """Change the union and extract; raises what the program ended with."""
        done = self.inside(
            do="update",
            seed=seed,
            operations=operations,
            script=script,
            upper_script=upper_script,
        )
        return self.result(done)

    def extract(self) -> Extraction:
        """Extract from the folders ``upper`` and ``lower`` as they are."""
        return self.result(self.inside(do="extract"))

    def result(self, done: subprocess.CompletedProcess[bytes]) -> Extraction:
        assert done.returncode == 0 or b'"error"' in done.stdout
        return outcome(done.stdout, self.work / self.output / "record.json")

    def seen(self, name: str) -> Tree:
        tree: Tree = json.loads((self.work / f"{name}.json").read_text())
        return tree


def own(path: Path, owner: int) -> None:
    os.chown(path, owner, owner)


def python_for_all() -> str:
    """An interpreter that ids without any right on the host can start."""
    for name in (sys.executable, "/usr/bin/python3"):
        path = Path(name).resolve()
        if path.exists() and all(p.stat().st_mode & stat.S_IXOTH for p in [path, *path.parents]):
            probe = [str(path), "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
            if subprocess.run(probe, check=False).returncode == 0:
                return name
    return lacking("no Python >= 3.11 that everybody may start")


@contextlib.contextmanager
def opened() -> Iterator[Rig]:
    """A rig, and nothing left of it."""
    if os.geteuid() != 0:
        lacking("writes the maps of a user namespace: needs root")
    need("unshare")
    need("nsenter")
    # Not tmp_path: its parents are closed to others, and the namespace's root is another.
    work = Path(tempfile.mkdtemp(prefix="ouassister-extract-"))
    work.chmod(0o755)
    own(work, SHIFTED)
    space = Namespace(SHIFTED)
    try:
        yield Rig(work, space)
    finally:
        space.close()
        # shutil.rmtree recurses; some trees here are deeper than Python's stack.
        subprocess.run(["rm", "-rf", str(work)], check=True)


def apply_entries(before: Tree, entries: tuple[Entry, ...]) -> Tree:
    """The description of a tree to which the entries were applied, in their order."""
    tree = {key: dict(item) for key, item in before.items()}
    for entry in entries:
        key = entry.path.hex()
        old = tree.get(key)
        if entry.expected is None:
            assert old is None, entry.path
        else:
            assert old is not None, entry.path
            assert entry.expected.mode == old["mode"]
        if entry.same:
            assert old is not None
            tree[key] = old | {"mtime_ns": entry.mtime_ns}
            continue
        keep = entry.kind is Kind.DIRECTORY and old is not None and stat.S_ISDIR(old["mode"])
        if not keep:
            gone = {k for k in tree if k == key or k.startswith(key + "2f")}
            listed = {p.hex() for p, _ in entry.below} | ({key} if old else set())
            assert gone == listed, entry.path
            unlink(tree, gone)
        if entry.kind is Kind.DELETE:
            continue
        assert entry.path.rpartition(b"/")[0].hex() in {*tree, ""}
        if entry.kind is Kind.HARDLINK:
            tree[key] = dict(tree[entry.target.hex()])
            tree[key]["links"].append(key)
            continue
        tree[key] = {
            "mode": entry.mode | TYPES[entry.kind],
            "uid": entry.uid,
            "gid": entry.gid,
            "mtime_ns": entry.mtime_ns,
            "size": entry.size,
            "target": entry.target.hex(),
            "sha256": entry.sha256,
            "xattrs": {name: value.hex() for name, value in entry.xattrs},
            "links": [key],
        }
    return tree


def apply_layer(before: Tree, layer: Path, entries: tuple[Entry, ...]) -> Tree:
    """The same by the OCI rules, from the tar, and of the entries what it lacks."""
    tree = {key: dict(item) for key, item in before.items()}
    for entry in entries:
        if entry.same:
            tree[entry.path.hex()]["mtime_ns"] = entry.mtime_ns
    with tarfile.open(layer, encoding="utf-8", errors="surrogateescape") as tar:
        for member in tar:
            path = b"/" + os.fsencode(member.name)
            folder, _, name = path.rpartition(b"/")
            if name.startswith(b".wh."):
                key = (folder + b"/" + name[4:]).hex()
                assert key in tree
                unlink(tree, {k for k in tree if k == key or k.startswith(key + "2f")})
                continue
            key = path.hex()
            if not (member.isdir() and key in tree and stat.S_ISDIR(tree[key]["mode"])):
                unlink(tree, {k for k in tree if k == key or k.startswith(key + "2f")})
            if member.islnk():
                tree[key] = dict(tree[(b"/" + os.fsencode(member.linkname)).hex()])
                tree[key]["links"].append(key)
                continue
            seconds, _, rest = member.pax_headers.get("mtime", f"{int(member.mtime)}").partition(
                "."
            )
            sign = -1 if seconds.startswith("-") else 1
            file = tar.extractfile(member) if member.isreg() else None
            tree[key] = {
                "mode": member.mode | TAR_TYPES[member.type],
                "uid": member.uid,
                "gid": member.gid,
                "mtime_ns": int(seconds) * 10**9 + sign * int(rest.ljust(9, "0")),
                "size": member.size,
                "target": os.fsencode(member.linkname).hex(),
                "sha256": hashlib.sha256(file.read()).hexdigest() if file else "",
                "xattrs": {
                    name.removeprefix("SCHILY.xattr."): os.fsencode(value).hex()
                    for name, value in member.pax_headers.items()
                    if name.startswith("SCHILY.xattr.")
                },
                "links": [key],
            }
    return tree


def unlink(tree: Tree, gone: set[str]) -> None:
    for key in gone:
        links = tree[key]["links"]
        for item in tree.values():
            if item["links"] == links:
                item["links"] = [k for k in links if k not in gone]
        del tree[key]


TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.FIFO: stat.S_IFIFO,
    Kind.CHAR: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
}
TAR_TYPES = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def lines(tree: Tree, before: Tree) -> list[str]:
    """One line a path of what must be equal.

    The time of a directory that the guest had is left out: applying the change set, like a live
    update, gives it a new one.
    """
    result = []
    for key, item in tree.items():
        directory = stat.S_ISDIR(item["mode"])
        kept = directory and key in before and stat.S_ISDIR(before[key]["mode"])
        fields = {
            "path": bytes.fromhex(key),
            "mode": oct(item["mode"]),
            "owner": (item["uid"], item["gid"]),
            "mtime": None if kept else item["mtime_ns"],
            "size": item["size"] if stat.S_ISREG(item["mode"]) else 0,
            "target": item["target"],
            "sha256": item["sha256"],
            "xattrs": sorted(item["xattrs"].items()),
            "links": sorted(item["links"]),
        }
        result.append(repr(fields))
    return sorted(result)


def mend_links(after: Tree, before: Tree) -> None:
    """Join names of one lower file that the union parted by copying up without a change.

    In a guest nothing parts them; the union does, without an index (overlayfs.rst,
    "Non-standard behavior").
    """
    ignored = {"links", "ino", "ctime_ns"}
    for key, old in before.items():
        same = [
            k
            for k in old["links"]
            if k in after
            and set(after[k]["links"]) <= set(old["links"])
            and all(after[k][f] == before[k][f] for f in old.keys() - ignored)
        ]
        if key in same:
            after[key]["links"] = same


def assert_same(found: list[str], wanted: list[str]) -> None:
    differing = sorted(set(found) ^ set(wanted))
    assert not differing, "\n".join(f"{'<>'[line in wanted]} {line}" for line in differing)


def check_layer(result: Extraction, layer: Path) -> None:
    raw = layer.read_bytes()
    assert (hashlib.sha256(raw).hexdigest(), len(raw)) == (result.layer_sha256, result.layer_size)
    for entry in result.entries:
        if entry.kind is Kind.FILE and not entry.same:
            content = raw[entry.offset : entry.offset + entry.size]
            assert hashlib.sha256(content).hexdigest() == entry.sha256
    paths = [entry.path for entry in result.entries]
    assert paths == sorted(paths, key=lambda path: path.split(b"/"))
    assert len(set(paths)) == len(paths)


def by_path(result: Extraction) -> dict[bytes, Entry]:
    return {entry.path: entry for entry in result.entries}
