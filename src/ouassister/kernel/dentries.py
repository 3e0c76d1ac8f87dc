"""Cached directory entries below a path, and what their inodes say.

Source: Linux v6.1 ``include/linux/dcache.h``, ``fs/dcache.c``. Children are in a hash
list since da549bdd15c2 ("dentry: switch the lists of children to hlist", v6.8).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.kernel import walk
from ouassister.kernel.paths import dentry_name, unhashed
from ouassister.kernel.program import guest_reads
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drgn import Object

    from ouassister.kernel.program import Kernel

_MAX_DEPTH: Final = 64
_MAX_ENTRIES: Final = 1 << 18


def children(kernel: Kernel, dentry: Object) -> Iterator[Object]:
    """Yield the cached children of a ``struct dentry *``."""
    try:
        head = dentry.d_children
    except AttributeError:
        for node in walk.list_nodes(kernel, dentry.d_subdirs.address_of_().value_()):
            yield kernel.container("struct dentry", "d_child", node)
        return
    for node in walk.hlist_nodes(kernel, head.address_of_().value_()):
        yield kernel.container("struct dentry", "d_sib", node)


def below(kernel: Kernel, dentry: Object, path: bytes) -> Iterator[tuple[bytes, Object]]:
    """Yield (path, ``struct dentry``) of a directory and all that is cached below it.

    Mounts on top are not entered. Entries whose file is deleted are left out.

    Raises:
        CorruptGuestError: The tree is too deep or too large, or contains itself.
    """
    with guest_reads(f"walking the cached entries of {to_text(path)}"):
        seen: set[int] = set()
        stack = [(path.rstrip(b"/") or b"/", dentry[0], 0)]
        while stack:
            where, entry, depth = stack.pop()
            if entry.address_ in seen or depth > _MAX_DEPTH or len(seen) > _MAX_ENTRIES:
                raise CorruptGuestError("the dentry cache is too deep, too large, or cyclic")
            seen.add(entry.address_)
            yield where, entry
            for child in children(kernel, entry.address_of_()):
                if unhashed(child):
                    continue
                name = dentry_name(child)
                if b"/" in name or b"\0" in name or name in (b".", b".."):
                    raise CorruptGuestError(f"a directory entry is named {name!r}")
                stack.append((where.rstrip(b"/") + b"/" + name, child, depth + 1))
