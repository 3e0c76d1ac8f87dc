"""Serves seccomp user notifications: one call at a time, arguments copied, results injected.

Source: Linux include/uapi/linux/seccomp.h (``struct seccomp_notif`` and its ioctls).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ouassister.shadow.syscalls.filter import AUDIT_ARCH_I386

_NOTIF = struct.Struct("<QIIiIQ6Q")  # id, pid, flags, nr, arch, instruction pointer, args
_RESPONSE = struct.Struct("<QqiI")  # id, val, error, flags
_IOCTL_RECV = 0xC0502100  # SECCOMP_IOCTL_NOTIF_RECV: _IOWR('!', 0, struct seccomp_notif)
_IOCTL_SEND = 0xC0182101  # SECCOMP_IOCTL_NOTIF_SEND: _IOWR('!', 1, struct seccomp_notif_resp)
_IOCTL_ID_VALID = 0x40082102  # SECCOMP_IOCTL_NOTIF_ID_VALID: _IOW('!', 2, __u64)


@dataclass(frozen=True, slots=True)
class Call:
    """One intercepted system call of a process that waits for the answer."""

    cookie: int
    pid: int  # in the reader's pid namespace
    compat: bool  # a 32-bit program
    number: int
    args: tuple[int, ...]


Handler = Callable[[int, Call], int]
"""Takes the listener and the call; returns the result, or raises OSError to fail the call."""


def serve_one(listener: int, handlers: dict[tuple[bool, int], Handler]) -> None:
    """Answer the next call that waits at the listener; a caller that died is no error."""
    request = bytearray(_NOTIF.size)  # the kernel demands zeroes
    try:
        fcntl.ioctl(listener, _IOCTL_RECV, request)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return  # the caller was killed between poll and here
        raise
    cookie, pid, _flags, number, arch, _ip, *args = _NOTIF.unpack(request)
    call = Call(cookie, pid, arch == AUDIT_ARCH_I386, number, tuple(args))
    result, failure = 0, 0
    try:
        handler = handlers.get((call.compat, number))
        if handler is None:
            raise OSError(errno.ENOSYS, "no handler")
        result = handler(listener, call)
    except OSError as error:
        failure = -(error.errno or errno.EIO)
    try:
        fcntl.ioctl(listener, _IOCTL_SEND, bytearray(_RESPONSE.pack(cookie, result, failure, 0)))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def write_memory(listener: int, call: Call, address: int, data: bytes) -> None:
    """Write into the caller's memory.

    The cookie is checked after the memory is open: from then on the descriptor belongs to the
    caller, even when its pid is used again.

    Raises:
        OSError: EFAULT for a bad address, ESRCH when the caller is gone.
    """
    descriptor = os.open(f"/proc/{call.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(listener, _IOCTL_ID_VALID, struct.pack("<Q", call.cookie))
        try:
            written = os.pwrite(descriptor, data, address)
        except (OSError, OverflowError) as error:
            raise OSError(errno.EFAULT, "bad address") from error
        if written != len(data):
            raise OSError(errno.EFAULT, "bad address")
    finally:
        os.close(descriptor)
