"""Swap areas, as /proc/swaps shows them.

Source: Linux v6.1 ``mm/swapfile.c`` (``swap_show``, ``swap_info``, ``nr_swapfiles``),
``include/linux/swap.h`` (``SWP_USED``). ``inuse_pages`` is an atomic number with a flag in its
second highest bit since b228386cf37c ("mm, swap: clean up plist removal and adding", v6.14).
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import SwapArea
from ouassister.kernel.fields import Fields, read_word, variable
from ouassister.kernel.program import guest_reads
from ouassister.model import VirtAddr

if TYPE_CHECKING:
    from ouassister.kernel.file_names import FileNames
    from ouassister.kernel.program import Kernel

_MAX_SWAPFILES: Final = 32
_SWP_USED, _SWP_WRITEOK = 1, 2
_PAGE_SIZE: Final = 4096
_USAGE_MASK: Final = (1 << 62) - 1


def read_swaps(kernel: Kernel, names: FileNames) -> tuple[SwapArea, ...]:
    """Describe each swap area in use.

    Raises:
        CorruptGuestError: There are more than any kernel has.
    """
    with guest_reads("reading the swap areas"):
        raw = kernel.virtual.read(VirtAddr(variable(kernel, "nr_swapfiles")), 4)
        count = int.from_bytes(raw, "little")
        if count > _MAX_SWAPFILES:
            raise CorruptGuestError(f"the guest has {count} swap areas")
        if not count:
            return ()
        common = ("flags", "prio", "pages", "swap_file")
        try:
            fields = Fields(kernel, "struct swap_info_struct", *common, "inuse_pages.counter")
        except (AttributeError, TypeError):
            fields = Fields(kernel, "struct swap_info_struct", *common, "inuse_pages")
        file = Fields(kernel, "struct file", "f_path.mnt", "f_path.dentry", "f_inode")
        inode = Fields(kernel, "struct inode", "i_mode")
        table = variable(kernel, "swap_info")
        found = []
        for index in range(count):
            flags, priority, pages, swap_file, used = fields.read(
                read_word(kernel, table + index * 8)
            )
            if not (flags & _SWP_USED and flags & _SWP_WRITEOK and swap_file):
                continue
            mnt, dentry, node = file.read(swap_file)
            found.append(
                SwapArea(
                    path=names.name(mnt, dentry, node),
                    partition=stat.S_ISBLK(inode.read(node)[0]),
                    size=pages * _PAGE_SIZE,
                    used=(used & _USAGE_MASK) * _PAGE_SIZE,
                    priority=priority,
                )
            )
        return tuple(found)
