"""The seccomp program that the support table compiles to: a binary search over runs of numbers.

Every number is decided after some nine comparisons. Rows that look at arguments load them at the
end of the search only, so that the kernel can prove all others to be allowed by their number and
skip the program for them.

Source: Linux Documentation/userspace-api/seccomp_filter.rst, include/uapi/linux/{seccomp,filter}.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ouassister.errors import InternalError
from ouassister.shadow import sandbox
from ouassister.shadow.syscalls.table import NOTIFIED, TABLE, Answer, Bits, Condition, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

AUDIT_ARCH_X86_64: Final = 0xC000003E
AUDIT_ARCH_I386: Final = 0x40000003
ALL_PIDS: Final = 1
"""The first pid of a shadow whose pids are not above the guest's: none is the guest's then."""

_X32_BIT: Final = 0x40000000
_WORD: Final = 0xFFFF_FFFF

_RET_KILL_PROCESS: Final = 0x80000000
_RET_USER_NOTIF: Final = 0x7FC00000
_RET_ERRNO: Final = 0x00050000
_RET_ALLOW: Final = 0x7FFF0000

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP: Final = 0x05  # BPF_JMP | BPF_JA
_JUMP_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_JUMP_ABOVE: Final = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_OFFSET_NUMBER, _OFFSET_ARCH, _OFFSET_ARGS = 0, 4, 16  # struct seccomp_data
_LONGEST_JUMP: Final = 255
_MAX_PROGRAM: Final = 4096  # BPF_MAXINSNS

Program = tuple[bytes, ...]


def build_filter(first_pid: int = sandbox.FIRST_PID) -> bytes:
    """Compile the table.

    Args:
        first_pid: The guest's pids are below, and calls about others are the kernel's.

    Raises:
        InternalError: The table is too large for the kernel.
    """
    number = _instruction(_LOAD, _OFFSET_NUMBER)
    kill = _instruction(_RETURN, _RET_KILL_PROCESS)
    native = _search(_runs({row.x86_64: row for row in TABLE}, first_pid))
    compat = _search(_runs({row.i386: row for row in TABLE}, first_pid))
    program = (
        _instruction(_LOAD, _OFFSET_ARCH),
        _instruction(_JUMP_EQUAL, AUDIT_ARCH_X86_64, 3, 0),
        _instruction(_JUMP_EQUAL, AUDIT_ARCH_I386, 0, 1),
        _instruction(_JUMP, len(native) + 4),  # its offset has 32 bits
        kill,
        number,
        _instruction(_JUMP_AT_LEAST, _X32_BIT, 0, 1),
        kill,
        *native,
        number,
        *compat,
    )
    if len(program) > _MAX_PROGRAM:
        raise InternalError(f"the system call filter has {len(program)} instructions")
    return b"".join(program)


def _runs(rows: dict[int | None, Row], first_pid: int) -> list[tuple[int, Program]]:
    """First numbers of runs that share their fate, with it; what has no row is notified."""
    runs: list[tuple[int, Program]] = []
    end = 1 + max(number for number in rows if number is not None)
    for number in range(end + 1):
        fate = _fate(rows.get(number), first_pid)
        if not runs or runs[-1][1] != fate:
            runs.append((number, fate))
    return runs


def _search(runs: list[tuple[int, Program]]) -> Program:
    if len(runs) == 1:
        return runs[0][1]
    middle = len(runs) // 2
    below, above = _search(runs[:middle]), _search(runs[middle:])
    first = runs[middle][0]
    if len(below) <= _LONGEST_JUMP:
        return (_instruction(_JUMP_AT_LEAST, first, len(below), 0), *below, *above)
    over = _instruction(_JUMP, len(below))
    return (_instruction(_JUMP_AT_LEAST, first, 0, 1), over, *below, *above)


def _fate(row: Row | None, first_pid: int) -> Program:
    notify = _instruction(_RETURN, _RET_USER_NOTIF)
    allow = _instruction(_RETURN, _RET_ALLOW)
    if row is None:
        return (notify,)
    if row.when:
        return (*(one for test in row.when for one in _test(test, first_pid)), allow)
    if row.answer in NOTIFIED:
        return (notify,)
    if row.answer in (Answer.ELIDED, Answer.ABSENT):  # error 0: the call returns 0
        return (_instruction(_RETURN, _RET_ERRNO | row.errno),)
    return (allow,)


def _test(condition: Condition, first_pid: int) -> Iterator[bytes]:
    """Return to the supervisor when the condition holds, otherwise go on."""
    mask = condition.mask if isinstance(condition, Bits) else _WORD
    for low, high in bounds(condition, first_pid):
        yield _instruction(_LOAD, _OFFSET_ARGS + 8 * condition.arg)  # the lower half
        if mask != _WORD:
            yield _instruction(_AND, mask)
        yield _instruction(_JUMP_AT_LEAST, low, 0, 2)
        yield _instruction(_JUMP_ABOVE, high, 1, 0)
        yield _instruction(_RETURN, _RET_USER_NOTIF)


def bounds(condition: Condition, first_pid: int) -> list[tuple[int, int]]:
    """The ranges, both ends included, in which an argument fulfils a condition."""
    if isinstance(condition, Bits):
        return [(condition.low, condition.high)]
    if first_pid <= ALL_PIDS:
        return []
    below = [(1, first_pid - 1)]
    return [*below, (_WORD + 2 - first_pid, _WORD)] if condition.groups else below


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
