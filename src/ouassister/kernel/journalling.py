"""Whose file data goes through the journal of ext4.

Source: Linux v6.1 ``fs/ext4/ext4.h`` (``EXT4_MOUNT_JOURNAL_DATA``, ``EXT4_JOURNAL_DATA_FL``),
``fs/ext4/inode.c`` (``ext4_set_aops``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import UnsupportedGuestError
from ouassister.kernel.fields import Fields, offset
from ouassister.kernel.modules import module_types
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from ouassister.kernel.cached_inodes import CachedFileSystem, CachedInode
    from ouassister.kernel.program import Kernel

_MOUNT_DATA_FLAGS: Final = 0xC00
_MOUNT_JOURNAL_DATA: Final = 0x400
_JOURNAL_DATA_FL: Final = 0x4000


class Journalling:
    """Tells whose data goes through the journal: of a whole file system, or of one file.

    Where the kernel keeps no types of ext4, everything counts as if it did: more is looked at.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._known = False
        self._by_operations: dict[int, bool] = {}
        try:
            types = kernel.types
            if types.struct("ext4_sb_info") is None:
                types = module_types(kernel, "ext4")
            sb_info, inode_info = types.struct("ext4_sb_info"), types.struct("ext4_inode_info")
            if sb_info is None or inode_info is None:
                return
            with guest_reads("reading the layout of ext4"):
                self._info = Fields(kernel, "struct super_block", "s_fs_info")
                self._options = Fields(kernel, sb_info, "s_mount_opt")
                self._flags = Fields(kernel, inode_info, "i_flags")
                self._vfs_inode = offset(kernel, inode_info, "vfs_inode")
            self._known = True
        except UnsupportedGuestError:
            return

    def of(self, one: CachedFileSystem) -> bool:
        """Tell whether all data of a file system does (``data=journal``)."""
        if not self._known:
            return True
        (info,) = self._info.read(one.address)
        (options,) = self._options.read(info)
        return bool(options & _MOUNT_DATA_FLAGS == _MOUNT_JOURNAL_DATA)

    def inode(self, inode: CachedInode) -> bool:
        """Tell whether the data of one file does (``chattr +j``)."""
        # An inode's operations change with its flag (ext4_set_aops): one inode speaks for all.
        known = self._by_operations.get(inode.operations)
        if known is None:
            (flags,) = self._flags.read(inode.address - self._vfs_inode)
            known = self._by_operations[inode.operations] = bool(flags & _JOURNAL_DATA_FL)
        return known
