"""What the shadow's /proc shows of the guest, as one file: made on the host, read in the sandbox.

The save file is open in the process with the caller's rights; /proc is served in the sandbox.
Between the two lies this file: records of fixed size, each followed by its path and its content.
It is read where nothing is trusted, so that every number is checked against what is there.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import InternalError
from ouassister.text import to_text

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC: Final = b"OUAproc\x01"
_HEADER: Final = struct.Struct("<8sII")
_RECORD: Final = struct.Struct("<IIIHI")  # mode, uid, gid, length of path, length of content
MAX_NODES: Final = 1 << 20
MAX_BYTES: Final = 256 << 20
_PATH_MAX: Final = 4096
_MAX_LEFT_OUT: Final = 4096
_KINDS: Final = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK))


@dataclass(frozen=True, slots=True)
class Node:
    """A file, folder or symbolic link. ``content`` is a link's target; a folder has none."""

    mode: int
    uid: int
    gid: int
    content: bytes = b""


class Tree:
    """The nodes of a snapshot, by path from its root: ``b"1/stat"``.

    Attributes:
        nodes: The nodes; the root is not among them.
        left_out: What was to be shown and is not, and why.
    """

    def __init__(self) -> None:
        self.nodes: dict[bytes, Node] = {}
        self.left_out: list[str] = []
        self._bytes = 0

    def file(
        self, path: bytes, content: bytes, mode: int = 0o444, owner: tuple[int, int] = (0, 0)
    ) -> None:
        """Add a file."""
        self._add(path, Node(stat.S_IFREG | mode, *owner, content))

    def link(
        self, path: bytes, target: bytes, mode: int = 0o777, owner: tuple[int, int] = (0, 0)
    ) -> None:
        """Add a symbolic link."""
        self._add(path, Node(stat.S_IFLNK | mode, *owner, target))

    def folder(self, path: bytes, mode: int = 0o555, owner: tuple[int, int] = (0, 0)) -> None:
        """Add a folder."""
        self._add(path, Node(stat.S_IFDIR | mode, *owner))

    def _add(self, path: bytes, node: Node) -> None:
        size = len(path) + len(node.content) + _RECORD.size
        refusal = _refusal(self.nodes, path, node.mode)
        if len(self.nodes) >= MAX_NODES or self._bytes + size > MAX_BYTES or len(path) > _PATH_MAX:
            refusal = "is more than can be shown"
        if refusal:
            if len(self.left_out) < _MAX_LEFT_OUT:
                self.left_out.append(f"/proc/{to_text(path)} {refusal}")
            return
        self._bytes += size
        self.nodes[path] = node


def write(path: Path, tree: Tree) -> int:
    """Write a tree; return the size."""
    with path.open("xb") as out:
        os.fchmod(out.fileno(), 0o644)  # subordinate ids read it; the folder above is private
        out.write(_HEADER.pack(_MAGIC, len(tree.nodes), 0))
        for name, node in tree.nodes.items():
            out.write(_RECORD.pack(node.mode, node.uid, node.gid, len(name), len(node.content)))
            out.write(name)
            out.write(node.content)
        return out.tell()


def read(path: Path) -> dict[bytes, Node]:
    """Read what `write` wrote.

    Raises:
        InternalError: The file is not one that `write` made.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + _HEADER.size + 1)
    if len(raw) < _HEADER.size or len(raw) > MAX_BYTES + _HEADER.size:
        raise InternalError(f"the snapshot of /proc has {len(raw)} bytes")
    magic, count, reserved = _HEADER.unpack_from(raw)
    if magic != _MAGIC or reserved or count > MAX_NODES:
        raise InternalError("the snapshot of /proc is no such file")
    nodes: dict[bytes, Node] = {}
    at = _HEADER.size
    for _ in range(count):
        if len(raw) - at < _RECORD.size:
            raise InternalError("the snapshot of /proc is cut short")
        mode, uid, gid, name_length, length = _RECORD.unpack_from(raw, at)
        at += _RECORD.size
        name = raw[at : at + name_length]
        at += name_length
        content = raw[at : at + length]
        at += length
        if at > len(raw):
            raise InternalError("the snapshot of /proc is cut short")
        refusal = _refusal(nodes, name, mode)
        if refusal:
            raise InternalError(f"the snapshot of /proc has {name!r}, which {refusal}")
        nodes[name] = Node(mode, uid, gid, content)
    if at != len(raw):
        raise InternalError(f"the snapshot of /proc has {len(raw)} bytes, not {at}")
    return nodes


def _refusal(nodes: dict[bytes, Node], name: bytes, mode: int) -> str:
    """Tell why a node cannot be in a tree; a guest names some of them."""
    above, slash, last = name.rpartition(b"/")
    if last in (b"", b".", b"..") or b"\0" in name:
        return "is no path"
    if name in nodes:
        return "is there twice"
    if stat.S_IFMT(mode) not in _KINDS:
        return f"is of mode {mode:o}"
    if slash and (above not in nodes or not stat.S_ISDIR(nodes[above].mode)):
        return "is in no folder"
    return ""
