"""A guest whose power went in the middle of its reflection: its disk afterwards, and what is there.

Everything is judged twice: each path of the change set against what the change set says, and
every other path of the tree against the same disk before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.conftest import need
from tests.host import boot_unit
from tests.host.applier_run import mounted, wait_until_gone
from tests.view import manifest
from tests.vm import writelog
from tests.vm.world import World

from ouassister.changeset import archive
from ouassister.model import Changeset, Kind
from ouassister.provider import sockets
from ouassister.reflect import reflection
from ouassister.reflect.applier_protocol import parse_output
from ouassister.testing import overlay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.model import Entry, Expected
    from ouassister.reflect.applier_protocol import ApplierResult

TOP: Final = Path(__file__).parents[2]
OFFSET: Final = 1 << 20  # of the root partition, `ouassister.testing.build_image`
PACKAGES: Final = ("oua-hello", "oua-library", "oua-extra")
PLAN: Final = b"OUAPLAN1"  # guest/journal.c; what follows are renames
# What the guest's own services write there while it runs is theirs.
_LIVELY: Final = (
    "./var/log",
    "./var/backups",
    "./var/lib/dhcp",
    "./var/lib/systemd",
    "./var/lib/ouassister",
    "./var/tmp",
    "./tmp",
)
_LIVELY_FILES: Final = ("./var/lib", "./etc/resolv.conf", "./var/cache")


@dataclass
class Cut:
    """One update whose resume is cut off, and the disks that this may leave."""

    world: World
    folder: Path
    rng: random.Random
    changeset: Changeset
    medium: reflection.Medium
    log: Path
    before: Path  # the disk as the guest fell asleep
    tree: Mapping[str, manifest.Node] = field(default_factory=dict)

    @classmethod
    def prepare(cls, world: World, folder: Path, seed: int) -> Cut:
        """Update the sleeping guest, and log from now on what it writes."""
        for tool in ("e2fsck", "musl-gcc", "qemu-img"):
            need(tool)
        subprocess.run(["make", "-s", "-C", str(TOP / "tests" / "view")], check=True)
        wish = [word for name in PACKAGES for word in ("--install", name)]
        update = world.run("update", *wish)
        assert update.status == 0, update
        changesets = next(world.home.glob("vms/*/changesets"))
        changeset, layer = archive.load(changesets, update.result["changeset_id"])
        folder.mkdir()
        medium = reflection.make_medium(changeset, layer, folder)
        before = folder / "before.raw"
        (disk,) = world.config.disks
        convert = ["qemu-img", "convert", "-f", disk.format, "-O", "raw", str(disk.path)]
        subprocess.run([*convert, str(before)], check=True)
        log = writelog.with_log(world.toml)
        cut = cls(world, folder, random.Random(seed), changeset, medium, log, before)  # noqa: S311
        with cut.mounted(cut.copy(before, "tree.raw")) as root:
            cut.tree = cut.manifest(root)
        return cut

    def copy(self, disk: Path, name: str) -> Path:
        """A copy to write to."""
        target = self.folder / name
        copy = ["cp", "--sparse=always", "--reflink=auto", str(disk), str(target)]
        subprocess.run(copy, check=True)
        return target

    def resume_until(self, entries: int, words: bytes) -> int:
        """Resume, and kill QEMU when the guest has written so often; returns how often it has.

        It is counted from the write that brings ``words`` to the disk, where there are any.
        """
        process = subprocess.Popen(
            self.world.command("resume"),
            env=self.world.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            end = time.monotonic() + 120
            while (start := writelog.find(self.log, words) if words else 0) is None or (
                writelog.count(self.log) < start + entries
            ):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < end, "the guest writes too little"
                time.sleep(0.001)  # between two looks at the log; bounded above
            with sockets.connect(self.world.config.qmp) as sock:
                os.kill(sockets.peer_pid(sock), signal.SIGKILL)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == 41, output
        return writelog.count(self.log)

    def disk(self, entries: int, name: str) -> Path:
        """The disk as the power cut left it after so many writes."""
        disk = self.copy(self.before, name)
        share = self.rng.random()
        writelog.replay(self.log, entries, disk, lambda: self.rng.random() < share)
        return disk

    @contextlib.contextmanager
    def mounted(self, disk: Path) -> Iterator[Path]:
        """The guest's root on the host; its journal is replayed by that."""
        with mounted(self.folder, "-o", f"loop,offset={OFFSET}", str(disk)) as root:
            yield root
        wait_until_gone(disk)

    def take_up(self, root: Path, *, boot: bool) -> ApplierResult:
        """What the next resume does, or with ``boot`` the guest alone when it boots.

        It is done by the host's processor.
        """
        medium = self.medium
        command = [str(reflection.APPLIER), "apply", str(medium.path), "--medium-sha256"]
        command += [medium.info.header_sha256, "--root", str(root)]
        if boot and boot_unit.starts(root):
            command = boot_unit.command(root)
        done = subprocess.run(command, capture_output=True, check=False, timeout=120)
        return parse_output(done.stdout)

    def boot_from(self, disk: Path) -> None:
        """The VM's disk is this one from now on."""
        writelog.without_log(self.world.toml)
        (own,) = self.world.config.disks
        own.path.unlink()
        overlay(own.path, disk, "raw")

    def flat(self, name: str) -> Path:
        """What the VM's disk holds now, as one file."""
        (disk,) = self.world.config.disks
        target = self.folder / name
        convert = ["qemu-img", "convert", "-U", "-f", disk.format, "-O", "raw", str(disk.path)]
        subprocess.run([*convert, str(target)], check=True)
        return target

    @staticmethod
    def manifest(root: Path) -> dict[str, manifest.Node]:
        """Every path."""
        program = TOP / "build" / "view" / "manifest"
        command = [str(program), str(root), "./none/"]
        return manifest.parse(subprocess.run(command, capture_output=True, check=True).stdout)

    def assert_whole(self, root: Path, *, applied: bool) -> None:
        """The tree is the one before or the one after, and nothing of ours is left in it."""
        wrong = [
            entry.path
            for entry in self.changeset.entries
            if not (is_after(root, entry) if applied else is_before(root, entry))
        ]
        assert not wrong, (applied, wrong)
        tree = self.manifest(root)
        assert not [path for path in tree if "/.ouassister-" in path]
        assert not [path for path in tree if path.startswith("./var/lib/ouassister/journal-")]
        boot_unit.assert_nothing_left(root)
        ours = {os.fsdecode(b"." + entry.path) for entry in self.changeset.entries}
        for entry in self.changeset.entries:
            ours |= {os.fsdecode(b"." + path) for path, _ in entry.below}
        differ = others(self.tree, ours) ^ others(tree, ours)
        assert not differ, sorted(differ)[:8]
        installed = {change.name for change in self.changeset.changes if applied or change.old}
        database = f"--admindir={root}/var/lib/dpkg"
        audit = subprocess.run(["dpkg", database, "--audit"], capture_output=True, check=True)
        assert audit.stdout == b""
        verify = ["dpkg", f"--root={root}", "--verify", *sorted(installed)]
        told = subprocess.run(verify, capture_output=True, check=False)
        assert told.stderr == b""
        # The administrator's, see conftest.py.
        lines = [line for line in told.stdout.splitlines() if b"/etc/oua-hello.conf" not in line]
        assert lines == []

    def assert_clean(self, disk: Path) -> None:
        """The file system is whole; its journal was replayed by a mount."""
        check = ["e2fsck", "-fn", f"{disk}?offset={OFFSET}"]
        done = subprocess.run(check, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def others(tree: Mapping[str, manifest.Node], ours: set[str]) -> set[tuple[str, manifest.Node]]:
    """What is no business of the change set; of directories not the times and sizes."""
    found = set()
    for path, node in tree.items():
        if path in ours or path in _LIVELY_FILES or path.startswith(_LIVELY):
            continue
        if stat.S_ISDIR(int(node.mode, 8)):
            node = node._replace(size="", mtime="", ctime="", links="", digest="")
        found.add((path, node))
    return found


def is_after(root: Path, entry: Entry) -> bool:
    """Whether a path is what the change set makes of it."""
    path = root / os.fsdecode(entry.path[1:])
    try:
        status = path.lstat()
    except FileNotFoundError:
        return entry.kind is Kind.DELETE
    if entry.kind is Kind.SYMLINK:
        return path.is_symlink() and os.fsencode(path.readlink()) == entry.target
    if entry.kind is Kind.HARDLINK:
        return path.samefile(root / os.fsdecode(entry.target[1:]))
    shape = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
    if shape != (entry.mode, entry.uid, entry.gid):
        return False
    if entry.kind is Kind.DIRECTORY:
        return stat.S_ISDIR(status.st_mode)
    return (
        entry.kind is Kind.FILE
        and stat.S_ISREG(status.st_mode)
        and status.st_mtime_ns == entry.mtime_ns
        and hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
    )


def is_before(root: Path, entry: Entry) -> bool:
    """Whether a path, and all that was below it, is what it was when the guest fell asleep."""
    states: list[tuple[bytes, Expected | None]] = [(entry.path, entry.expected), *entry.below]
    return all(_is_as(root / os.fsdecode(path[1:]), expected) for path, expected in states)


def _is_as(path: Path, expected: Expected | None) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return expected is None
    if expected is None or (status.st_ino, status.st_mode) != (expected.inode, expected.mode):
        return False
    if stat.S_ISDIR(status.st_mode):
        return True
    # Its ctime is another once it was renamed and put back.
    return (status.st_size, status.st_mtime_ns) == (expected.size, expected.mtime_ns)
