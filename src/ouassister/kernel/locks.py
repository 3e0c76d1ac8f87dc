"""POSIX, open-file-description and BSD locks of cached files.

Source: Linux v6.1 ``include/linux/fs.h`` (``struct file_lock_context``, ``struct file_lock``);
``include/linux/filelock.h`` since v6.3. The fields that all kinds share moved to ``struct
file_lock_core`` with a69ce85ec9af ("filelock: split common fields into struct file_lock_core",
v6.9).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.kernel import walk
from ouassister.kernel.program import guest_reads
from ouassister.model import FileLock, GuestPid
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drgn import Object

    from ouassister.kernel.program import Kernel

_F_WRLCK: Final = 1
_MAX_LOCKS: Final = 4096  # on one file


def read_locks(kernel: Kernel, path: bytes, dentry: Object) -> Iterator[FileLock]:
    """Yield the locks on one cached entry's file."""
    with guest_reads(f"reading the locks of {to_text(path)}"):
        inode = dentry.d_inode.read_()
        context = inode.i_flctx.read_() if inode else None
        if not context:
            return
        for kind, head in (("posix", context.flc_posix), ("flock", context.flc_flock)):
            for node in walk.list_nodes(kernel, head.address_of_().value_(), _MAX_LOCKS):
                pid, lock_type = _lock(kernel, node)
                yield FileLock(path, kind, GuestPid(pid), lock_type == _F_WRLCK)


def _lock(kernel: Kernel, node: int) -> tuple[int, int]:
    try:
        core = kernel.container("struct file_lock_core", "flc_list", node)
        return core.flc_pid.value_(), core.flc_type.value_()
    except LookupError:
        lock = kernel.container("struct file_lock", "fl_list", node)
        return lock.fl_pid.value_(), lock.fl_type.value_()
