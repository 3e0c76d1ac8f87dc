"""What /proc calls an open file, be it a path or none: ``socket:[7]``, ``anon_inode:[eventpoll]``.

Source: Linux v6.1 ``fs/d_path.c`` (``d_path``, ``simple_dname``), ``net/socket.c``
(``sockfs_dname``), ``fs/pipe.c`` (``pipefs_dname``), ``fs/anon_inodes.c`` (``anon_inodefs_dname``),
``fs/nsfs.c`` (``ns_dname``), ``drivers/dma-buf/dma-buf.c``. pidfd became a file system of its own
with cb12fd8e0dab ("pidfd: add pidfs", v6.9), and shows the name it had before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from drgn import Object

from ouassister.kernel.fields import Fields, read_string
from ouassister.kernel.paths import dentry_name, path_of, unhashed

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel

_NUMBERED: Final = {b"sockfs": b"socket", b"pipefs": b"pipe"}
_PSEUDO_NAME_MAX: Final = 4096


class FileNames:
    """Names of files by mount and directory entry; each is made once.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._sb = Fields(kernel, "struct super_block", "s_type", "s_dev")
        self._type = Fields(kernel, "struct file_system_type", "name")
        self._inode = Fields(kernel, "struct inode", "i_ino", "i_sb", "i_private")
        self._names: dict[tuple[int, int], bytes] = {}
        self._file_systems: dict[int, tuple[bytes, int]] = {}

    def file_system(self, sb: int) -> tuple[bytes, int]:
        """Return the type's name and the device number of a ``struct super_block *``."""
        found = self._file_systems.get(sb)
        if found is None:
            kind, device = self._sb.read(sb)
            name = read_string(self._kernel, self._type.read(kind)[0], 64)
            found = self._file_systems[sb] = (name, device)
        return found

    def name(self, mnt: int, dentry: int, inode: int) -> bytes:
        """Return the name of an open file.

        Args:
            mnt: ``struct vfsmount *``.
            dentry: ``struct dentry *``.
            inode: ``struct inode *`` of the same file.
        """
        key = (mnt, dentry)
        found = self._names.get(key)
        if found is None:
            found = self._names[key] = self._make(mnt, dentry, inode)
        return found

    def path(self, mnt: int, dentry: int) -> bytes:
        """Return the path of a directory entry on a mount, ``" (deleted)"`` included."""
        kernel = self._kernel
        entry = Object(kernel.prog, kernel.type("struct dentry *"), dentry)
        place = Object(kernel.prog, kernel.type("struct vfsmount *"), mnt)
        path, on_tree = path_of(kernel, place, entry)
        if entry != entry.d_parent:
            return path + b" (deleted)" if unhashed(entry) else path
        # The root of its file system, or of none that was ever a tree (memfd, System V memory)
        return path if on_tree or entry == place.mnt_root else path + b" (deleted)"

    def _make(self, mnt: int, dentry: int, inode: int) -> bytes:
        number, sb, private = self._inode.read(inode)
        fstype, _ = self.file_system(sb)
        if fstype in _NUMBERED:
            return b"%s:[%d]" % (_NUMBERED[fstype], number)
        if fstype == b"pidfs":
            return b"anon_inode:[pidfd]"
        if fstype in (b"anon_inodefs", b"dmabuf"):
            entry = Object(self._kernel.prog, self._kernel.type("struct dentry *"), dentry)
            prefix = b"anon_inode:" if fstype == b"anon_inodefs" else b"/dmabuf:"
            return prefix + dentry_name(entry, _PSEUDO_NAME_MAX)
        if fstype == b"nsfs":
            common = Object(self._kernel.prog, self._kernel.type("struct ns_common *"), private)
            name = read_string(self._kernel, common.ops.name.value_(), 64)
            return b"%s:[%d]" % (name, number)
        return self.path(mnt, dentry)
