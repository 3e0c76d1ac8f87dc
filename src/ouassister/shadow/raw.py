"""System calls that Python's standard library lacks; with libext2fs the only use of ctypes.

Numbers are those of x86-64 (Linux arch/x86/entry/syscalls/syscall_64.tbl); `require_x86_64` is
called once by who starts a shadow. Every function raises `OSError` with the kernel's errno.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Final

from ouassister.errors import HostNotReadyError

# include/uapi/linux/sched.h
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

# include/uapi/linux/mount.h
MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MNT_DETACH: Final = 0x2

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4

_NR_PIVOT_ROOT: Final = 155
_NR_SECCOMP: Final = 317
_NR_OPEN_TREE: Final = 428
_NR_MOVE_MOUNT: Final = 429
_NR_OPENAT2: Final = 437
_NR_MOUNT_SETATTR: Final = 442
_OPEN_TREE_CLONE: Final = 1  # include/uapi/linux/mount.h, as the next three
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_MOUNT_ATTR_INERT: Final = 0x1 | 0x2 | 0x4  # RDONLY, NOSUID, NODEV
_MOUNT_ATTR_IDMAP: Final = 0x00100000
_AT_FDCWD: Final = -100  # include/uapi/linux/fcntl.h
_AT_EMPTY_PATH: Final = 0x1000
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_RESOLVE_NO_SYMLINKS: Final = 0x04  # include/uapi/linux/openat2.h
_RESOLVE_BENEATH: Final = 0x08
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5  # since Linux 6.0
_SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def require_x86_64() -> None:
    """Refuse a host whose system call numbers these are not.

    Raises:
        HostNotReadyError: The host is not x86-64.
    """
    if platform.machine() != "x86_64":
        raise HostNotReadyError(f"the host is {platform.machine()}; shadows run on x86_64 only")


def _check(result: int, what: str = "") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what or None)
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces that ``flags`` name."""
    _check(_libc.unshare(flags), "unshare")


def setns(descriptor: int, flags: int) -> None:
    """Join a namespace.

    Args:
        descriptor: Of a namespace; that of pids is joined by children alone.
        flags: What kind it must be; 0 for any.
    """
    _check(_libc.setns(descriptor, flags), "setns")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """Mount a file system; ``OSError.filename`` is the target."""
    arguments = [os.fsencode(item) or None for item in (source, target, fstype)]
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None), target)


def open_part(folder: int, inside: bytes) -> int:
    """Open what lies below a folder as a place (O_PATH); a symbolic link on the way is an error.

    Args:
        folder: Descriptor.
        inside: Path from there, with or without a leading slash.
    """
    how = struct.pack("<QQQ", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
    path = inside.lstrip(b"/") or b"."
    result = _libc.syscall(_NR_OPENAT2, folder, path, how, ctypes.c_size_t(len(how)))
    return _check(result, os.fsdecode(inside))


def umount(target: str, flags: int = 0) -> None:
    """Detach a mount."""
    _check(_libc.umount2(target.encode(), flags), target)


def clone_mapped(folder: int, user_namespace: int) -> int:
    """Clone the part of a mount below a folder: read-only, inert, with other owners.

    Args:
        folder: Descriptor.
        user_namespace: Descriptor; what id 0 is on disk is its id 0.

    Returns:
        Descriptor of a mount that is nowhere yet; see `attach`.
    """
    empty = ctypes.c_char_p(b"")
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
    tree = _check(_libc.syscall(_NR_OPEN_TREE, folder, empty, ctypes.c_uint(flags)), "open_tree")
    attributes = struct.pack("<QQQQ", _MOUNT_ATTR_INERT | _MOUNT_ATTR_IDMAP, 0, 0, user_namespace)
    size = ctypes.c_size_t(len(attributes))
    try:
        done = _libc.syscall(_NR_MOUNT_SETATTR, tree, empty, _AT_EMPTY_PATH, attributes, size)
        _check(done, "mount_setattr")
    except OSError:
        os.close(tree)
        raise
    return tree


def clone_place(path: str) -> int:
    """Clone the mount of one place, which may be a symbolic link itself; see `attach`."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_SYMLINK_NOFOLLOW
    done = _libc.syscall(_NR_OPEN_TREE, _AT_FDCWD, path.encode(), ctypes.c_uint(flags))
    return _check(done, path)


def attach(tree: int, target: str) -> None:
    """Put a cloned mount in its place; a symbolic link there is covered, not followed."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH
    done = _libc.syscall(
        _NR_MOVE_MOUNT, tree, ctypes.c_char_p(b""), _AT_FDCWD, target.encode(), flags
    )
    _check(done, target)


def pivot_root(new_root: str, put_old: str) -> None:
    """Make a mount the root of the mount namespace."""
    _check(_libc.syscall(_NR_PIVOT_ROOT, new_root.encode(), put_old.encode()), new_root)


def sethostname(name: bytes) -> None:
    """Set the host name of the calling process's UTS namespace."""
    _check(_libc.sethostname(name, ctypes.c_size_t(len(name))), "sethostname")


def setdomainname(name: bytes) -> None:
    """Set the NIS domain name of the calling process's UTS namespace."""
    _check(_libc.setdomainname(name, ctypes.c_size_t(len(name))), "setdomainname")


def prctl(option: int, value: int) -> None:
    """Set one attribute of the calling process."""
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), "prctl")


def seccomp_listener(program: bytes) -> int:
    """Install a filter in the calling thread and return its notification descriptor.

    Args:
        program: ``struct sock_filter`` records, 8 bytes each.
    """
    instructions = ctypes.create_string_buffer(program, len(program))
    sock_fprog = struct.pack("<H6xQ", len(program) // 8, ctypes.addressof(instructions))
    # Once a call was received, only a deadly signal interrupts it: it is not made twice.
    flags = _SECCOMP_FILTER_FLAG_NEW_LISTENER | _SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    made = _libc.syscall(_NR_SECCOMP, _SECCOMP_SET_MODE_FILTER, flags, sock_fprog)
    if made < 0 and ctypes.get_errno() == errno.EINVAL:
        flags = _SECCOMP_FILTER_FLAG_NEW_LISTENER
        made = _libc.syscall(_NR_SECCOMP, _SECCOMP_SET_MODE_FILTER, flags, sock_fprog)
    return _check(made, "seccomp")
