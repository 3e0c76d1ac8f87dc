"""Inert processes, each in the place of one of the guest's, for descriptors of it (pidfd_open(2)).

A stand-in never ends by itself: a descriptor of it polls as one of a process that runs. It has no
descriptors and an empty tree, and no program of the shadow has it in its pid namespace: the
kernel refuses signals to it, and its namespaces are worth nothing.
"""

from __future__ import annotations

import errno
import os
import signal
from typing import Final, NoReturn

from ouassister.shadow import raw

_MAX_STAND_INS: Final = 64
_MAX_DESCRIPTORS: Final = 1 << 20
_STAGE: Final = "/proc"  # a mount of the supervisor's own; covered in the stand-in alone


class StandIns:
    """The stand-ins of one shadow; they end with its pid namespace."""

    def __init__(self) -> None:
        self._pids: dict[int, int] = {}  # by the guest's pid

    def descriptor(self, pid: int, flags: int) -> int:
        """Open a descriptor of a guest's process.

        Raises:
            OSError: EMFILE when there are too many stand-ins.
        """
        if pid not in self._pids:
            if len(self._pids) >= _MAX_STAND_INS:
                raise OSError(errno.EMFILE, "too many stand-ins")
            self._pids[pid] = _start()
        return os.pidfd_open(self._pids[pid], flags)

    def guest_pid(self, stand_in: int) -> int | None:
        """Whose stand-in a process is."""
        return next((pid for pid, ours in self._pids.items() if ours == stand_in), None)

    def close(self) -> None:
        """End them all."""
        for stand_in in self._pids.values():
            os.kill(stand_in, signal.SIGKILL)
            os.waitpid(stand_in, 0)
        self._pids.clear()


def _start() -> int:
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        _stand(tell)
    os.close(tell)
    try:
        said = os.read(ready, 1)
    finally:
        os.close(ready)
    if not said:
        os.waitpid(child, 0)
        raise OSError(errno.EAGAIN, "no stand-in")
    return child


def _stand(tell: int) -> NoReturn:
    """Leave everything and wait for ever; a failure ends the process with a signal."""
    try:
        raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
        flags = raw.CLONE_NEWNS | raw.CLONE_NEWUTS | raw.CLONE_NEWIPC | raw.CLONE_NEWNET
        raw.unshare(flags | raw.CLONE_NEWCGROUP)
        raw.mount("", "/", "", raw.MS_REC | raw.MS_PRIVATE)
        raw.mount("tmpfs", _STAGE, "tmpfs", raw.MS_RDONLY | raw.MS_NOSUID | raw.MS_NODEV, "mode=0")
        os.chdir(_STAGE)
        raw.pivot_root(".", ".")
        raw.umount(".", raw.MNT_DETACH)
        os.chdir("/")
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        os.write(tell, b".")
        os.closerange(0, _MAX_DESCRIPTORS)
        while True:
            signal.pause()
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
