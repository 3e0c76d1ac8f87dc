"""Every file lock that is held, as /proc/locks shows them.

Source: Linux v6.1 ``fs/locks.c`` (``file_lock_list``, ``lock_get_status``),
``include/linux/fs.h`` (``FL_*``); ``include/linux/filelock.h`` since v6.3. The shared fields moved
to ``struct file_lock_core`` with a69ce85ec9af ("filelock: split common fields into struct
file_lock_core", v6.9), where leases became a structure of their own (c69ff4071935).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.guest_model import GuestPid, HeldLock
from ouassister.kernel import walk
from ouassister.kernel.fields import Fields, offset
from ouassister.kernel.percpu import each_cpu
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from ouassister.kernel.file_names import FileNames
    from ouassister.kernel.program import Kernel

_KINDS: Final = ((0x20, "lease"), (0x400, "ofd"), (4, "delegation"), (1, "posix"), (2, "flock"))
_F_WRLCK: Final = 1
_OFFSET_MAX: Final = (1 << 63) - 1
_MINOR_BITS: Final = 20
_MAX_LOCKS: Final = 1 << 16


def read_held_locks(kernel: Kernel, names: FileNames) -> tuple[HeldLock, ...]:
    """Describe every lock that is held.

    Raises:
        CorruptGuestError: A list does not end.
        UnsupportedGuestError: This kernel lists its locks otherwise.
    """
    with guest_reads("reading the list of locks"):
        kernel.type("struct file_lock_list_struct")
        try:
            prefix = "flc_"
            core = Fields(kernel, "struct file_lock_core", "flc_flags", "flc_type", "flc_pid",
                          "flc_file")  # fmt: skip
            link = offset(kernel, "struct file_lock_core", "flc_link")
        except LookupError:
            prefix = "fl_"
            core = Fields(kernel, "struct file_lock", "fl_flags", "fl_type", "fl_pid", "fl_file")
            link = offset(kernel, "struct file_lock", "fl_link")
        extent = Fields(kernel, "struct file_lock", "fl_start", "fl_end")
        shift = offset(kernel, "struct file_lock", "c") if prefix == "flc_" else 0
        file = Fields(kernel, "struct file", "f_path.mnt", "f_path.dentry", "f_inode")
        inode = Fields(kernel, "struct inode", "i_ino", "i_sb")
        head = offset(kernel, "struct file_lock_list_struct", "hlist")
        found: list[HeldLock] = []
        for place in each_cpu(kernel, "file_lock_list"):
            # What is left of the bound: a lock is in the list of one processor.
            for node in walk.hlist_nodes(kernel, place + head, _MAX_LOCKS - len(found)):
                flags, lock_type, pid, opened = core.read(node - link)
                kind = next((name for bit, name in _KINDS if flags & bit), "other")
                whole = kind in ("lease", "delegation")
                start, end = (0, _OFFSET_MAX) if whole else extent.read(node - link - shift)
                number = device = 0
                path = b""
                if opened:
                    mnt, dentry, owner = file.read(opened)
                    number, sb = inode.read(owner)
                    device = names.file_system(sb)[1]
                    path = names.name(mnt, dentry, owner)
                found.append(
                    HeldLock(
                        kind=kind,
                        write=lock_type == _F_WRLCK,
                        # Who set one that belongs to an open file does not matter (as in
                        # locks_translate_pid).
                        pid=GuestPid(-1 if kind == "ofd" or pid >= 1 << 31 else pid),
                        path=path,
                        major=device >> _MINOR_BITS,
                        minor=device & ((1 << _MINOR_BITS) - 1),
                        inode=number,
                        start=start,
                        end=None if end == _OFFSET_MAX else end,
                    )
                )
        return tuple(found)
