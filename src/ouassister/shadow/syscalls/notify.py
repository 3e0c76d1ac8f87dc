"""Serves seccomp user notifications: one call at a time, arguments copied, results injected.

Source: Linux include/uapi/linux/seccomp.h (``struct seccomp_notif`` and its ioctls),
kernel/seccomp.c (``seccomp_do_user_notification``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from ouassister.shadow.syscalls.filter import AUDIT_ARCH_I386

_NOTIF: Final = struct.Struct("<QIIiIQ6Q")  # id, pid, flags, nr, arch, instruction pointer, args
_RESPONSE: Final = struct.Struct("<QqiI")  # id, val, error, flags
_ADDFD: Final = struct.Struct("<QIIII")  # id, flags, srcfd, newfd, newfd_flags
_IOCTL_RECV: Final = 0xC0502100  # SECCOMP_IOCTL_NOTIF_RECV: _IOWR('!', 0, struct seccomp_notif)
_IOCTL_SEND: Final = 0xC0182101  # SECCOMP_IOCTL_NOTIF_SEND: _IOWR('!', 1, struct ..._resp)
_IOCTL_ID_VALID: Final = 0x40082102  # SECCOMP_IOCTL_NOTIF_ID_VALID: _IOW('!', 2, __u64)
_IOCTL_ADDFD: Final = 0x40182103  # SECCOMP_IOCTL_NOTIF_ADDFD: _IOW('!', 3, struct ..._addfd)
_CONTINUE: Final = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_ADDFD_SEND: Final = 2  # SECCOMP_ADDFD_FLAG_SEND
_PAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class Call:
    """One intercepted system call of a thread that waits for the answer."""

    cookie: int
    pid: int  # of the thread, in the reader's pid namespace
    compat: bool  # a 32-bit program
    number: int
    args: tuple[int, ...]

    def signed(self, index: int) -> int:
        """An argument that the kernel takes as ``int``."""
        value = self.args[index] & 0xFFFF_FFFF
        return value - (1 << 32) if value >> 31 else value

    def unsigned(self, index: int) -> int:
        """An argument that the kernel takes as ``unsigned int``."""
        return self.args[index] & 0xFFFF_FFFF


class Pass(Enum):
    """The host's kernel does the call itself.

    Only for what is safe whatever another thread of the caller makes of the memory that it points
    to: numbers alone, or a call that the kernel judges by its own rules anyway.
    """

    CONTINUE = 1


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The result is a copy of a descriptor of ours; ours is closed then."""

    descriptor: int
    close_on_exec: bool = True


Result = int | Pass | Descriptor
Handler = Callable[[int, Call], Result]
"""Takes the listener and the call; raises OSError to fail the call with its number."""


class Table(Protocol):
    """Finds who answers a call."""

    def find(self, call: Call) -> Handler:
        """The handler of a call; there is always one."""


def serve_one(listener: int, table: Table) -> bool:
    """Answer the next call that waits at the listener; a caller that died is no error.

    Returns:
        Whether there may be more: False when no process has the filter any more. Then the listener
        is ready for ever, with POLLHUP (kernel/seccomp.c, ``seccomp_notify_poll``), and to ask it
        fails at once with ENOENT, or blocks before Linux 6.11.
    """
    waits = select.poll()
    waits.register(listener, select.POLLIN)
    events = dict(waits.poll(0)).get(listener, 0)
    if not events & select.POLLIN:
        return not events
    request = bytearray(_NOTIF.size)  # the kernel demands zeroes
    try:
        fcntl.ioctl(listener, _IOCTL_RECV, request)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return True  # the caller was killed between poll and here
        raise
    cookie, pid, _flags, number, arch, _ip, *args = _NOTIF.unpack(request)
    call = Call(cookie, pid, arch == AUDIT_ARCH_I386, number, tuple(args))
    try:
        result = table.find(call)(listener, call)
    except OSError as error:
        _send(listener, _IOCTL_SEND, _RESPONSE.pack(cookie, 0, -(error.errno or errno.EIO), 0))
        return True
    match result:
        case Pass.CONTINUE:
            _send(listener, _IOCTL_SEND, _RESPONSE.pack(cookie, 0, 0, _CONTINUE))
        case Descriptor(descriptor, close_on_exec):
            flags = os.O_CLOEXEC if close_on_exec else 0
            copy = _ADDFD.pack(cookie, _ADDFD_SEND, descriptor, 0, flags)
            try:
                _send(listener, _IOCTL_ADDFD, copy)
            finally:
                os.close(descriptor)
        case _:
            _send(listener, _IOCTL_SEND, _RESPONSE.pack(cookie, result, 0, 0))
    return True


def _send(listener: int, request: int, answer: bytes) -> None:
    try:
        fcntl.ioctl(listener, request, bytearray(answer))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def check(listener: int, call: Call) -> None:
    """Make sure that the caller still waits: what was opened by its pid before is its own.

    Raises:
        OSError: It does not; ENOENT.
    """
    fcntl.ioctl(listener, _IOCTL_ID_VALID, struct.pack("<Q", call.cookie))


def write_memory(listener: int, call: Call, address: int, data: bytes) -> None:
    """Write into the caller's memory.

    The cookie is checked after the memory is open: from then on the descriptor belongs to the
    caller, even when its pid is used again.

    Raises:
        OSError: EFAULT for a bad address, ENOENT when the caller is gone.
    """
    descriptor = os.open(f"/proc/{call.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        check(listener, call)
        try:
            written = os.pwrite(descriptor, data, address)
        except (OSError, OverflowError) as error:
            raise OSError(errno.EFAULT, "bad address") from error
        if written != len(data):
            raise OSError(errno.EFAULT, "bad address")
    finally:
        os.close(descriptor)


def read_memory(listener: int, call: Call, address: int, size: int) -> bytes:
    """Copy out of the caller's memory.

    Raises:
        OSError: EFAULT for a bad address, ENOENT when the caller is gone.
    """
    descriptor = os.open(f"/proc/{call.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        check(listener, call)
        data = _read(descriptor, address, size)
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise OSError(errno.EFAULT, "bad address")
    return data


def read_string(listener: int, call: Call, address: int, limit: int = _PAGE) -> bytes:
    """Copy a string out of the caller's memory, without its end.

    Args:
        listener: The listener.
        call: The call.
        address: Of its first byte.
        limit: Bytes, with the end.

    Raises:
        OSError: EFAULT for a bad address, ENAMETOOLONG without an end, ENOENT for no caller.
    """
    descriptor = os.open(f"/proc/{call.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    found = b""
    try:
        check(listener, call)
        while len(found) < limit:
            at = address + len(found)
            # Not over the end of a page: the next one may not be there.
            part = _read(descriptor, at, min(_PAGE - at % _PAGE, limit - len(found)))
            text, end, _rest = part.partition(b"\0")
            found += text
            if end:
                return found
    finally:
        os.close(descriptor)
    raise OSError(errno.ENAMETOOLONG, "no end of a string")


def _read(descriptor: int, address: int, size: int) -> bytes:
    try:
        data = os.pread(descriptor, size, address)
    except (OSError, OverflowError) as error:
        raise OSError(errno.EFAULT, "bad address") from error
    if not data and size:
        raise OSError(errno.EFAULT, "bad address")
    return data
