"""What ``manifest`` printed, and how two of them differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# linux/fs.h, FS_*_FL that a user sets: secrm unrm compr sync immutable append nodump noatime
# journal-data notail dirsync topdir. How an inode keeps its data (extents, index, inline) is not
# its content, and the kernel changes it at write-back.
_FLAGS: Final = 0x0003_C0FF
_MOST: Final = 20


class Node(NamedTuple):
    """One path, every column as it was printed."""

    mode: str
    uid: str
    gid: str
    size: str
    mtime: str
    ctime: str
    links: str
    inode: str
    device: str
    flags: str
    target: str
    xattrs: str
    digest: str


def parse(raw: bytes) -> dict[str, Node]:
    """Read the lines of the program; ``flags`` keeps what a user can set."""
    nodes = {}
    for line in raw.decode("ascii").splitlines():
        path, *columns = line.split("\t")
        node = Node(*columns)
        nodes[path] = node._replace(flags=f"{int(node.flags, 16) & _FLAGS:x}")
    return nodes


def differences(live: Mapping[str, Node], view: Mapping[str, Node]) -> list[str]:
    """One line for each column of a path in which the view is not what the guest says."""
    lines = []
    for path in sorted(live.keys() | view.keys()):
        one, other = live.get(path), view.get(path)
        if one is None:
            lines.append(f"{path}: in the view alone")
        elif other is None:
            lines.append(f"{path}: missing in the view")
        else:
            lines += [
                f"{path}: {name} is {short(theirs)} in the view, {short(ours)} in the guest"
                for name, ours, theirs in zip(Node._fields, one, other, strict=True)
                if ours != theirs
            ]
    return lines


def report(lines: Iterable[str]) -> str:
    """The first of them, to read."""
    every = list(lines)
    more = [f"... and {len(every) - _MOST} more"] if len(every) > _MOST else []
    return "\n".join([f"{len(every)} differences", *every[:_MOST], *more])


def short(value: str) -> str:
    """A value that fits a line."""
    return value if len(value) <= 80 else f"{value[:60]}...({len(value)})"
