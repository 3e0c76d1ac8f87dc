"""Device nodes, mounts and attributes: what a user namespace is refused, and scripts do.

Source: Linux v6.1 fs/namei.c (``do_mknodat``, ``may_mknod``), fs/namespace.c (``path_mount``),
fs/xattr.c (``xattr_permission``), include/uapi/linux/{mount,kdev_t}.h,
include/linux/kdev_t.h (``new_decode_dev``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from ouassister.shadow.syscalls import caller
from ouassister.shadow.syscalls.notify import Call, Pass, Result, read_memory, read_string
from ouassister.shadow.syscalls.records import DENIED, PASSED, RECORDED
from ouassister.text import to_text

if TYPE_CHECKING:
    from ouassister.shadow.syscalls.context import Answerer, Context

DEVICE_XATTR: Final = "user.ouassister.device"
"""Marks a file that stands for a device node: ``c 10 229``. Only marks with a record count:
any program may set a user.* attribute, and only root may make a device node."""

_OURS: Final = b"user.ouassister."
_AT_FDCWD: Final = -100
_MAX_XATTR_NAME: Final = 256
_MAX_XATTR: Final = 4096

# include/uapi/linux/mount.h
_MS_REMOUNT, _MS_BIND, _MS_MOVE = 0x20, 0x1000, 0x2000
_MS_PROPAGATION: Final = 0x20000 | 0x40000 | 0x80000 | 0x100000
_MS_MAGIC, _MS_MAGIC_MASK = 0xC0ED0000, 0xFFFF0000
_INSIDE: Final = frozenset((b"tmpfs", b"ramfs", b"proc", b"devpts", b"mqueue", b"overlay"))
_KERNEL: Final = frozenset(
    b"autofs binfmt_misc bpf cgroup cgroup2 configfs debugfs devtmpfs efivarfs fusectl hugetlbfs"
    b" nfsd pstore resctrl rpc_pipefs securityfs selinuxfs smackfs sysfs tracefs".split()
)
_SHOWN: Final = frozenset((b"/proc", b"/sys", b"/dev", b"/dev/pts", b"/dev/shm", b"/run"))
_SHADOWS_OWN: Final = (b"/run/ouassister/", b"/proc/.own/")


# --- device nodes ---


def _mknod(context: Context, listener: int, call: Call) -> Result:
    return _make(context, listener, call, "mknod", _AT_FDCWD, 0)


def _mknodat(context: Context, listener: int, call: Call) -> Result:
    return _make(context, listener, call, "mknodat", call.signed(0), 1)


def _make(
    context: Context, listener: int, call: Call, what: str, folder: int, first: int
) -> Result:
    """Make an empty file in the place of a device node, with a mark that tells which."""
    mode, device = call.unsigned(first + 1), call.unsigned(first + 2)
    who = caller.look(listener, call)
    who.require(caller.CAP_MKNOD, caller.CAP_DAC_OVERRIDE)
    path = read_string(listener, call, call.args[first])
    letter = "c" if stat.S_ISCHR(mode) else "b"
    mark = f"{letter} {os.major(device)} {os.minor(device)}"
    permissions = stat.S_IMODE(mode) & ~who.umask
    with caller.parent_folder(listener, call, folder, path) as (parent, name):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        made = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            status = os.fstat(made)
            # The folder's set-group-ID bit has given the file its group already.
            inherits = os.fstat(parent).st_mode & stat.S_ISGID
            os.fchown(made, who.fsuid, -1 if inherits else who.fsgid)
            os.fchmod(made, permissions)
            marked = _mark(made, mark)
            where = os.readlink(f"/proc/self/fd/{parent}".encode())  # noqa: PTH115 - bytes
        finally:
            os.close(made)
    whole = where.rstrip(b"/") + b"/" + name
    context.journal.note(
        call, what, RECORDED, [whole, f"{permissions:o}", mark], inode=status.st_ino, marked=marked
    )
    return 0


def _mark(descriptor: int, mark: str) -> bool:
    """Mark a file; a tmpfs before Linux 6.6 has no user.* attributes, nor a place in a change."""
    with contextlib.suppress(OSError):
        os.setxattr(descriptor, DEVICE_XATTR, mark.encode())
        return True
    return False


# --- mounts ---


def _mount(context: Context, listener: int, call: Call) -> Result:
    """Let the kernel mount what stays in the shadow; it refuses devices to a user namespace."""
    source, target, kind = (
        read_string(listener, call, address) if address else b"" for address in call.args[:3]
    )
    flags = call.unsigned(3)
    if flags & _MS_MAGIC_MASK == _MS_MAGIC:
        flags &= ~_MS_MAGIC_MASK
    args: list[int | bytes | str] = [source, target, kind, f"{flags:#x}"]
    if flags & _MS_PROPAGATION and not flags & (_MS_REMOUNT | _MS_BIND | _MS_MOVE):
        return Pass.CONTINUE  # changes nothing that anybody sees
    if flags & (_MS_REMOUNT | _MS_BIND | _MS_MOVE) or kind in _INSIDE:
        context.journal.note(call, "mount", PASSED, args)
        return Pass.CONTINUE
    caller.require(listener, call, caller.CAP_SYS_ADMIN)
    if kind in _KERNEL:
        context.journal.note(call, "mount", RECORDED, args)
        return 0
    # A success would let the script write below: into the tree, where the guest never looks.
    context.journal.note(call, "mount", DENIED, args, device=source)
    raise OSError(errno.EPERM, "a file system on a device")


def _umount2(context: Context, listener: int, call: Call) -> Result:
    return _unmount(context, listener, call, "umount2")


def _umount(context: Context, listener: int, call: Call) -> Result:
    return _unmount(context, listener, call, "umount")


def _unmount(context: Context, listener: int, call: Call, what: str) -> Result:
    target = read_string(listener, call, call.args[0])
    whole = target
    if not target.startswith(b"/"):
        whole = caller.working_folder(call).rstrip(b"/") + b"/" + target
    if (place := os.path.normpath(whole)) in context.facts.mounted or _is_the_shadows(place):
        caller.require(listener, call, caller.CAP_SYS_ADMIN)
        context.journal.note(call, what, DENIED, [target], device=target)
        raise OSError(errno.EBUSY, "a file system of the guest")
    context.journal.note(call, what, PASSED, [target])
    return Pass.CONTINUE


def _is_the_shadows(place: bytes) -> bool:
    """What the shadow shows in the place of the guest's: below it is something of the host's."""
    return place in _SHOWN or (place + b"/").startswith(_SHADOWS_OWN)


# --- extended attributes ---


def _setxattr(context: Context, listener: int, call: Call) -> Result:
    return _attribute(context, listener, call, "setxattr")


def _lsetxattr(context: Context, listener: int, call: Call) -> Result:
    return _attribute(context, listener, call, "lsetxattr")


def _fsetxattr(context: Context, listener: int, call: Call) -> Result:
    return _attribute(context, listener, call, "fsetxattr")


def _attribute(context: Context, listener: int, call: Call, what: str) -> Result:
    """Record what the kernel refuses to a user namespace; it judges all others itself."""
    name = read_string(listener, call, call.args[1], _MAX_XATTR_NAME)
    if name.startswith(_OURS):
        raise OSError(errno.EPERM, "a mark of ours")
    if not name.startswith((b"trusted.", b"security.")) or name == b"security.capability":
        return Pass.CONTINUE
    value = read_memory(listener, call, call.args[2], min(call.args[3], _MAX_XATTR))
    if what == "fsetxattr":
        path = caller.descriptor_path(listener, call, call.signed(0))
    else:
        path = read_string(listener, call, call.args[0])
    context.journal.note(call, what, DENIED, [path, name, value], attribute=to_text(name))
    raise OSError(errno.EPERM, "not in a user namespace")


ANSWERERS: Final[dict[str, Answerer]] = {
    "mknod": _mknod,
    "mknodat": _mknodat,
    "mount": _mount,
    "umount2": _umount2,
    "umount": _umount,
    "setxattr": _setxattr,
    "lsetxattr": _lsetxattr,
    "fsetxattr": _fsetxattr,
}
