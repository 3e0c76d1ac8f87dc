"""Has ext4 committed an inode's last change to its journal?

On ext4 the dirty bits of ``i_state`` say little: a change of a directory never sets them, while a
mere access time keeps them set for half a minute after it is safe in the journal. The file
system's own answer is a pair of transaction numbers: the last one that touched the inode, and
the last one that was committed.

Source: Linux v6.1 ``fs/ext4/ext4_jbd2.h`` (``ext4_update_inode_fsync_trans``),
``fs/ext4/fsync.c`` (``ext4_fsync_journal``), ``include/linux/jbd2.h`` (``tid_gt``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from drgn import Object, offsetof

from ouassister.errors import UnsupportedGuestError
from ouassister.kernel.modules import module_types, struct
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from drgn import Type

    from ouassister.kernel.btf_types import BtfTypes
    from ouassister.kernel.program import Kernel

_TID_BITS: Final = 32  # tid_t wraps


class Ext4:
    """What one kernel's ext4 knows of its journals; `why` says so when it cannot be read."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._committed: dict[int, int | None] = {}
        self.why = ""
        try:
            types = _types(kernel)
            self._sb_info: Type = struct(types, "ext4_sb_info")
            self._inode_info: Type = struct(types, "ext4_inode_info")
            with guest_reads("reading the layout of ext4"):
                self._vfs_inode: int = offsetof(self._inode_info, "vfs_inode")
        except UnsupportedGuestError as error:
            self.why = error.message

    def committed(self, inode: Object) -> bool | None:
        """Tell whether the last change of a ``struct inode *`` is in the journal on disk.

        None when the file system has no journal, is not ext4, or cannot be read.
        """
        sb = inode.i_sb.read_()
        if self.why or sb.s_type.name.string_() != b"ext4":
            return None
        last = self._last_commit(sb)
        if last is None:
            return None
        info = Object(self._kernel.prog, self._inode_info, address=inode.value_() - self._vfs_inode)
        age = (info.i_sync_tid.value_() - last) % (1 << _TID_BITS)
        return not 0 < age < 1 << (_TID_BITS - 1)

    def _last_commit(self, sb: Object) -> int | None:
        key = sb.value_()
        if key not in self._committed:
            info = Object(self._kernel.prog, self._sb_info, address=sb.s_fs_info.value_())
            journal = info.s_journal.read_()
            self._committed[key] = journal.j_commit_sequence.value_() if journal else None
        return self._committed[key]


def _types(kernel: Kernel) -> BtfTypes:
    """Return the types of ext4, be it built in or a module."""
    if kernel.types.struct("ext4_sb_info") is not None:
        return kernel.types
    return module_types(kernel, "ext4")
