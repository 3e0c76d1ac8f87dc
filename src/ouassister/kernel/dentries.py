"""Cached directory entries below a path, and what their inodes say.

Source: Linux v6.1 ``include/linux/dcache.h``, ``include/linux/fs.h``, ``fs/dcache.c``. What
moved: children are in a hash list since da549bdd15c2 ("dentry: switch the lists of children to
hlist", v6.8); the times are plain integers since 3aa63a569c64 ("fs: switch timespec64 fields in
inode to discrete integers", v6.11) and were renamed by 12cd44023651 ("fs: rename inode i_atime
and i_mtime fields", v6.7).
"""

from __future__ import annotations

import functools
import stat
from typing import TYPE_CHECKING, Final

from drgn import TypeKind

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel import walk
from ouassister.kernel.paths import dentry_name, unhashed
from ouassister.kernel.program import guest_reads
from ouassister.model import CachedFile
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drgn import Object, Type

    from ouassister.kernel.ext4 import Ext4
    from ouassister.kernel.mounts import Namespace
    from ouassister.kernel.program import Kernel

_MAX_DEPTH: Final = 64
_MAX_ENTRIES: Final = 1 << 18
_SECOND: Final = 1_000_000_000
# Page cache marks lie above the array's own flags (XA_FLAGS_ACCOUNT is the highest, bit 5).
# Where exactly depends on __GFP_BITS_SHIFT, which differs between kernels and configurations;
# any mark at all means dirty, under write-back, or on the way there (include/linux/xarray.h).
_XA_MARKS_SHIFT: Final = 6
_DIRTY_NAMES: Final = ("I_DIRTY_SYNC", "I_DIRTY_DATASYNC", "I_DIRTY_PAGES")


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

    It is dirty when pages of it wait for write-back, or when its last change is not committed to
    the journal; on a file system other than ext4, when the inode waits for write-back.
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
            mtime_ns=_mtime(inode),
            dirty=_dirty(inode, ext4),
        )


def _cross(namespace: Namespace, mount: Object, dentry: Object) -> tuple[Object, Object]:
    """Step onto whatever is mounted on a dentry, however many mounts deep."""
    for _ in range(_MAX_DEPTH):
        upper = namespace.over.get((mount.address_, dentry.value_()))
        if upper is None:
            return mount, dentry
        mount, dentry = upper, upper.mnt.mnt_root.read_()
    raise CorruptGuestError("mounts lie on top of each other without end")


def _mtime(inode: Object) -> int:
    try:
        seconds, nanoseconds = inode.i_mtime_sec, inode.i_mtime_nsec
    except AttributeError:
        try:
            time = inode.member_("__i_mtime")
        except LookupError:
            time = inode.i_mtime
        seconds, nanoseconds = time.tv_sec, time.tv_nsec
    value: int = seconds.value_() * _SECOND + nanoseconds.value_()
    return value


def _dirty(inode: Object, ext4: Ext4) -> bool:
    if inode.i_mapping.i_pages.xa_flags.value_() >> _XA_MARKS_SHIFT:
        return True
    committed = ext4.committed(inode)
    if committed is not None:
        return not committed
    state = inode.i_state
    if state.type_.kind == TypeKind.STRUCT:
        state = state.member_("__state")
    return bool(state.value_() & _dirty_bits(state.type_))


@functools.lru_cache(maxsize=8)
def _dirty_bits(kind: Type) -> int:
    """Return the three dirty bits of ``i_state``, whose type tells which they are.

    An enumeration names them ("fs: provide accessors for ->i_state", v6.19, and before). A
    32-bit number has them at bits 4 to 6 ("fs: reorder i_state bits", v6.12), a long at 0 to 2.
    """
    if kind.kind == TypeKind.ENUM:
        values = {one.name: one.value for one in kind.enumerators or ()}
        return sum(values[name] for name in _DIRTY_NAMES)
    return 0x70 if kind.size == 4 else 0x07
