"""Does some process have a disk image open for writing? QEMU's image locks tell.

QEMU (and qemu-storage-daemon, qemu-nbd, qemu-img) announces each permission it uses on an image
with a shared lock of one byte, and each one it denies to others with another byte. The locks are
asked about here, never taken, so a VM that starts at the same moment is not disturbed. A host
whose file system has no locks, or a QEMU started with ``locking=off``, is not seen.

Source: QEMU v7.2.0 ``block/file-posix.c`` (``RAW_LOCK_PERM_BASE``, ``raw_check_lock_bytes``),
``include/block/block-common.h`` (``BLK_PERM_WRITE``), ``util/osdep.c``
(``qemu_lock_fd_test``); Linux ``fcntl(2)``, "Open file description locks".
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_PERM_BASE: Final = 100
_BLK_PERM_WRITE_BIT: Final = 1
_FLOCK: Final = struct.Struct("@hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid
_F_OFD_GETLK: Final = 36  # fcntl.F_OFD_GETLK exists from Python 3.9 where libc has it


def writer_of(path: Path) -> bool:
    """Tell whether some process has an image open for writing and says so by QEMU's lock.

    Raises:
        OSError: The file cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # A lock for writing conflicts with QEMU's shared one; l_pid has to be 0 for OFD locks.
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _PERM_BASE + _BLK_PERM_WRITE_BIT, 1, 0)
        answer = fcntl.fcntl(descriptor, _F_OFD_GETLK, question)
    finally:
        os.close(descriptor)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
