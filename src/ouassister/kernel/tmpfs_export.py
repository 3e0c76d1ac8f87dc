"""Write what a tmpfs contains out as a tree of files.

Nothing in the tree acts: sockets and fifos are made and nobody listens, devices are not made at
all. A file of which a page is not known is left out and named; no byte is ever made up.

Source: ``mknod(2)``, ``symlinkat(2)``, ``setxattr(2)``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.kernel.tmpfs import Where
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drgn import Object

    from ouassister.guest_model import Tmpfs, TmpfsNode
    from ouassister.kernel.tmpfs import TmpfsReader

_PERMISSIONS: Final = 0o7777
_NOBODY: Final = 0xFFFF_FFFF  # INVALID_UID, INVALID_GID
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Exported:
    """What became of a tree: how many files were made, and which not, and why."""

    made: int
    left_out: tuple[str, ...]


class TmpfsExport:
    """Writes files below one folder.

    Args:
        reader: The reader that made the description.
        folder: Descriptor of an empty folder.
        owners: Set owners, which takes the privilege to.
    """

    def __init__(self, reader: TmpfsReader, folder: int, *, owners: bool = True) -> None:
        self._reader = reader
        self._folder = folder
        self._owners = owners
        self._left_out: list[str] = []
        self._first_names: dict[int, bytes] = {}

    def write(self, tmpfs: Tmpfs, root: Object) -> Exported:
        """Write all files of a tmpfs.

        Args:
            tmpfs: Its description.
            root: ``struct dentry *`` of its root.

        Raises:
            CorruptGuestError: Two files have one name, or a path leads out of the tree.
        """
        inodes = {inode.i_ino.value_(): inode for _, inode in self._reader.inodes(root)}
        made = 0
        for node in tmpfs.nodes:
            try:
                made += self._make(node, inodes.get(node.inode))
            except (FileExistsError, NotADirectoryError) as error:
                raise CorruptGuestError(
                    f"a tmpfs has several files named {to_text(node.path)}, or a part of it"
                ) from error
        for node in reversed(tmpfs.nodes):  # times of a directory change with each new entry
            if stat.S_ISDIR(node.mode):
                with self._place(node.path) as (parent, name):
                    self._finish(node, parent, name)
        return Exported(made, tuple(self._left_out))

    @contextlib.contextmanager
    def _place(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """Open the folder that a path lies in; no symbolic link of the guest is ever followed."""
        parts = [part for part in path.split(b"/") if part] or [b"."]
        if path[:1] != b"/" or b".." in parts or b"\0" in path:
            raise CorruptGuestError(f"a tmpfs has a file named {to_text(path)}")
        folder = os.dup(self._folder)
        try:
            for part in parts[:-1]:
                below = os.open(part, _DIRECTORY_FLAGS, dir_fd=folder)
                os.close(folder)
                folder = below
            yield folder, parts[-1]
        finally:
            os.close(folder)

    def _make(self, node: TmpfsNode, inode: Object | None) -> bool:
        if node.path == b"/":
            return True
        with self._place(node.path) as (parent, name):
            first = self._first_names.get(node.inode)
            if first is not None and not stat.S_ISDIR(node.mode):
                with self._place(first) as (other, old):
                    os.link(old, name, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
                return True
            if not self._create(node, parent, name, inode):
                return False
            self._first_names[node.inode] = node.path
            if not stat.S_ISDIR(node.mode):
                self._finish(node, parent, name)
            return True

    def _create(self, node: TmpfsNode, parent: int, name: bytes, inode: Object | None) -> bool:
        if stat.S_ISDIR(node.mode):
            os.mkdir(name, 0o700, dir_fd=parent)
        elif stat.S_ISLNK(node.mode) and node.target:
            os.symlink(node.target, name, dir_fd=parent)
        elif stat.S_ISREG(node.mode) and inode is not None:
            return self._regular(node, parent, name, inode)
        elif stat.S_ISFIFO(node.mode) or stat.S_ISSOCK(node.mode):
            os.mknod(name, stat.S_IFMT(node.mode) | 0o600, dir_fd=parent)
        else:
            device = stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode)
            why = "a device" if device else "its content is not known"
            self._left_out.append(f"{to_text(node.path)}: {why}")
            return False
        return True

    def _regular(self, node: TmpfsNode, parent: int, name: bytes, inode: Object) -> bool:
        if node.swapped or node.absent:
            where = Where.SWAPPED if node.swapped else Where.ABSENT
            count = node.swapped + node.absent
            self._left_out.append(f"{to_text(node.path)}: {count} pages are {where}")
            return False
        file = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
        try:
            try:
                os.ftruncate(file, node.size)
            except OSError as error:
                if error.errno not in (errno.EFBIG, errno.EINVAL):
                    raise
                os.unlink(name, dir_fd=parent)
                self._left_out.append(f"{to_text(node.path)}: it has {node.size} bytes")
                return False
            for extent in self._reader.content(inode):
                if not isinstance(extent.data, bytes):
                    raise CorruptGuestError(f"{to_text(node.path)} is not as it was described")
                os.pwrite(file, extent.data, extent.position)
        finally:
            os.close(file)
        return True

    def _finish(self, node: TmpfsNode, parent: int, name: bytes) -> None:
        """Set owner, mode, attributes and times, in the order in which none undoes another."""
        if self._owners and _NOBODY in (node.uid, node.gid):  # chown(2) would change nothing
            raise CorruptGuestError(f"{to_text(node.path)} of a tmpfs belongs to nobody")
        if self._owners:
            os.chown(name, node.uid, node.gid, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISLNK(node.mode):
            self._attributes(node, parent, name)
            os.chmod(name, node.mode & _PERMISSIONS, dir_fd=parent)
        try:
            os.utime(name, ns=(node.atime_ns, node.mtime_ns), dir_fd=parent, follow_symlinks=False)
        except OverflowError:
            self._left_out.append(f"{to_text(node.path)}: its times")

    def _attributes(self, node: TmpfsNode, parent: int, name: bytes) -> None:
        if not node.xattrs:
            return
        if not (stat.S_ISREG(node.mode) or stat.S_ISDIR(node.mode)):
            self._left_out.append(f"{to_text(node.path)}: its attributes")
            return
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            for key, value in node.xattrs:
                try:
                    os.setxattr(file, key, value)
                except OSError as error:
                    self._left_out.append(
                        f"{to_text(node.path)}: attribute {to_text(key)}: {error.strerror}"
                    )
        finally:
            os.close(file)
