"""The files of a file system that the kernel has cached by name, and what it knows of each.

Source: Linux v6.1 ``include/linux/fs.h`` (``struct super_block``), ``include/linux/dcache.h``
(negative dentries); ``fs/btrfs/inode.c`` (``new_simple_dir``).
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from ouassister.errors import CorruptGuestError
from ouassister.kernel.cached_inodes import CachedFileSystem, CachedInode, InodeCache
from ouassister.kernel.fields import Fields
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel

_MAX_NAMES: Final = 1 << 18  # more are not needed to tell one file system from another
_MAX_PATH: Final = 4095  # PATH_MAX, without its NUL
_STAND_IN: Final = 2  # of btrfs: a folder in the place of a subvolume that a snapshot leaves out


class CachedName(NamedTuple):
    """A path from the root of the file system; ``number`` is 0 where the kernel knows of no file.

    Times are nanoseconds since the epoch.
    """

    path: bytes
    number: int
    mode: int = 0
    uid: int = 0
    gid: int = 0
    links: int = 0
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0


def collect(kernel: Kernel, one: CachedFileSystem) -> list[CachedName]:
    """List names, parents before children; of very many only some.

    Raises:
        CorruptGuestError: Memory contradicts itself.
    """
    with guest_reads(f"reading the cached names of {one.label}"):
        cache = InodeCache(kernel)
        inodes = {inode.address: inode for inode in cache.inodes(one)}
        (dentry,) = Fields(kernel, "struct super_block", "s_root").read(one.address)
        (root,) = Fields(kernel, "struct dentry", "d_inode").read(dentry)
        if root not in inodes:
            raise CorruptGuestError(f"the root of {one.label} is none of its inodes")
        found = [_known(b"/", inodes[root])]
        directories = [(b"/", inodes[root])]
        seen = {root}
        while directories and len(found) < _MAX_NAMES:
            above, directory = directories.pop()
            for name, address in cache.children(directory):
                path = above.rstrip(b"/") + b"/" + name
                if len(path) > _MAX_PATH:
                    continue
                if not address:
                    found.append(CachedName(path, 0))
                    continue
                inode = inodes.get(address)
                if inode is None or (one.fstype == "btrfs" and inode.number == _STAND_IN):
                    continue  # just being made or torn down
                found.append(_known(path, inode))
                if stat.S_ISDIR(inode.mode):
                    if address in seen:
                        raise CorruptGuestError(f"directory {inode.number} is in two places")
                    seen.add(address)
                    directories.append((path, inode))
    return found


def _known(path: bytes, inode: CachedInode) -> CachedName:
    return CachedName(
        path, inode.number, inode.mode, inode.uid, inode.gid, inode.links, inode.size,
        inode.mtime_ns, inode.ctime_ns,
    )  # fmt: skip
