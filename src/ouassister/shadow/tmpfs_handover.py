"""What the guest has in tmpfs, as files: the way from the save file to the sandbox.

One file for each tmpfs: a header, then one record for each node, each with what belongs to it. A
directory comes before what is in it, and right before or after what is next to it, so that the
tree can be made in one pass. A list says where each of them stands. All of it is read where
nothing is trusted: every name, number and length is checked.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

from ouassister import codec
from ouassister.disk.layout import visible
from ouassister.errors import InternalError
from ouassister.shadow import sandbox
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ouassister.model import GuestView, Mount, TmpfsContent, TmpfsNode

_MAGIC: Final = b"OUAtmpf\x01"
_HEADER: Final = struct.Struct("<QQI")
_NODE: Final = struct.Struct("<IIIIIIQqqHHHI")
_XATTR: Final = struct.Struct("<HI")
_RUN: Final = struct.Struct("<QI")
_NO_NODE: Final = 0xFFFF_FFFF
_PLACES: Final = "places"
_IN_MEMORY: Final = frozenset(("tmpfs", "ramfs"))
_SHARED: Final = b"/dev/shm"
_OWN: Final = sandbox.OWN_FOLDER.removeprefix(b"/run")
_MAX_PLACES: Final = 1024
_MAX_POINTS: Final = 4096
_MAX_DEPTH: Final = 64
_MAX_NAME: Final = 255
_MAX_NOTES: Final = 20  # of one tmpfs
_SHARE: Final = 8  # of what the work disk has left, one part


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tmpfs, or the part of it below ``root``, stands in the guest's tree."""

    number: int
    root: bytes
    target: bytes
    read_only: bool
    noexec: bool


class Record(NamedTuple):
    """A node of a tmpfs. ``parent`` counts records; the first one is the root.

    ``same`` is the record of which it is a further name.
    """

    parent: int
    same: int | None
    mode: int
    uid: int
    gid: int
    device: int
    size: int
    atime_ns: int
    mtime_ns: int
    name: bytes
    target: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    runs: tuple[tuple[int, bytes], ...]


