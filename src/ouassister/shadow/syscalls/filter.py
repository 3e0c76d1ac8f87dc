"""The seccomp program that the support table compiles to.

Source: Linux Documentation/userspace-api/seccomp_filter.rst, include/uapi/linux/{seccomp,filter}.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ouassister.shadow.syscalls.table import TABLE, Answer, Row

if TYPE_CHECKING:
    from collections.abc import Iterable

AUDIT_ARCH_X86_64 = 0xC000003E
AUDIT_ARCH_I386 = 0x40000003
_X32_BIT = 0x40000000

_RET_KILL_PROCESS = 0x80000000
_RET_USER_NOTIF = 0x7FC00000
_RET_ERRNO = 0x00050000
_RET_ALLOW = 0x7FFF0000

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_OFFSET_NUMBER, _OFFSET_ARCH = 0, 4  # struct seccomp_data


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _verdict(row: Row) -> int:
    if row.answer is Answer.NOTIFY:
        return _RET_USER_NOTIF
    return _RET_ERRNO | row.errno  # errno 0: the call returns 0


def _section(rows: Iterable[tuple[int, Row]]) -> bytes:
    code = b""
    for number, row in rows:
        code += _instruction(_JUMP_EQUAL, number, 0, 1) + _instruction(_RETURN, _verdict(row))
    return code + _instruction(_RETURN, _RET_ALLOW)


def build_filter() -> bytes:
    """Compile the table; programs of the x32 ABI and of unknown architectures are killed."""
    native = (
        _instruction(_LOAD, _OFFSET_NUMBER)
        + _instruction(_JUMP_AT_LEAST, _X32_BIT, 0, 1)
        + _instruction(_RETURN, _RET_KILL_PROCESS)
        + _section((row.x86_64, row) for row in TABLE if row.x86_64 is not None)
    )
    compat = _instruction(_LOAD, _OFFSET_NUMBER) + _section(
        (row.i386, row) for row in TABLE if row.i386 is not None
    )
    return (
        _instruction(_LOAD, _OFFSET_ARCH)
        + _instruction(_JUMP_EQUAL, AUDIT_ARCH_X86_64, 0, len(native) // 8)
        + native
        + _instruction(_JUMP_EQUAL, AUDIT_ARCH_I386, 1, 0)
        + _instruction(_RETURN, _RET_KILL_PROCESS)
        + compat
    )
