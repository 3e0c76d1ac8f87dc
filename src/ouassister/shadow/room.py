"""How much of the host's disk programs may still fill: all but a reserve.

Nothing bounds a union layer where the host's file system has no quotas, so it is looked at while
programs run: the less is left, the more often. Whoever wrote at ``_FASTEST`` or slower is stopped
before the reserve is touched.

Source: statvfs(3); statfs(2).
"""

from __future__ import annotations

import os
from typing import Final

_MOST_RESERVE: Final = 512 << 20
_SHARE: Final = 20  # of the disk, at most one in so many parts is the reserve
_FASTEST: Final = 4 << 30  # bytes a second, into the page cache
_SELDOM_S: Final = 1.0
_OFTEN_S: Final = 0.02


class Room:
    """The disks below some folders.

    Args:
        folders: Where programs write.
    """

    def __init__(self, folders: tuple[str, ...]) -> None:
        self._folders = folders

    def left(self) -> tuple[int, str]:
        """Bytes above the reserve where they are fewest, and the folder; 0 without inodes."""
        return min((_left(folder), folder) for folder in self._folders)

    def full(self) -> str | None:
        """The folder whose disk has nothing left but the reserve."""
        left, folder = self.left()
        return folder if left <= 0 else None

    def next_look_s(self) -> float:
        """Seconds until it has to be looked at again."""
        return min(_SELDOM_S, max(_OFTEN_S, self.left()[0] / _FASTEST))


def reserve_bytes(total: int) -> int:
    """What stays free of a disk of this size."""
    return min(_MOST_RESERVE, total // _SHARE)


def _left(folder: str) -> int:
    disk = os.statvfs(folder)
    if disk.f_files and disk.f_favail <= disk.f_files // _SHARE:
        return 0
    return disk.f_bavail * disk.f_frsize - reserve_bytes(disk.f_blocks * disk.f_frsize)
