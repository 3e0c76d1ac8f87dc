"""Open files of a process, as /proc/PID/fd and /proc/PID/fdinfo show them.

Source: Linux v6.1 ``include/linux/fdtable.h``, ``include/linux/fs.h`` (``struct file``,
``FMODE_*``), ``fs/proc/fd.c`` (``seq_show``). ``files_lookup_fd_raw`` bounds by ``max_fds``, and so
does this.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import OpenFile, VirtAddr
from ouassister.kernel.fields import Fields, read_word
from ouassister.kernel.program import guest_reads
from ouassister.kernel.socket_ends import NO_FAMILY, SocketEnds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.file_names import FileNames
    from ouassister.kernel.program import Kernel

_MAX_FDS: Final = 1 << 20  # fs.nr_open by default
_FMODE_READ, _FMODE_WRITE = 1, 2
_O_CLOEXEC: Final = 0o2000000
_MINOR_BITS: Final = 20
_CHUNK: Final = 512


class Files:
    """The open files of this kernel's processes.

    Args:
        kernel: The kernel.
        names: Names of files.
    """

    def __init__(self, kernel: Kernel, names: FileNames) -> None:
        self._kernel = kernel
        self._names = names
        self._files = Fields(kernel, "struct files_struct", "fdt")
        self._table = Fields(kernel, "struct fdtable", "max_fds", "fd", "open_fds", "close_on_exec")
        self._file = Fields(kernel, "struct file", "f_path.mnt", "f_path.dentry", "f_inode",
                            "f_flags", "f_mode", "f_pos")  # fmt: skip
        self._inode = Fields(kernel, "struct inode", "i_mode", "i_ino", "i_sb", "i_nlink")
        self._ends: SocketEnds | None = None  # when the first socket is met

    def read(self, files: int) -> tuple[OpenFile, ...]:
        """Describe what a ``struct files_struct *`` has open, by descriptor.

        Raises:
            CorruptGuestError: The table is absurdly large.
        """
        with guest_reads("reading the open files of a process"):
            size, slots, open_fds, cloexec = self._table.read(self._files.read(files)[0])
            if not 0 < size <= _MAX_FDS:
                raise CorruptGuestError(f"a process has a table of {size} open files")
            return tuple(
                self._describe(fd, file, bool(self._bit(cloexec, fd)))
                for fd, file in self._slots(slots, open_fds, size)
            )

    def describe(self, file: int) -> OpenFile:
        """Describe a ``struct file *`` that has no descriptor; ``fd`` is -1."""
        with guest_reads("reading an open file"):
            return self._describe(-1, file, close_on_exec=False)

    def _slots(self, slots: int, open_fds: int, size: int) -> Iterator[tuple[int, int]]:
        # A large table is mostly empty: the bitmap tells which parts of it are worth a read.
        for first in range(0, size, _CHUNK):
            count = min(_CHUNK, size - first)
            bits = self._kernel.virtual.read(VirtAddr(open_fds + first // 8), -(-count // 8))
            if not any(bits):
                continue
            raw = self._kernel.virtual.read(VirtAddr(slots + first * 8), count * 8)
            for fd, file in enumerate(struct.unpack(f"<{count}Q", raw), first):
                # Newer kernels may keep flags in the low bits of what is being installed.
                if file and not file & 1:
                    yield fd, file

    def _bit(self, bitmap: int, fd: int) -> int:
        return read_word(self._kernel, bitmap + fd // 64 * 8) >> (fd % 64) & 1

    def _describe(self, fd: int, file: int, close_on_exec: bool) -> OpenFile:
        mnt, dentry, inode, flags, mode, position = self._file.read(file)
        i_mode, number, sb, links = self._inode.read(inode)
        fstype, device = self._names.file_system(sb)
        family, peer = self._end(inode) if fstype == b"sockfs" else (NO_FAMILY, b"")
        return OpenFile(
            fd=fd,
            path=self._names.name(mnt, dentry, inode),
            flags=flags & ~_O_CLOEXEC | (_O_CLOEXEC if close_on_exec else 0),
            readable=bool(mode & _FMODE_READ),
            writable=bool(mode & _FMODE_WRITE),
            position=position,
            major=device >> _MINOR_BITS,
            minor=device & ((1 << _MINOR_BITS) - 1),
            inode=number,
            mode=i_mode,
            deleted=links == 0,
            family=family,
            peer=peer,
        )

    def _end(self, inode: int) -> tuple[int, bytes]:
        if self._ends is None:
            self._ends = SocketEnds(self._kernel)
        return self._ends.read(inode)
