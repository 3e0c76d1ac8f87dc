"""List what a sleeping guest has cached of each file: what linux.pagecache.Files lists.

Usage: ``python -m bench.page_cache SAVE``. One line each: device, inode, pages, size, times, path.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ouassister.kernel import open_guest
from ouassister.kernel.cached_inodes import InodeCache
from ouassister.memory import open_save
from ouassister.text import to_text


def main(save_file: Path) -> None:
    """Print the list."""
    with open_save(save_file) as save:
        cache = InodeCache(open_guest(save).kernel)
        for one in cache.file_systems():
            inodes = {inode.address: inode for inode in cache.inodes(one)}
            places = {
                child: (address, name)
                for address, inode in inodes.items()
                if inode.mode & 0o170000 == 0o040000
                for name, child in cache.children(inode)
                if child
            }
            for address, inode in inodes.items():
                parts: list[bytes] = []
                at = address
                while at in places and len(parts) < 256:
                    at, name = places[at]
                    parts.append(name)
                path = to_text(b"/" + b"/".join(reversed(parts)))
                times = (inode.atime_ns, inode.mtime_ns, inode.ctime_ns)
                print(one.label, inode.number, inode.pages, inode.size, *times, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