def write(folder: Path, view: GuestView, free_bytes: int) -> tuple[str, ...]:
    """Write what is in each tmpfs that programs of the guest can see.

    Args:
        folder: An existing folder of ours.
        view: With the content of tmpfs.
        free_bytes: What the work disk has left; a part of it may be used.

    Returns:
        What is not in the hand-over and why, for the user.
    """
    if view.tmpfs_content is None:
        reason = next((one for one in view.degraded if one.startswith("tmpfs content")), "")
        return (f"what is in tmpfs cannot be read, so that each is empty: {reason}",)
    contents = {(one.tmpfs.major, one.tmpfs.minor): one for one in view.tmpfs_content}
    numbers: dict[tuple[int, int], int] = {}
    places: list[Place] = []
    notes: list[str] = []
    mounts = visible(view.mounts)
    for mount in mounts:
        key = (mount.major, mount.minor)
        if mount.fstype not in _IN_MEMORY or key not in contents or _is_ours(mount.target):
            continue
        if len(places) == _MAX_PLACES:
            notes.append(f"of tmpfs, the first {_MAX_PLACES} mounts are in the view")
            break
        number = numbers.setdefault(key, len(numbers))
        noexec = mount.number in contents[key].noexec
        places.append(Place(number, mount.root, mount.target, mount.read_only, noexec))
    chosen = [contents[key] for key in numbers]
    dropped = _too_much(chosen, free_bytes // _SHARE)
    for number, content in enumerate(chosen):
        points = _mount_points(
            mounts[:_MAX_POINTS], [one for one in places if one.number == number]
        )
        left_out = [
            *content.left_out,
            *((path, "the work disk has no room for it") for path in sorted(dropped[number])),
            *_odd(content),
        ]
        notes += _notes(content.tmpfs.target, left_out)
        missing = frozenset(path for path, _ in left_out)
        runs = [one for one in places if one.number == number and one.target == b"/run"]
        own = {place.root.rstrip(b"/") + _OWN for place in runs}
        if any(node.path in own for node in content.tmpfs.nodes):
            notes.append(f"{to_text(sandbox.OWN_FOLDER)} of the guest is hidden by one of ours")
        with (folder / str(number)).open("xb") as out:
            os.fchmod(out.fileno(), 0o644)  # subordinate ids read it; the folder above is private
            _write_one(out, content, missing, points)
    with (folder / _PLACES).open("x") as listed:
        os.fchmod(listed.fileno(), 0o644)
        json.dump(codec.to_value(tuple(places)), listed)
    return tuple(notes)


def read_places(folder: Path) -> tuple[Place, ...] | None:
    """Read where what was written stands; None where nothing was handed over."""
    try:
        text = (folder / _PLACES).read_text()
    except FileNotFoundError:
        return None
    return codec.from_value(tuple[Place, ...], json.loads(text))


def forget(folder: Path) -> None:
    """Remove the contents: what was in memory alone has no business on a disk for long."""
    for path in folder.iterdir():
        if path.name != _PLACES:
            path.unlink()


def _is_ours(target: bytes) -> bool:
    """Whether the shadow has a file system of its own there (`ouassister.shadow.mounts`)."""
    shared = target == _SHARED or target.startswith(_SHARED + b"/")
    return not shared and any(
        target == own or target.startswith(own + b"/") for own in (b"/dev", b"/proc", b"/sys")
    )


def _odd(content: TmpfsContent) -> Iterator[tuple[bytes, str]]:
    known = {file.path for file in content.files}
    known.update(path for path, _ in (*content.hard_links, *content.left_out))
    for node in content.tmpfs.nodes:
        if stat.S_ISREG(node.mode) and node.path not in known:
            yield node.path, "its content is not known"
        if not 0 <= node.size < 1 << 63:
            yield node.path, f"it has {node.size} bytes"
        elif len(node.path.rpartition(b"/")[2]) > _MAX_NAME:
            yield node.path, "its name is too long"


def _too_much(contents: Sequence[TmpfsContent], room: int) -> list[set[bytes]]:
    """Say which files are left out, the largest first, so that the rest needs no more room."""
    found = [
        (sum(len(data) for _, data in file.runs), number, file.path)
        for number, content in enumerate(contents)
        for file in content.files
    ]
    dropped: list[set[bytes]] = [set() for _ in contents]
    for size, number, path in sorted(found):
        room -= size
        if room < 0:
            dropped[number].add(path)
    return dropped


def _notes(target: bytes, left_out: Iterable[tuple[bytes, str]]) -> list[str]:
    where = target.rstrip(b"/")
    notes = [
        f"{to_text(where + path)} is not in the view: {why}"
        if path
        else f"{to_text(target)} is not wholly in the view: {why}"
        for path, why in left_out
    ]
    more = len(notes) - _MAX_NOTES
    return notes if more <= 0 else [*notes[:_MAX_NOTES], f"and {more} more of {to_text(target)}"]


def _mount_points(mounts: Iterable[Mount], places: Iterable[Place]) -> set[bytes]:
    """Folders of a tmpfs that something is mounted on: they have to be there in any case."""
    points: set[bytes] = set()
    targets = [sandbox.OWN_FOLDER, *(mount.target for mount in mounts)]
    for place in places:
        below = place.target.rstrip(b"/") + b"/"
        for target in targets:
            if target.startswith(below):
                path = place.root.rstrip(b"/") + b"/" + target[len(below) :]
                parts = path.split(b"/")
                if len(parts) > _MAX_DEPTH:
                    continue  # each level is a directory that is open while the tree is made
                points.update(b"/".join(parts[:end]) for end in range(2, len(parts) + 1))
    return points


def _write_one(
    out: BinaryIO, content: TmpfsContent, missing: frozenset[bytes], points: set[bytes]
) -> None:
    nodes = {node.path: node for node in content.tmpfs.nodes if node.path not in missing}
    runs_of = {file.path: file.runs for file in content.files}
    first = dict(content.hard_links)
    numbers: dict[bytes, int] = {}
    records: list[tuple[bytes, TmpfsNode | None]] = []
    folders: set[bytes] = set()
    files: set[bytes] = set()
    for path in sorted({b"/", *nodes, *points}, key=lambda path: path.split(b"/")):
        node = nodes.get(path)
        folder = node is not None and stat.S_ISDIR(node.mode)
        if path == b"/" or path in points:
            node, folder = node if folder else None, True
        elif _parent(path) not in folders or (path in first and first[path] not in files):
            continue
        (folders if folder else files).add(path)
        numbers[path] = len(records)
        records.append((path, node))
    out.write(_MAGIC + _HEADER.pack(content.size_bytes, content.inodes, len(records)))
    for path, node in records:
        parent = numbers[_parent(path)] if path != b"/" else _NO_NODE
        name = path.rpartition(b"/")[2]
        if node is None:  # it could not be read, and something is mounted on it
            mode = stat.S_IFDIR | 0o755
            out.write(_NODE.pack(parent, _NO_NODE, mode, *[0] * 6, len(name), 0, 0, 0) + name)
            continue
        same = numbers[first[path]] if path in first else _NO_NODE
        target, runs = node.target or b"", runs_of.get(path, ())
        out.write(
            _NODE.pack(parent, same, node.mode, node.uid, node.gid,
                       os.makedev(node.major, node.minor), node.size,
                       _time(node.atime_ns), _time(node.mtime_ns),
                       len(name), len(target), len(node.xattrs), len(runs))
            + name + target
        )  # fmt: skip
        for key, value in node.xattrs:
            out.write(_XATTR.pack(len(key), len(value)) + key + value)
        for position, data in runs:
            out.write(_RUN.pack(position, len(data)))
            out.write(data)


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0] or b"/"


