"""What XFS keeps in memory alone, beside pages of files.

XFS writes no metadata before it stands in the log, and the log is replayed by whoever mounts the
file system next. So nothing is in memory alone when every transaction that was committed has
reached the log, whether or not it has reached its place: the list of what waits for that (AIL)
need not be empty. A transaction is committed into the CIL; a push makes of it a context that is on
``xc_committing`` until its last record is on the disk and the callbacks of that record have run.

Source: Linux v6.1 ``fs/xfs/xfs_log_cil.c`` (``xlog_cil_insert_items``, ``xlog_cil_push_work``,
``xlog_cil_committed``), ``xfs_log_priv.h`` (``struct xfs_cil``), ``xfs_mount.h``
(``XFS_OPSTATE_SHUTDOWN``, ``XFS_FEAT_NORECOVERY``), ``xfs_super.c`` (``xfs_fs_freeze``). The flag
``XLOG_CIL_EMPTY`` came with 88591e7f06a4 ("xfs: use the CIL space used counter for emptiness
checks", v6.0); before, the items were on one list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import UnsupportedGuestError
from ouassister.kernel.fields import Fields, has_member, offset, read_word
from ouassister.kernel.modules import module_types, struct
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from drgn import Type

    from ouassister.kernel.btf_types import BtfTypes
    from ouassister.kernel.program import Kernel

_CIL_EMPTY: Final = 1 << 1
_SHUTDOWN: Final = 1 << 2  # of xfs_mount.m_opstate
_IO_ERROR: Final = 1 << 2  # of xlog.l_opstate
_NO_RECOVERY: Final = 1 << 62


def xfs_types(kernel: Kernel) -> BtfTypes:
    """Return the types of XFS, which is part of the kernel or a module.

    Raises:
        UnsupportedGuestError: This kernel keeps none.
    """
    if kernel.types.struct("xfs_mount") is not None:
        return kernel.types
    return module_types(kernel, "xfs")


def unlogged(kernel: Kernel, types: BtfTypes, info: int) -> str:
    """Name something that the log on the disk does not have; empty when there is nothing.

    Args:
        kernel: The kernel.
        types: Those of XFS.
        info: Address of ``struct xfs_mount``.

    Raises:
        UnsupportedGuestError: It is in no state or form that a mount of it on another host would
            show; or this kernel is laid out otherwise.
        CorruptGuestError: Memory contradicts itself.
    """
    with guest_reads("reading the state of XFS"):
        mount, log_type = struct(types, "xfs_mount"), struct(types, "xlog")
        log, state, features, data_device, log_device, realtime = Fields(
            kernel, mount, "m_log", "m_opstate", "m_features", "m_ddev_targp", "m_logdev_targp",
            "m_rtdev_targp",
        ).read(info)  # fmt: skip
        cil, log_state = Fields(kernel, log_type, "l_cilp", "l_opstate").read(log)
        for found, what in (
            (state & _SHUTDOWN or log_state & _IO_ERROR, "has shut itself down"),
            (features & _NO_RECOVERY, "is mounted with norecovery"),
            (log_device != data_device, "has its log on another device"),
            (realtime, "has a realtime device"),
        ):
            if found:
                raise UnsupportedGuestError(f"the guest's XFS {what}")
        cil_type = struct(types, "xfs_cil")
        committing = cil + offset(kernel, cil_type, "xc_committing")
        if read_word(kernel, committing) != committing:
            return "transactions on their way to its log"
        if not _is_empty(kernel, cil_type, struct(types, "xfs_cil_ctx"), cil):
            return "transactions that are not in its log (the CIL is not empty)"
    return ""


def _is_empty(kernel: Kernel, cil_type: Type, context_type: Type, cil: int) -> bool:
    if has_member(kernel, cil_type, "xc_flags"):
        (flags,) = Fields(kernel, cil_type, "xc_flags").read(cil)
        return bool(flags & _CIL_EMPTY)
    # A push empties the list before its context is on the other one; the space that the context
    # uses is counted all the time.
    items = cil + offset(kernel, cil_type, "xc_cil")
    (context,) = Fields(kernel, cil_type, "xc_ctx").read(cil)
    (space,) = Fields(kernel, context_type, "space_used").read(context)
    return read_word(kernel, items) == items and not space
