"""Cached directory entries below a path, and what their inodes say.

Source: Linux v6.1 ``include/linux/dcache.h``, ``fs/dcache.c``. Children are in a hash
list since da549bdd15c2 ("dentry: switch the lists of children to hlist", v6.8).
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel import inodes, walk
from ouassister.kernel.paths import dentry_name, unhashed
from ouassister.kernel.program import guest_reads
from ouassister.model import CachedFile
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drgn import Object

    from ouassister.kernel.ext4 import Ext4
    from ouassister.kernel.mounts import Namespace
    from ouassister.kernel.program import Kernel

_MAX_DEPTH: Final = 64
_MAX_ENTRIES: Final = 1 << 18


def lookup(kernel: Kernel, namespace: Namespace, path: bytes) -> Object | None:
    """Return the cached dentry at an absolute path in init's namespace.

    None when some component is not cached, or is cached as absent.

    Raises:
        UnsupportedGuestError: A component is a symbolic link; these are not followed.
    """
    with guest_reads(f"looking {to_text(path)} up in the dentry cache"):
        vfsmount, dentry = namespace.root
        mount = kernel.container("struct mount", "mnt", vfsmount.value_())
        mount, dentry = _cross(namespace, mount, dentry)
        for part in path.split(b"/"):
            if not part:
                continue
            for child in children(kernel, dentry):
                if dentry_name(child) == part and not unhashed(child) and child.d_inode:
                    dentry = child.address_of_()
                    break
            else:
                return None
            if stat.S_ISLNK(dentry.d_inode.i_mode.value_()):
                raise UnsupportedGuestError(
                    f"{to_text(part)} in {to_text(path)} is a symbolic link"
                )
            mount, dentry = _cross(namespace, mount, dentry)
        return dentry


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


def describe(path: bytes, dentry: Object, ext4: Ext4) -> CachedFile:
    """Describe one cached entry.

    Whether it is dirty, `ouassister.kernel.inodes` decides.
    """
    with guest_reads(f"reading the inode of {to_text(path)}"):
        inode = dentry.d_inode.read_()
        if not inode:
            return CachedFile(path=path, inode=0, mode=0, size=0, mtime_ns=0, dirty=False)
        return CachedFile(
            path=path,
            inode=inode.i_ino.value_(),
            mode=inode.i_mode.value_(),
            size=inode.i_size.value_(),
            mtime_ns=inodes.time_ns(inode, "mtime"),
            dirty=inodes.is_dirty(inode, ext4),
        )


def _cross(namespace: Namespace, mount: Object, dentry: Object) -> tuple[Object, Object]:
    """Step onto whatever is mounted on a dentry, however many mounts deep."""
    for _ in range(_MAX_DEPTH):
        upper = namespace.over.get((mount.address_, dentry.value_()))
        if upper is None:
            return mount, dentry
        mount, dentry = upper, upper.mnt.mnt_root.read_()
    raise CorruptGuestError("mounts lie on top of each other without end")
