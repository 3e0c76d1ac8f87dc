"""Serves /proc for one program of a shadow, from outside of the program's pid namespace.

    runner ── server        this file: `Procfs.serve`, in the supervisor's pid namespace
       └───── init          `Procfs.cover`, in the program's: mounts, then tells the server

The connection to the kernel (/dev/fuse) is opened before both are forked. The server reads from it
only once it is mounted, which it learns with the descriptor of the real procfs: the namespace of
pids that it shows is the one of the process that mounted it.

Source: Linux v6.1 ``fs/fuse/inode.c`` (``fuse_fs_parameters``), ``fs/proc/root.c``
(``subset=pid``); libfuse 3.3 (``fuse_session_mount``: ``/dev/fd/N``).
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

from ouassister.shadow import raw
from ouassister.shadow.procfs.filesystem import CALLERS, OWN, ProcFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ouassister.shadow.procfs.snapshot import Node

_FLAGS: Final = raw.MS_NOSUID | raw.MS_NODEV | raw.MS_NOEXEC
_TIMEOUT_S: Final = 1.0  # how long a folder of a process that ended may still be found
_LOOP_ENDED: Final = 8  # of fuse_main (lib/helper.c): the connection goes with its last mount
_READY: Final = b"mounted"


def import_library() -> None:
    """Import mfusepy with libfuse 3; it looks for version 2 first, and by starting ldconfig(8)."""
    os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
    import mfusepy  # type: ignore[import-untyped]  # noqa: F401


class Procfs:
    """One /proc, before it is mounted.

    Args:
        nodes: The guest's part (`ouassister.shadow.procfs.snapshot.read`).
    """

    def __init__(self, nodes: Mapping[bytes, Node]) -> None:
        self._nodes = nodes
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._inside, self._outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve(self, wrote: Callable[[str, bytes], None]) -> None:
        """Serve until the last process that sees it is gone; in a child of its own.

        Args:
            wrote: Called with the name of a value below ``sys`` (``kernel/hostname``) and what a
                program set it to.
        """
        import_library()
        import mfusepy

        self._inside.close()
        message, descriptors, _, _ = socket.recv_fds(self._outside, len(_READY), 1)
        if message != _READY:
            return  # the program was never started
        try:
            mfusepy.FUSE(
                ProcFiles(self._nodes, descriptors[0], wrote),
                f"/dev/fd/{self._fuse}",
                foreground=True,
                nothreads=True,
                direct_io=True,
                use_ino=True,
                entry_timeout=_TIMEOUT_S,
                attr_timeout=_TIMEOUT_S,
                negative_timeout=0.0,
            )
        except RuntimeError as error:
            if error.args != (_LOOP_ENDED,):
                raise

    def cover(self) -> None:
        """Mount it over /proc, in the first process of the program's pid namespace.

        Raises:
            OSError: The kernel refuses a mount, or the server died.
        """
        self._outside.close()  # a server that died is noticed, as the last one to hold it
        raw.mount("proc", "/proc", "proc", _FLAGS, "subset=pid")
        real = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        places = {name: raw.clone_place(f"/proc/{name}") for name in CALLERS}
        places[OWN] = raw.clone_place("/proc")
        raw.umount("/proc", raw.MNT_DETACH)
        options = f"fd={self._fuse},rootmode=40555,user_id=0,group_id=0"
        options += ",allow_other,default_permissions"
        raw.mount("proc", "/proc", "fuse.proc", _FLAGS, options)
        os.close(self._fuse)
        socket.send_fds(self._inside, [_READY], [real])
        os.close(real)
        for name, place in places.items():
            raw.attach(place, f"/proc/{name}")
            os.close(place)
        self._inside.close()

    def close(self) -> None:
        """Let go of it in the process that forked both."""
        self._inside.close()
        self._outside.close()
        os.close(self._fuse)
