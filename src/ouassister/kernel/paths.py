"""Paths from dentries and mounts, as ``d_path`` makes them.

Source: Linux v6.1 ``fs/d_path.c`` (``prepend_path``, ``d_path``), ``fs/mount.h``,
``include/linux/dcache.h`` (``d_unhashed``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError

if TYPE_CHECKING:
    from drgn import Object

    from ouassister.kernel.program import Kernel

_MAX_STEPS: Final = 2048
_NAME_MAX: Final = 255
_PSEUDO_NAME_MAX: Final = 4096  # of memfd and the like, which are no directory entries


def dentry_name(dentry: Object, limit: int = _NAME_MAX) -> bytes:
    """Return the last component of a dentry's path."""
    length = dentry.d_name.len.value_()
    if not 0 < length <= limit:
        raise CorruptGuestError(f"a directory entry has a name of {length} bytes")
    name: bytes = dentry.prog_.read(dentry.d_name.name.value_(), length)
    return name


def unhashed(dentry: Object) -> bool:
    """Tell whether a dentry cannot be found by name (any more): its file is deleted."""
    return not dentry.d_hash.pprev.value_()


def path_of(
    kernel: Kernel, vfsmount: Object, dentry: Object, root: tuple[int, int] | None = None
) -> tuple[bytes, bool]:
    """Return the path of a dentry on a mount, and whether it leads up to ``root``.

    Args:
        kernel: The kernel.
        vfsmount: ``struct vfsmount *``.
        dentry: ``struct dentry *``.
        root: Addresses of the vfsmount and dentry to stop at; None for the topmost mount.
    """
    mount = kernel.container("struct mount", "mnt", vfsmount.value_())
    parts: list[bytes] = []
    for _ in range(_MAX_STEPS):
        if root == (mount.mnt.address_, dentry.value_()):
            return _join(parts), True
        if dentry == mount.mnt.mnt_root:
            parent = mount.mnt_parent
            if parent.value_() == mount.address_:
                return _join(parts), root is None
            dentry = mount.mnt_mountpoint.read_()
            mount = parent[0]
            continue
        parent = dentry.d_parent.read_()
        if parent == dentry:  # on no mount: memfd, pipes
            return _join([dentry_name(dentry, _PSEUDO_NAME_MAX), *parts]), False
        parts.insert(0, dentry_name(dentry))
        dentry = parent
    raise CorruptGuestError(f"a path has more than {_MAX_STEPS} components")


def path_in_file_system(dentry: Object) -> bytes:
    """Return the path of a ``struct dentry *`` from the root of its file system."""
    parts: list[bytes] = []
    for _ in range(_MAX_STEPS):
        parent = dentry.d_parent.read_()
        if parent == dentry:
            return _join(parts)
        parts.insert(0, dentry_name(dentry))
        dentry = parent
    raise CorruptGuestError(f"a path has more than {_MAX_STEPS} components")


def file_path(kernel: Kernel, file: Object) -> bytes:
    """Return the path of a ``struct file *`` as /proc shows it: ``" (deleted)"`` included."""
    place = file.f_path
    path, _ = path_of(kernel, place.mnt.read_(), place.dentry.read_())
    dentry = place.dentry
    if unhashed(dentry) and dentry != dentry.d_parent:
        return path + b" (deleted)"
    return path


def _join(parts: list[bytes]) -> bytes:
    return b"/" + b"/".join(parts)
