"""Write a change set to a medium: the raw disk image that the in-guest applier reads.

The layout is docs/design/0003-applier.md's and guest/medium.h's: header, the applier itself, the
table of entries, the layer. The header holds the hash of each, and its own hash goes to the applier
by another way.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from ouassister.errors import InternalError, TamperedError
from ouassister.model import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ouassister.model import Changeset, Entry, Expected

BLOCK = 4096
PACKAGE_DATABASES = (b"/var/lib/dpkg", b"/var/lib/apt", b"/var/lib/rpm", b"/usr/lib/sysimage/rpm")

_HEADER = struct.Struct("<8sIIQQQ32sQQ32sQQ32s40s40s")
_COUNTS = struct.Struct("<IIIIIIQ")
_TEXT = struct.Struct("<II")
_STATE = struct.Struct("<QQqqII")
_ENTRY = struct.Struct("<8s8sIIBBBBIIIIIqQQQ32s40sIIII")
_XATTR = struct.Struct("<8s8s")
_BELOW = struct.Struct("<8s40s")

_MAGIC = b"OUAMEDIA"
_VERSION = 1
_NONE = 0xFFFFFFFF
_KINDS = {
    Kind.FILE: 1,
    Kind.DIRECTORY: 2,
    Kind.SYMLINK: 3,
    Kind.HARDLINK: 4,
    Kind.FIFO: 5,
    Kind.CHAR: 6,
    Kind.BLOCK: 7,
    Kind.DELETE: 8,
}
_NO_STATE = bytes(_STATE.size)


@dataclass(frozen=True, slots=True)
class MediumInfo:
    """What the host must know to start the applier from a medium.

    ``applier_blocks`` blocks of 4 KiB after the first one hold the applier.
    """

    applier_blocks: int
    header_sha256: str
    size: int


def write_medium(
    changeset: Changeset, layer: Path | None, applier: Path, out: Path, *, attestation: str = ""
) -> MediumInfo:
    """Write a change set, its layer and the applier as one disk image.

    Args:
        changeset: The verified change set.
        layer: Its layer, an uncompressed tar; None leaves a hole there, for a rollback.
        applier: The static program for the guest's architecture.
        out: The image; replaced when it exists.
        attestation: The beginning of what the applier leaves of its work; "" for nothing.

    Returns:
        What starts the applier and binds it to this very image.

    Raises:
        TamperedError: The layer has another size than the change set says.
        InternalError: The change set cannot be put into a table.
    """
    table = compile_table(changeset, attestation)
    program = applier.read_bytes()
    applier_blocks = -(-len(program) // BLOCK)
    table_offset = BLOCK * (1 + applier_blocks)
    layer_offset = _padded(table_offset + len(table))
    size = _padded(layer_offset + changeset.layer_size)
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        BLOCK,
        size,
        BLOCK,
        len(program),
        hashlib.sha256(program).digest(),
        table_offset,
        len(table),
        hashlib.sha256(table).digest(),
        layer_offset,
        changeset.layer_size,
        bytes.fromhex(changeset.changeset_id),
        _identifier(changeset.identity.boot_id),
        _identifier(changeset.identity.machine_id),
    ).ljust(BLOCK, b"\0")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(layer.open("rb")) if layer else None
        image = stack.enter_context(out.open("wb"))
        found = os.fstat(source.fileno()).st_size if source else changeset.layer_size
        if found != changeset.layer_size:
            raise TamperedError(
                f"the layer {layer} has {found} bytes where its change set says "
                f"{changeset.layer_size}"
            )
        image.write(header)
        image.write(program)
        image.seek(table_offset)
        image.write(table)
        image.flush()
        image.truncate(size)
        if source:
            _copy(source, image, layer_offset, changeset.layer_size)
        os.fsync(image.fileno())
    return MediumInfo(applier_blocks, hashlib.sha256(header).hexdigest(), size)


def compile_table(changeset: Changeset, attestation: str = "") -> bytes:
    """Turn entries and locks into the applier's table.

    Parents come before what is in them, and a hard link's target before the link.

    Raises:
        InternalError: An entry names what the change set does not have, or a field is too large.
    """
    try:
        return _Table(changeset, attestation.encode("ascii")).encode()
    except struct.error as error:
        raise InternalError(f"the change set does not fit the medium's table: {error}") from error


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _identifier(text: str) -> bytes:
    raw = text.encode("ascii")
    if len(raw) >= 40:
        raise InternalError(f"the guest's identity {text!r} is longer than any known one")
    return raw


def _copy(source: BinaryIO, image: BinaryIO, offset: int, size: int) -> None:
    """Let the kernel copy; file systems that cannot share blocks copy in the page cache."""
    done = 0
    image.seek(offset)
    while done < size:
        try:
            copied = os.copy_file_range(
                source.fileno(), image.fileno(), size - done, done, offset + done
            )
        except OSError:  # across file systems before Linux 5.19: EXDEV; some have none: EOPNOTSUPP
            os.lseek(image.fileno(), offset + done, os.SEEK_SET)
            copied = os.sendfile(image.fileno(), source.fileno(), done, size - done)
        if copied == 0:
            raise TamperedError(f"the layer ended at byte {done} while it was copied")
        done += copied


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0] or b"/"


def _is_late(path: bytes) -> bool:
    return any(path == base or path.startswith(base + b"/") for base in PACKAGE_DATABASES)


def _ordered(entries: Iterable[Entry]) -> list[Entry]:
    """Sort as a walk of the tree; links after everything that they may name."""
    return sorted(entries, key=lambda e: (e.kind is Kind.HARDLINK, e.path.split(b"/")))


def _state(expected: Expected) -> bytes:
    return _STATE.pack(
        expected.inode, expected.size, expected.mtime_ns, expected.ctime_ns, expected.mode, 0
    )


class _Table:
    """Collects the sections; strings are shared."""

    def __init__(self, changeset: Changeset, attestation: bytes) -> None:
        self._entries = _ordered(changeset.entries)
        self._locks = changeset.lock_paths
        self._dirs = sorted({_parent(entry.path) for entry in self._entries})
        self._index = {entry.path: i for i, entry in enumerate(self._entries)}
        self._attestation = len(attestation)
        self._strings = bytearray(attestation + b"\0" if attestation else b"")
        self._texts: dict[bytes, bytes] = {}
        self._xattrs: list[bytes] = []
        self._below: list[bytes] = []

    def encode(self) -> bytes:
        """All sections, in the order of guest/medium.h."""
        dirs = {path: i for i, path in enumerate(self._dirs)}
        sections: Sequence[list[bytes]] = (
            [self._text(path) for path in self._dirs],
            [self._entry(entry, dirs[_parent(entry.path)]) for entry in self._entries],
            self._xattrs,
            self._below,
            [self._text(path) for path in self._locks],
        )
        counts = _COUNTS.pack(*map(len, sections), self._attestation, len(self._strings))
        return counts + b"".join(map(b"".join, sections)) + self._strings

    def _text(self, text: bytes) -> bytes:
        found = self._texts.get(text)
        if found is None:
            found = self._texts[text] = _TEXT.pack(len(self._strings), len(text))
            self._strings += text + b"\0"
        return found

    def _entry(self, entry: Entry, directory: int) -> bytes:
        first_xattr, first_below = len(self._xattrs), len(self._below)
        self._xattrs += [
            _XATTR.pack(self._text(name.encode("utf-8", "surrogateescape")), self._text(value))
            for name, value in (() if entry.same else entry.xattrs)
        ]
        self._below += [
            _BELOW.pack(self._text(path), _state(state))
            for path, state in sorted(entry.below, key=lambda item: item[0])
        ]
        return _ENTRY.pack(
            self._text(entry.path),
            self._text(entry.target if entry.kind is Kind.SYMLINK else b""),
            directory,
            self._link(entry),
            _KINDS[entry.kind],
            entry.expected is not None,
            _is_late(entry.path),
            entry.same,
            entry.mode,
            entry.uid,
            entry.gid,
            entry.major,
            entry.minor,
            entry.mtime_ns,
            entry.size,
            entry.offset,
            entry.holes,
            bytes.fromhex(entry.sha256),
            _state(entry.expected) if entry.expected else _NO_STATE,
            first_xattr,
            len(self._xattrs) - first_xattr,
            first_below,
            len(self._below) - first_below,
        )

    def _link(self, entry: Entry) -> int:
        """Index of the entry that a hard link names, through other hard links if need be."""
        target = entry
        for _ in range(len(self._entries)):
            if target.kind is not Kind.HARDLINK:
                break
            if target.target not in self._index:
                raise InternalError(
                    f"the hard link {entry.path!r} names {target.target!r}, "
                    "which the change set does not have"
                )
            target = self._entries[self._index[target.target]]
        if target.kind is Kind.HARDLINK:
            raise InternalError(f"the hard link {entry.path!r} leads to no file")
        return _NONE if target is entry else self._index[target.path]
