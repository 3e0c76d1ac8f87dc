"""Has ext4 committed an inode's last change to its journal?

On ext4 the dirty bits of ``i_state`` say little: a change of a directory never sets them, while a
mere access time keeps them set for half a minute after it is safe in the journal. The file
system's own answer is a pair of transaction numbers: the last one that touched the inode, and
the last one that was committed.

Source: Linux v6.1 ``fs/ext4/ext4_jbd2.h`` (``ext4_update_inode_fsync_trans``),
``fs/ext4/fsync.c`` (``ext4_fsync_journal``), ``fs/ext4/inode.c`` (``__ext4_iget``),
``include/linux/jbd2.h`` (``tid_gt``, ``t_start_time``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drgn import Object, offsetof

from ouassister.errors import UnsupportedGuestError
from ouassister.kernel import inodes
from ouassister.kernel.modules import module_types, struct
from ouassister.kernel.program import guest_reads
from ouassister.text import to_text

if TYPE_CHECKING:
    from drgn import Type

    from ouassister.kernel.btf_types import BtfTypes
    from ouassister.kernel.program import Kernel

_TID_BITS: Final = 32  # tid_t wraps
_SLACK_NS: Final = 1_000_000_000  # change times come from a coarser clock


@dataclass(frozen=True, slots=True)
class _Journal:
    last_commit: int  # transaction number
    open_since_ns: int  # wall-clock time when the oldest uncommitted transaction began; 0: unknown


class Ext4:
    """What one kernel's ext4 knows of its journals.

    Args:
        kernel: The kernel.
        realtime_offset_ns: What to add to its monotonic time for wall-clock time; None when the
            clock cannot be read, and every inode in an open transaction counts as changed.

    Attributes:
        unread: File systems whose journal was asked for and not read, and why.
    """

    def __init__(self, kernel: Kernel, realtime_offset_ns: int | None) -> None:
        self._kernel = kernel
        self._realtime_offset_ns = realtime_offset_ns
        self._journals: dict[int, _Journal | None] = {}
        self.unread: dict[str, str] = {}
        self._why = ""
        try:
            types = _types(kernel)
            self._sb_info: Type = struct(types, "ext4_sb_info")
            self._inode_info: Type = struct(types, "ext4_inode_info")
            with guest_reads("reading the layout of ext4"):
                self._vfs_inode: int = offsetof(self._inode_info, "vfs_inode")
        except UnsupportedGuestError as error:
            self._why = error.message

    def committed(self, inode: Object) -> bool | None:
        """Tell whether the last change of a ``struct inode *`` is in the journal on disk.

        None when the file system has no journal, is not ext4, or cannot be read.
        """
        sb = inode.i_sb.read_()
        key = sb.value_()
        if key not in self._journals:
            self._journals[key] = self._journal(sb)
        journal = self._journals[key]
        if journal is None:
            return None
        info = Object(self._kernel.prog, self._inode_info, address=inode.value_() - self._vfs_inode)
        age = (info.i_sync_tid.value_() - journal.last_commit) % (1 << _TID_BITS)
        if not 0 < age < 1 << (_TID_BITS - 1):
            return True
        # An inode that was only loaded carries the number of the transaction that was open then
        # (ext4_iget); one that was changed in it has a change time from then on, too.
        return inodes.time_ns(inode, "ctime") < journal.open_since_ns - _SLACK_NS

    def _journal(self, sb: Object) -> _Journal | None:
        fstype = to_text(sb.prog_.read_c_string(sb.s_type.name.value_(), max_size=64))
        if fstype != "ext4" or self._why:
            self.unread[fstype] = self._why or "its journal is not read"
            return None
        info = Object(self._kernel.prog, self._sb_info, address=sb.s_fs_info.value_())
        journal = info.s_journal.read_()
        if not journal:
            self.unread[fstype] = "it has no journal"
            return None
        starts = [
            transaction.t_start_time.value_() + self._realtime_offset_ns
            for transaction in (journal.j_running_transaction, journal.j_committing_transaction)
            if transaction and self._realtime_offset_ns is not None
        ]
        return _Journal(journal.j_commit_sequence.value_(), min(starts, default=0))


def _types(kernel: Kernel) -> BtfTypes:
    """Return the types of ext4, be it built in or a module."""
    if kernel.types.struct("ext4_sb_info") is not None:
        return kernel.types
    return module_types(kernel, "ext4")
