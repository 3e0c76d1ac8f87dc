"""A tree of files as one file: made on the host's side from memory, read in the sandbox.

Each record is of fixed size, followed by its name and its content. A folder comes before what is
in it. It is read where nothing is trusted, so that every number is checked against what is there.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from ouassister.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MAGIC: Final = b"OUAtree\x01"
_HEADER: Final = struct.Struct("<8sII")  # magic, records, zero
# parent, mode, uid, gid, links, number, size, device, mtime, lengths of name and content
_RECORD: Final = struct.Struct("<IIIIIQqQqHI")
_NOTHING: Final = 0xFFFF_FFFF  # for the length of a content that is not known
MAX_NODES: Final = 1 << 18
MAX_BYTES: Final = 64 << 20
MAX_NAME: Final = 255
KINDS: Final = frozenset(
    (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO,
     stat.S_IFSOCK)
)  # fmt: skip


class Node(NamedTuple):
    """One file.

    Attributes:
        parent: Index of its folder; the root's is its own.
        name: Its name there; the root's is empty.
        mode: Type and permissions.
        uid: Owner.
        gid: Group.
        links: Number of links.
        number: Number of the inode; 0 leaves it to who serves.
        size: What stat(2) says.
        device: Number of a device (``dev_t`` of user space).
        mtime_ns: Time of the last change.
        content: Target of a link, bytes of a file; None where memory does not tell.
    """

    parent: int
    name: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    links: int = 1
    number: int = 0
    size: int = 0
    device: int = 0
    mtime_ns: int = 0
    content: bytes | None = None


def encode(nodes: Sequence[Node]) -> bytes:
    """Return a tree as what `read` reads from a file.

    Raises:
        ValueError: It is no tree that could be served; a guest names most of it.
    """
    parts = [_HEADER.pack(_MAGIC, len(nodes), 0)]
    for node in nodes:
        content = node.content
        length = _NOTHING if content is None else len(content)
        try:
            parts.append(_RECORD.pack(node.parent, *node[2:10], len(node.name), length))
        except struct.error as error:
            raise ValueError(f"a file that does not fit a record: {error}") from error
        parts.append(node.name)
        parts.append(content or b"")
    raw = b"".join(parts)
    decode(raw)
    return raw


def write(path: Path, raw: bytes) -> None:
    """Write what `encode` made."""
    with path.open("xb") as out:
        os.fchmod(out.fileno(), 0o644)  # subordinate ids read it; a folder above is private
        out.write(raw)


def read(path: Path) -> list[Node]:
    """Read what `write` wrote.

    Raises:
        InternalError: The file is not one that `encode` made.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    try:
        return decode(raw)
    except ValueError as error:
        raise InternalError(f"what was handed over of {path.name}: {error}") from error


def decode(raw: bytes) -> list[Node]:
    """Return the tree that `encode` made.

    Raises:
        ValueError: It is none.
    """
    if not _HEADER.size <= len(raw) <= MAX_BYTES:
        raise ValueError(f"a tree of files has {len(raw)} bytes")
    magic, count, reserved = _HEADER.unpack_from(raw)
    if magic != _MAGIC or reserved or not 0 < count <= MAX_NODES:
        raise ValueError("a tree of files is no such file")
    nodes: list[Node] = []
    taken: set[tuple[int, bytes]] = set()
    at = _HEADER.size
    for index in range(count):
        if len(raw) - at < _RECORD.size:
            raise ValueError("a tree of files is cut short")
        parent, *attributes, name_length, length = _RECORD.unpack_from(raw, at)
        at += _RECORD.size
        name = raw[at : at + name_length]
        at += name_length
        content = None if length == _NOTHING else raw[at : at + length]
        at += 0 if length == _NOTHING else length
        if at > len(raw):
            raise ValueError("a tree of files is cut short")
        node = Node._make((parent, name, *attributes, content))
        wrong = _wrong(nodes, index, node) or ("is there twice" if (parent, name) in taken else "")
        if wrong:
            raise ValueError(f"a tree of files has {name!r}, which {wrong}")
        taken.add((parent, name))
        nodes.append(node)
    if at != len(raw):
        raise ValueError(f"a tree of files has {len(raw)} bytes, not {at}")
    return nodes


def _wrong(nodes: list[Node], index: int, node: Node) -> str:
    """Tell why a node cannot stand where it does; a guest names most of them."""
    if stat.S_IFMT(node.mode) not in KINDS or node.mode > 0o177777:
        return f"is of mode {node.mode:o}"
    if node.size < 0:
        return f"has {node.size} bytes"
    if stat.S_ISLNK(node.mode) and not node.content:
        return "leads nowhere"
    if index == 0:
        return "" if stat.S_ISDIR(node.mode) and not node.parent else "is no root"
    if not 0 < len(node.name) <= MAX_NAME or node.name in (b".", b".."):
        return "is no name"
    if b"/" in node.name or b"\0" in node.name or b"\0" in (_target(node) or b""):
        return "is no name"
    if node.parent >= index or not stat.S_ISDIR(nodes[node.parent].mode):
        return "is in no folder"
    return ""


def _target(node: Node) -> bytes | None:
    return node.content if stat.S_ISLNK(node.mode) else None
