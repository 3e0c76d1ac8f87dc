"""What a cached inode says: its times, and whether it waits for write-back.

Source: Linux v6.1 ``include/linux/fs.h`` (``struct inode``, ``I_DIRTY_*``),
``fs/fs-writeback.c``. Times are plain integers since
3aa63a569c64 ("fs: switch timespec64 fields in inode to discrete integers", v6.11), and were
renamed by 13bc24457850 ("fs: rename i_ctime field to __i_ctime", v6.6) and 12cd44023651 ("fs:
rename inode i_atime and i_mtime fields", v6.7).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from drgn import TypeKind, sizeof

from ouassister.kernel.fields import labels

if TYPE_CHECKING:
    from drgn import Object, Type

_SECOND: Final = 1_000_000_000
# The highest bit of i_ctime_nsec says that somebody asked for it (I_CTIME_QUERIED, 4e40eff0b573
# "fs: add infrastructure for multigrain timestamps", v6.13).
_NANOSECONDS: Final = (1 << 31) - 1
_DIRTY_NAMES: Final = ("I_DIRTY_SYNC", "I_DIRTY_DATASYNC", "I_DIRTY_PAGES")


def time_ns(inode: Object, which: str) -> int:
    """Return ``mtime`` or ``ctime`` of a ``struct inode *``."""
    try:
        seconds, nanoseconds = (inode.member_(f"i_{which}_{part}") for part in ("sec", "nsec"))
    except LookupError:
        try:
            time = inode.member_(f"__i_{which}")
        except LookupError:
            time = inode.member_(f"i_{which}")
        seconds, nanoseconds = time.tv_sec, time.tv_nsec
    value: int = seconds.value_() * _SECOND + (nanoseconds.value_() & _NANOSECONDS)
    return value


def awaits_writing(inode: Object) -> bool:
    """Tell whether an inode itself waits for write-back."""
    state = inode.i_state
    if state.type_.kind == TypeKind.STRUCT:
        state = state.member_("__state")
    return bool(state.value_() & _dirty_bits(state.type_))


@functools.lru_cache(maxsize=8)
def _dirty_bits(kind: Type) -> int:
    """Return the three dirty bits of ``i_state``, whose type tells which they are.

    An enumeration names them ("fs: make the i_state flags an enum", v6.18). A 32-bit number has
    them at bits 3 to 5 ("fs: reorder i_state bits", v6.12) or, later, 4 to 6, where the bit that is
    none of the three is unused or says that the inode is being written; a long at 0 to 2.
    """
    if kind.kind == TypeKind.ENUM:
        values = labels(kind)
        return sum(values[name] for name in _DIRTY_NAMES)
    return 0x78 if sizeof(kind) == 4 else 0x07
