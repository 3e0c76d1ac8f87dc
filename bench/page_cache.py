"""List what a sleeping guest has cached of each file: what linux.pagecache.Files lists.

Usage: ``python -m bench.page_cache SAVE``. One line each: device, inode, pages, size, times, path.
"""

from __future__ import annotations

import stat
import sys
from pathlib import Path

from ouassister.kernel import open_guest
from ouassister.kernel.cached_inodes import CachedFileSystem, InodeCache
from ouassister.kernel.fields import Fields
from ouassister.kernel.superblocks import addresses
from ouassister.memory import open_save
from ouassister.text import to_text

_MINOR_BITS = 20
_DEEPEST = 256


def main(save_file: Path) -> None:
    """Print the list, of file systems without a disk as well."""
    with open_save(save_file) as save:
        kernel = open_guest(save).kernel
        cache = InodeCache(kernel)
        fields = Fields(kernel, "struct super_block", "s_dev", "s_blocksize")
        for address in addresses(kernel):
            device, size = fields.read(address)
            major, minor = device >> _MINOR_BITS, device & ((1 << _MINOR_BITS) - 1)
            label = f"{major}:{minor}"
            _list(cache, CachedFileSystem(address, "", major, minor, b"", size, 0, label))


def _list(cache: InodeCache, one: CachedFileSystem) -> None:
    inodes = {inode.address: inode for inode in cache.inodes(one)}
    places = {
        child: (address, name)
        for address, inode in inodes.items()
        if stat.S_ISDIR(inode.mode)
        for name, child in cache.children(inode)
        if child
    }
    for address, inode in inodes.items():
        parts: list[bytes] = []
        at = address
        while at in places and len(parts) < _DEEPEST:
            at, name = places[at]
            parts.append(name)
        path = to_text(b"/" + b"/".join(reversed(parts)))
        times = (inode.atime_ns, inode.mtime_ns, inode.ctime_ns)
        print(one.label, inode.number, inode.pages, inode.size, *times, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