def _time(nanoseconds: int) -> int:
    """The nearest time that a 64-bit number of nanoseconds can tell."""
    return max(-(1 << 63), min((1 << 63) - 1, nanoseconds))


class TmpfsHandOver:
    """An opened hand-over of one tmpfs.

    Attributes:
        size_bytes: Its limit; 0 for none.
        inodes: Its limit; 0 for none.
        count: Number of records.

    Raises:
        InternalError: The file is not one that `write` made.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        try:
            if self._bytes(len(_MAGIC)) != _MAGIC:
                raise InternalError("the hand-over of a tmpfs is no such file")
            self.size_bytes, self.inodes, self.count = self._take(_HEADER)
        except BaseException:
            self._file.close()
            raise

    def records(self) -> Iterator[Record]:
        """Yield each node; once.

        Raises:
            InternalError: A record is not one that `write` made.
        """
        for number in range(self.count):
            (parent, same, mode, uid, gid, device, size, atime, mtime, name_size, target_size,
             xattrs, runs) = self._take(_NODE)  # fmt: skip
            name, target = self._bytes(name_size), self._bytes(target_size)
            odd = name in (b".", b"..") or b"/" in name or b"\0" in name or len(name) > _MAX_NAME
            if odd or bool(name) != bool(number) or (parent == _NO_NODE) != (number == 0):
                raise InternalError(f"the hand-over of a tmpfs has a file named {to_text(name)}")
            if (number and parent >= number) or (same != _NO_NODE and same >= number):
                raise InternalError("the hand-over of a tmpfs is not in order")
            yield Record(
                parent, None if same == _NO_NODE else same, mode, uid, gid, device, size, atime,
                mtime, name, target, tuple(self._xattr() for _ in range(xattrs)),
                tuple(self._run(size) for _ in range(runs)),
            )  # fmt: skip
        if self._file.read(1):
            raise InternalError("the hand-over of a tmpfs is too long")

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def _xattr(self) -> tuple[bytes, bytes]:
        name, value = self._take(_XATTR)
        return self._bytes(name), self._bytes(value)

    def _run(self, size: int) -> tuple[int, bytes]:
        position, length = self._take(_RUN)
        if position + length > size:
            raise InternalError("the hand-over of a tmpfs has bytes behind the end of a file")
        return position, self._bytes(length)

    def _take(self, what: struct.Struct) -> tuple[int, ...]:
        return what.unpack(self._bytes(what.size))

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise InternalError("the hand-over of a tmpfs is cut short")
        return data
