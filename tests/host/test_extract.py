"""Extraction against the kernel: lower tree + change set == what the union showed.

The oracle is overlayfs itself: the merged tree is described path by path before it is unmounted;
then entries, and the layer read by the standard library's tarfile, are each applied to the
description of the lower tree. For fuse2fs the oracle is the host kernel's own ext4.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ouassister.changeset.extract import Extraction, outcome
from ouassister.errors import (
    InternalError,
    OUassisterError,
    UnsupportedGuestError,
    UsageError,
    WorkDiskFullError,
)
from ouassister.model import Entry, Kind
from tests.conftest import need

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.host

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
        whole = {"work": str(self.work), "source": str(SOURCE), "image": self.image} | request
        return self.space.run([python_for_all(), "-I", str(INSIDE), json.dumps(whole)])

    def build(self, seed: int) -> None:
        (self.work / "lower").mkdir()
        own(self.work / "lower", self.space.base)
        done = self.inside(do="build", seed=seed, root="lower", script=[])
        assert done.returncode == 0

    def build_image(self, seed: int, script: tuple[str, ...] = ()) -> None:
        """Make the lower tree with the kernel's ext4, for fuse2fs to mount."""
        need("fuse2fs")
        image, mounted = self.work / "image", self.work / "kernel"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run([need("mke2fs"), "-q", "-t", "ext4", str(image)], check=True)
        mounted.mkdir()
        mount = ["mount", "-o", "loop", str(image), str(mounted)]
        if subprocess.run(mount, check=False).returncode != 0:
            pytest.skip("no loop device to mount ext4 from")
        request = {
            "do": "build",
            "work": str(self.work),
            "root": "kernel",
            "seed": seed,
            "script": script,
        }
        try:
            subprocess.run([sys.executable, "-I", str(INSIDE), json.dumps(request)], check=True)
        finally:
            subprocess.run(["umount", str(mounted)], check=True)
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
            output=self.output,
        )
        try:
            result = outcome(done.stdout, self.work / self.output / "record.json")
        except OUassisterError as error:
            assert done.returncode == error.exit_status
            raise
        assert done.returncode == 0
        return result

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
    pytest.skip("no Python >= 3.11 that everybody may start")


@pytest.fixture
def rig() -> Iterator[Rig]:
    if os.geteuid() != 0:
        pytest.skip("writes the maps of a user namespace: needs root")
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
        shutil.rmtree(work)


@pytest.fixture
def small(rig: Rig) -> Rig:
    """A lower tree of a few files, for tests of one thing each."""
    lower = rig.work / "lower"
    (lower / "etc" / "sub").mkdir(parents=True)
    for name in ("etc/conf", "etc/sub/one", "etc/sub/two", "tool"):
        (lower / name).write_text(name)
    os.link(lower / "tool", lower / "tool-alias")
    for path in [lower, *lower.rglob("*")]:
        own(path, SHIFTED)
    return rig


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


def apply_layer(before: Tree, layer: Path) -> Tree:
    """The same by the OCI rules, from the tar alone."""
    tree = {key: dict(item) for key, item in before.items()}
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


def lines(tree: Tree, before: Tree, *, whole_seconds: bool = False) -> list[str]:
    """One line a path of what must be equal.

    The time of a directory that the guest had is left out: applying the change set, like a live
    update, gives it a new one.
    """
    result = []
    for key, item in tree.items():
        directory = stat.S_ISDIR(item["mode"])
        kept = directory and key in before and stat.S_ISDIR(before[key]["mode"])
        mtime = item["mtime_ns"] // (10**9 if whole_seconds else 1)
        fields = {
            "path": bytes.fromhex(key),
            "mode": oct(item["mode"]),
            "owner": (item["uid"], item["gid"]),
            "mtime": None if kept else mtime,
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


@pytest.mark.parametrize("seed", range(8))
def test_extract_random_operations_equals_merged_view(rig: Rig, seed: int) -> None:
    rig.build(seed)
    result = rig.update(seed=seed, operations=60)
    before, after = rig.seen("before"), rig.seen("after")
    mend_links(after, before)
    wanted = lines(after, before)
    assert_same(lines(apply_entries(before, result.entries), before), wanted)
    assert_same(lines(apply_layer(before, rig.work / "layer.tar"), before), wanted)
    check_layer(result, rig.work / "layer.tar")
    for entry in result.entries:
        for path, expected in [(entry.path, entry.expected), *entry.below]:
            if expected is not None:
                item = before[path.hex()]
                assert expected.inode == item["ino"]
                assert (expected.mtime_ns, expected.ctime_ns) == (
                    item["mtime_ns"],
                    item["ctime_ns"],
                )


def check_layer(result: Extraction, layer: Path) -> None:
    raw = layer.read_bytes()
    assert (hashlib.sha256(raw).hexdigest(), len(raw)) == (result.layer_sha256, result.layer_size)
    for entry in result.entries:
        if entry.kind is Kind.FILE:
            content = raw[entry.offset : entry.offset + entry.size]
            assert hashlib.sha256(content).hexdigest() == entry.sha256
    paths = [entry.path for entry in result.entries]
    assert paths == sorted(paths, key=lambda path: path.split(b"/"))
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("seed", range(4))
def test_extract_over_fuse2fs_equals_merged_view_and_kernels_own_stat(rig: Rig, seed: int) -> None:
    rig.build_image(seed)
    result = rig.update(seed=seed, operations=60)
    truth, after = rig.seen("built"), rig.seen("after")
    mend_links(after, rig.seen("before"))
    check_layer(result, rig.work / "layer.tar")
    wanted = lines(after, truth, whole_seconds=True)
    found = apply_entries(truth, result.entries)
    assert_same(lines(found, truth, whole_seconds=True), wanted)
    for entry in result.entries:
        for path, expected in [(entry.path, entry.expected), *entry.below]:
            if expected is not None:
                item = truth[path.hex()]
                fields = ("ino", "mode", "size", "mtime_ns", "ctime_ns")
                assert dataclasses.astuple(expected) == tuple(item[f] for f in fields)
        # Lower files have random times: the same second means that nobody set another.
        if entry.expected and not stat.S_ISDIR(entry.expected.mode):
            seconds = (entry.mtime_ns // 10**9, entry.expected.mtime_ns // 10**9)
            assert seconds[0] != seconds[1] or entry.mtime_ns == entry.expected.mtime_ns
