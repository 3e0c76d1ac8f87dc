"""One directory tree read object by object, through file descriptors, following nothing.

Each object is opened once with ``O_PATH`` below the tree's root, and everything about it is read
from that descriptor. Paths are relative to the root, so that a guest path of 4,095 bytes works
and depth costs no descriptors.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ouassister.errors import HostNotReadyError, InternalError, UnsupportedGuestError
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

PATH_LIMIT = 4095  # PATH_MAX of linux/limits.h, without its NUL

# struct vfs_ns_cap_data, linux/capability.h: revision 3 is revision 2 and a root id.
_CAPABILITY = "security.capability"
_CAPABILITY_V2 = 0x02000000
_CAPABILITY_V3 = 0x03000000
_CAPABILITY_REVISION = 0xFF000000


@dataclass(frozen=True, slots=True)
class Node:
    """One object of a tree.

    ``overlay`` holds the attributes of overlayfs without their prefix, ``xattrs`` the guest's own.
    ``unreadable`` names attributes that are listed and cannot be read from here.
    """

    status: os.stat_result
    xattrs: tuple[tuple[str, bytes], ...]
    target: bytes = b""
    overlay: dict[str, bytes] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()


class Tree:
    """A directory tree that nobody writes to.

    Args:
        root: Its root directory.
        prefix: Of overlayfs's own attributes: ``user.overlay.`` or ``trusted.overlay.``.

    Raises:
        HostNotReadyError: There is no /proc, which attributes are read through.
    """

    def __init__(self, root: Path, prefix: str) -> None:
        self._prefix = prefix
        self._fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if not Path(f"/proc/self/fd/{self._fd}").exists():
            os.close(self._fd)
            raise HostNotReadyError("/proc is not mounted where the change set is extracted")

    def __enter__(self) -> Self:
        """Keep the root open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the root."""
        os.close(self._fd)

    def status(self, path: bytes) -> os.stat_result | None:
        """Look at an object without its attributes; None when there is none."""
        try:
            return os.stat(_relative(path), dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def look(self, path: bytes) -> Node:
        """Read everything about an object but its content.

        Raises:
            UnsupportedGuestError: An attribute's name is not UTF-8.
        """
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(_relative(path), flags, dir_fd=self._fd)
        try:
            status = os.stat(fd)  # noqa: PTH116 - a descriptor
            target = b""
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink(b"", dir_fd=fd)
            xattrs: dict[str, bytes] = {}
            overlay: dict[str, bytes] = {}
            unreadable: list[str] = []
            for name, value in _xattrs(fd, path):
                if value is None:
                    unreadable.append(name)
                elif not name.startswith(self._prefix):
                    xattrs[name] = _guest_value(name, value)
                elif name.startswith(self._prefix + "overlay."):
                    # The guest's own "user.overlay.X": overlayfs escapes it by a second
                    # "overlay." (Documentation/filesystems/overlayfs.rst, "Nesting overlayfs
                    # mounts", since Linux 6.7).
                    xattrs[self._prefix + name.removeprefix(self._prefix + "overlay.")] = value
                else:
                    overlay[name.removeprefix(self._prefix)] = value
        finally:
            os.close(fd)
        return Node(status, tuple(sorted(xattrs.items())), target, overlay, tuple(unreadable))

    def names(self, path: bytes) -> list[bytes]:
        """The names in a directory, sorted."""
        fd = os.open(
            _relative(path),
            os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
            dir_fd=self._fd,
        )
        try:
            return sorted(os.fsencode(name) for name in os.listdir(fd))  # noqa: PTH208 - a descriptor
        finally:
            os.close(fd)

    def open(self, path: bytes) -> int:
        """Open a regular file for reading; the caller closes the descriptor."""
        # O_NONBLOCK: had somebody put a FIFO there, opening it must not wait for a writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(_relative(path), flags, dir_fd=self._fd)

    def owned(self, path: bytes) -> bool:
        """Whether the owner of a file or directory is one that this user namespace knows.

        Only the owner, or root of a namespace that maps the owner, may open with ``O_NOATIME``
        (open(2); ``inode_owner_or_capable`` of the kernel's fs/inode.c).
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME
        try:
            os.close(os.open(_relative(path), flags, dir_fd=self._fd))
        except PermissionError:
            return False
        return True


class Owners:
    """Tells owners from the stand-in that the kernel shows for one outside of the namespace.

    An id that the user namespace does not map reads as the overflow id, 65534, which is also
    Debian's ``nobody`` and ``nogroup`` (user_namespaces(7), "Unmapped user and group IDs").
    Inside the namespace no object can get such an owner: chown(2) refuses it. What comes from
    elsewhere, or is looked at outside of the namespace, must not pass for the guest's.
    """

    def __init__(self) -> None:
        self._uid = _overflow("uid")
        self._gid = _overflow("gid")

    def check(self, tree: Tree, path: bytes, status: os.stat_result) -> None:
        """Refuse an object whose owner is not known here.

        Raises:
            InternalError: The owner or the group is outside of the user namespace.
        """
        known = True
        if status.st_uid == self._uid[0]:
            known = self._uid[1]
            if known and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                known = tree.owned(path)
        if status.st_gid == self._gid[0]:
            # Also not as the group of the root: set-group-ID directories would pass it on.
            known = known and self._gid[1] and path != b"/"
        if not known:
            raise InternalError(
                f"owner of {to_text(path)} in the union layer is outside of the user namespace"
            )


def checked_path(parent: bytes, name: bytes) -> bytes:
    """Join a directory's path and a name.

    Raises:
        UnsupportedGuestError: The path is longer than a system call takes.
    """
    path = b"/" + name if parent == b"/" else parent + b"/" + name
    if len(path) > PATH_LIMIT:
        raise UnsupportedGuestError(
            f"path of {len(path)} bytes below {to_text(path[:80])}: the limit is {PATH_LIMIT}",
            hint="remove that tree in the guest, or from the update, and try again",
        )
    return path


def _relative(path: bytes) -> bytes:
    return path[1:] or b"."


def _xattrs(fd: int, path: bytes) -> Iterator[tuple[str, bytes | None]]:
    # An O_PATH descriptor has no fgetxattr; its magic link in /proc leads to the very object,
    # symbolic links included (open(2), "O_PATH").
    link = f"/proc/self/fd/{fd}"
    try:
        names = os.listxattr(link)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return
        raise
    for raw in names:
        try:
            name = os.fsencode(raw).decode()
        except UnicodeDecodeError:
            raise UnsupportedGuestError(
                f"extended attribute {raw!r} of {to_text(path)} has a name that is not UTF-8",
                hint="remove the attribute in the guest and save it again",
            ) from None
        try:
            yield name, os.getxattr(link, raw)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENODATA):
                raise
            yield name, None


def _guest_value(name: str, value: bytes) -> bytes:
    """Turn a capability of the namespace's own root into what the guest's kernel would store.

    Linux stores revision 3 with the namespace's root id when a capability is set in a user
    namespace, and gives revision 2 back inside of it (``cap_inode_getsecurity`` of
    security/commoncap.c). Revision 3 for another root id is the guest's own.
    """
    if name != _CAPABILITY or len(value) != 24:
        return value
    magic = int.from_bytes(value[:4], "little")
    if magic & _CAPABILITY_REVISION != _CAPABILITY_V3 or any(value[20:]):
        return value
    return (magic & ~_CAPABILITY_REVISION | _CAPABILITY_V2).to_bytes(4, "little") + value[4:20]


def _overflow(what: str) -> tuple[int, bool]:
    """The overflow id, and whether this namespace also maps a real one with that number."""
    overflow = int(Path(f"/proc/sys/kernel/overflow{what}").read_text())
    for line in Path(f"/proc/self/{what}_map").read_text().splitlines():
        first, _, count = (int(word) for word in line.split())
        if first <= overflow < first + count:
            return overflow, True
    return overflow, False
