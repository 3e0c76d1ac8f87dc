"""Mounts a tree and serves it, once for all programs of a shadow.

The connection to the kernel is opened and mounted by the supervisor; a child of its own serves it.
A server that dies ends the connection: a later read gets ENOTCONN instead of waiting.

Source: Linux v6.1 ``fs/fuse/inode.c`` (``fuse_fs_parameters``), ``fs/super.c`` (``alloc_super``:
what a user namespace mounts opens no device); libfuse 3.3 (``fuse_session_mount``: ``/dev/fd/N``).
"""

from __future__ import annotations

import os
import signal
import traceback
from typing import TYPE_CHECKING, Any, Final

from ouassister.shadow import raw

if TYPE_CHECKING:
    from collections.abc import Callable

_FLAGS: Final = raw.MS_NOSUID | raw.MS_NODEV
_FOREVER: Final = 86400.0  # nothing changes but through this mount
_LOOP_ENDED: Final = 8  # of fuse_main (lib/helper.c): the connection goes with its last mount


def import_library() -> None:
    """Import mfusepy with libfuse 3; it looks for version 2 first, and by starting ldconfig(8)."""
    os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
    import mfusepy  # type: ignore[import-untyped]  # noqa: F401


def start(source: str, target: str, flags: int, mode: int, operations: Callable[[], Any]) -> int:
    """Mount a tree and start its server.

    Args:
        source: What stands first in a list of mounts.
        target: An empty folder.
        flags: Of the mount, beside nosuid and nodev.
        mode: Permissions of the root.
        operations: Makes what mfusepy calls; called in the server.

    Returns:
        The server's pid. It ends with its parent.

    Raises:
        OSError: The kernel refuses the mount.
    """
    import_library()
    connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={connection},rootmode=40{mode:03o},user_id=0,group_id=0"
        options += ",allow_other,default_permissions"
        raw.mount(source, target, f"fuse.{source}", _FLAGS | flags, options)
        child = os.fork()
        if child == 0:
            _serve(connection, operations)
    finally:
        os.close(connection)
    return child


def _serve(connection: int, operations: Callable[[], Any]) -> None:
    """Serve until the last mount is gone, in a child."""
    status = 1
    try:
        raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
        import mfusepy

        mfusepy.FUSE(
            operations(),
            f"/dev/fd/{connection}",
            foreground=True,
            nothreads=True,
            direct_io=True,
            use_ino=True,
            entry_timeout=_FOREVER,
            attr_timeout=_FOREVER,
            negative_timeout=_FOREVER,
        )
        status = 0
    except RuntimeError as error:
        if error.args == (_LOOP_ENDED,):
            status = 0
        else:
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def caller() -> tuple[int, int]:
    """Tell who asks what is being answered: user and group."""
    import mfusepy

    uid, gid, _ = mfusepy.fuse_get_context()
    return uid, gid


def caller_pid() -> int:
    """Tell who asks what is being answered: the process, as the supervisor sees it."""
    import mfusepy

    pid: int = mfusepy.fuse_get_context()[2]
    return pid
