"""Walk the union's upper tree against the lower one and say of each path what became of it.

Source of the upper tree's marks: Linux, Documentation/filesystems/overlayfs.rst, "whiteouts and
opaque directories" (the text of 6.8 and later, which has the attribute form).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ouassister.changeset.filter import Filter
from ouassister.changeset.node import Node, Owners, Tree, checked_path
from ouassister.errors import InternalError, UnsupportedGuestError
from ouassister.model import Entry, Expected, Kind
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator


ENTRY_LIMIT = 1_000_000  # of all paths named, deleted ones included; a hostile guest stops here

_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
}
# Marks that say nothing about the content: where a copy-up came from, and for inode numbers.
_HARMLESS_MARKS = {"opaque", "origin", "impure", "nlink", "uuid", "whiteout"}
DEVICE_XATTR = "user.ouassister.device"  # ouassister.shadow.syscalls.files


@dataclass(slots=True)
class Found:
    """One path that is in the upper tree, or gone from the lower one."""

    entry: Entry
    link: tuple[int, int] | None  # device and inode, when it has more than one name
    lower_link: tuple[int, int] | None  # the same in the lower tree
    lower_names: int
    changed: bool
    filtered: bool = False


@dataclass(slots=True)
class Walk:
    """One pass over the upper tree; reads, and writes nothing.

    ``guest`` says where in the guest's tree a path of this one stands.
    """

    upper: Tree
    lower: Tree
    filters: Filter
    guest: Callable[[bytes], bytes] = bytes
    owners: Owners = field(default_factory=Owners)
    notes: list[str] = field(default_factory=list)
    devices: Mapping[int, str] = field(default_factory=dict)  # made in the shadow, by inode
    seen: int = 0

    def run(self) -> Iterator[Found]:
        """Yield each path, parents before children, names in the order of their bytes."""
        for tree in (self.upper, self.lower):
            root = tree.look(b"/")
            self.owners.check(tree, b"/", root.status)
            if root.overlay.get("opaque") == b"y":
                raise InternalError("the root of the union layer is marked opaque")
        # Path; whether the lower tree can have it; whether an opaque directory hides that.
        stack = [(path, True, False, gone) for path, gone in self._children(b"/", True, False)]
        while stack:
            path, in_lower, hidden, gone = stack.pop()
            self._count(path)
            below = self.lower.status(path) if in_lower else None
            if gone:
                yield self._deletion(path, below)
                continue
            node = self.upper.look(path)
            if _is_whiteout(node):
                # overlayfs leaves some over names that it created itself.
                if below is not None:
                    yield self._deletion(path, below)
                continue
            self.owners.check(self.upper, path, node.status)
            _refuse_marks(node, path)
            found = self._present(path, node, below)
            if found is not None:
                yield found
            if stat.S_ISDIR(node.status.st_mode):
                merged = below is not None and stat.S_ISDIR(below.st_mode)
                # Nothing below an opaque directory is merged; overlayfs marks its top alone.
                hidden = hidden or node.overlay.get("opaque") == b"y"
                stack += [
                    (child, merged, hidden, gone)
                    for child, gone in self._children(path, merged, hidden)
                ]

    def _children(self, path: bytes, merged: bool, hidden: bool) -> list[tuple[bytes, bool]]:
        """Children, last name first, each with whether it is gone."""
        names = dict.fromkeys(self.upper.names(path), False)
        if merged and hidden:
            for name in self.lower.names(path):
                names.setdefault(name, True)
        ordered = sorted(names.items(), reverse=True)
        return [(checked_path(path, name), gone) for name, gone in ordered]

    def _count(self, path: bytes) -> None:
        self.seen += 1
        if self.seen > ENTRY_LIMIT:
            raise UnsupportedGuestError(
                f"the update touches more than {ENTRY_LIMIT} paths, at {to_text(path)}",
                hint="resume the VM and update it in the ordinary way",
            )

    def _below(self, path: bytes, status: os.stat_result) -> tuple[tuple[bytes, Expected], ...]:
        """Everything that the lower tree has below a path that goes."""
        found: list[tuple[bytes, Expected]] = []
        stack = [path] if stat.S_ISDIR(status.st_mode) else []
        while stack:
            current = stack.pop()
            if current != path:
                self._count(current)
                child = self.lower.status(current)
                if child is None:
                    raise InternalError(f"{to_text(current)} vanished from the lower tree")
                found.append((current, _expected(child)))
                if not stat.S_ISDIR(child.st_mode):
                    continue
            stack += [checked_path(current, n) for n in reversed(self.lower.names(current))]
        return tuple(found)

    def _deletion(self, path: bytes, status: os.stat_result | None) -> Found:
        if status is None:
            raise InternalError(f"{to_text(path)} vanished from the lower tree")
        entry = Entry(path, Kind.DELETE, _expected(status), below=self._below(path, status))
        filtered = self.filters.reason(self.guest(path)) is not None
        return Found(entry, None, _link(status), status.st_nlink, True, filtered)

    def _present(self, path: bytes, node: Node, below: os.stat_result | None) -> Found | None:
        status = node.status
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:  # a socket
            return Found(Entry(path, Kind.FIFO, None), None, None, 1, True, filtered=True)
        expected = None if below is None else _expected(below)
        lower = None
        if below is not None and stat.S_IFMT(below.st_mode) == stat.S_IFMT(status.st_mode):
            lower = self.lower.look(path)
        device = self._device(path, node)
        if device is not None:
            kind = device[0]
        changed = lower is None or device is not None or not self._same(path, node, lower)
        regular = kind is Kind.FILE
        filtered = self.filters.reason(self.guest(path)) is not None
        if device is None and kind in (Kind.CHAR, Kind.BLOCK):
            device = (kind, os.major(status.st_rdev), os.minor(status.st_rdev))
        entry = Entry(
            path,
            kind,
            expected,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_ns=status.st_mtime_ns,
            size=status.st_size if regular else 0,
            target=node.target,
            major=device[1] if device else 0,
            minor=device[2] if device else 0,
            xattrs=tuple(one for one in node.xattrs if one[0] != DEVICE_XATTR),
        )
        if lower is not None and changed and not filtered:
            if device is None:
                entry = self._only_time(entry, node, lower)
            if lower.unreadable:
                self._note(path, f"loses {', '.join(lower.unreadable)}")
        if lower is None and below is not None and stat.S_ISDIR(below.st_mode):
            entry = dataclasses.replace(entry, below=self._below(path, below))
        return Found(
            entry,
            _link(status),
            None if below is None else _link(below),
            1 if below is None else below.st_nlink,
            changed,
            filtered,
        )

    def _device(self, path: bytes, node: Node) -> tuple[Kind, int, int] | None:
        """Which device node a file stands for, if the shadow made it for one."""
        mark = dict(node.xattrs).get(DEVICE_XATTR)
        if mark is None:
            return None
        made = self.devices.get(node.status.st_ino)
        if made is None or made.encode() != mark or not stat.S_ISREG(node.status.st_mode):
            self._note(path, "has a mark of a device node that the shadow did not make")
            return None
        letter, major, minor = made.split()
        return (Kind.CHAR if letter == "c" else Kind.BLOCK), int(major), int(minor)

    def _same(self, path: bytes, node: Node, lower: Node) -> bool:
        """Whether an object stands in the upper tree without a change that travels."""
        if not _alike(node, lower):
            return False
        if stat.S_ISDIR(node.status.st_mode):
            return True
        if node.status.st_mtime_ns != lower.status.st_mtime_ns:
            return False
        if not stat.S_ISREG(node.status.st_mode):
            return node.status.st_rdev == lower.status.st_rdev and node.target == lower.target
        return self._same_content(path, path) is not None

    def _only_time(self, entry: Entry, node: Node, lower: Node) -> Entry:
        """Mark what the guest has but for its time, under one name and with nothing hidden."""
        if (
            not _alike(node, lower)
            or lower.unreadable
            or entry.mtime_ns == lower.status.st_mtime_ns
            or _link(node.status)
            or _link(lower.status)
        ):
            return entry
        if entry.kind is Kind.SYMLINK and node.target == lower.target:
            return dataclasses.replace(entry, same=True)
        if entry.kind is not Kind.FILE:
            return entry
        sha256 = self._same_content(entry.path, entry.path)
        return entry if sha256 is None else dataclasses.replace(entry, sha256=sha256, same=True)

    def _same_content(self, path: bytes, lower: bytes) -> str | None:
        """The SHA-256 of a file that both trees have with the same bytes, else None."""
        digest = hashlib.sha256()
        with (
            os.fdopen(self.upper.open(path), "rb") as ours,
            os.fdopen(self.lower.open(lower), "rb") as theirs,
        ):
            if os.fstat(ours.fileno()).st_size != os.fstat(theirs.fileno()).st_size:
                return None
            while chunk := ours.read(1 << 20):
                if chunk != theirs.read(len(chunk)):
                    return None
                digest.update(chunk)
            return None if theirs.read(1) else digest.hexdigest()

    def _note(self, path: bytes, text: str) -> None:
        self.notes.append(f"{to_text(self.guest(path))} {text}")


def _expected(status: os.stat_result) -> Expected:
    return Expected(
        status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


def _is_whiteout(node: Node) -> bool:
    mode = node.status.st_mode
    if stat.S_ISCHR(mode):
        return node.status.st_rdev == 0
    return stat.S_ISREG(mode) and node.status.st_size == 0 and "whiteout" in node.overlay


def _alike(node: Node, lower: Node) -> bool:
    """Whether mode, owner and attributes agree."""
    ours, theirs = node.status, lower.status
    return (
        ours.st_mode == theirs.st_mode
        and (ours.st_uid, ours.st_gid) == (theirs.st_uid, theirs.st_gid)
        and node.xattrs == lower.xattrs
    )


def _link(status: os.stat_result) -> tuple[int, int] | None:
    linked = status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)
    return (status.st_dev, status.st_ino) if linked else None


def _refuse_marks(node: Node, path: bytes) -> None:
    """Refuse what a union mounted as ours never writes: redirect, metacopy, protattr...

    ``opaque`` may also be "x": the directory holds whiteouts in the attribute form.
    """
    odd = sorted(node.overlay.keys() - _HARMLESS_MARKS)
    if "opaque" in node.overlay and node.overlay["opaque"] not in (b"y", b"x"):
        odd.append("opaque")
    if odd:
        raise UnsupportedGuestError(
            f"overlayfs marked {to_text(path)} with {', '.join(odd)}",
            hint="mount the union with redirect_dir and metacopy off; if it was, report this",
        )
