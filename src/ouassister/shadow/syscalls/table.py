"""The support table of system calls: every one that x86 has, and who answers it in the shadow.

What stands in no row is a call that did not exist when the table was written: it fails with
ENOSYS, as on an older kernel, and is reported. Programs of the x32 ABI and of other
architectures are killed.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ouassister.shadow.syscalls.numbers import I386, X86_64
from ouassister.shadow.syscalls.policy import GROUPS


class Answer(StrEnum):
    """Who answers a call, and how."""

    FULL = "full"  # the host's kernel, inside of the shadow's namespaces
    PARTIAL = "partial"  # the host's kernel, with a difference that the note tells
    EMULATED = "emulated"  # a handler, from the guest's kernel
    RECORDED = "recorded"  # a handler: written down for the guest, not done here
    ELIDED = "elided"  # returns 0 and does nothing
    DENIED = "denied"  # fails with ``errno``, and is reported
    ABSENT = "absent"  # fails with ENOSYS, as from a kernel without it


NOTIFIED: Final = frozenset((Answer.EMULATED, Answer.RECORDED, Answer.DENIED))
"""Answers that are given by the supervisor; the filter gives the others."""


@dataclass(frozen=True, slots=True)
class GuestPid:
    """Matches when an argument is the pid of a guest's process; ``groups``: or a group's, or -1.

    Pids of the shadow start above all of the guest's.
    """

    arg: int
    groups: bool = False


@dataclass(frozen=True, slots=True)
class Bits:
    """Matches when ``low <= (argument & mask) <= high``; arguments are taken as 32 bits."""

    arg: int
    low: int
    high: int
    mask: int = 0xFFFF_FFFF


Condition = GuestPid | Bits


@dataclass(frozen=True, slots=True)
class Row:
    """One system call: its numbers per ABI (None where it does not exist), and its answer.

    With conditions, ``answer`` holds where one of them does; every other call goes to the host's
    kernel. Rows without conditions are decided by the number alone, which lets the kernel
    remember that a call is allowed and skip the filter (kernel/seccomp.c,
    ``seccomp_cache_check_allow``, since Linux 5.11).
    """

    name: str
    x86_64: int | None
    i386: int | None
    answer: Answer
    note: str
    errno: int = 0
    when: tuple[Condition, ...] = ()

    @property
    def label(self) -> str:
        """The answer in words: with its error, and whether it holds for some arguments alone."""
        error = f" {errno.errorcode[self.errno]}" if self.answer is Answer.DENIED else ""
        return f"{self.answer}{error}{' in part' if self.when else ''}"


def _condition(text: str) -> Condition:
    """Read one of the forms that `policy` has."""
    kind, _, rest = text.partition(" ")
    numbers = [int(word, 0) for word in rest.split()]
    match kind:
        case "pid":
            return GuestPid(numbers[0])
        case "group":
            return GuestPid(numbers[0], groups=True)
        case "is":
            return Bits(numbers[0], numbers[1], numbers[1])
        case "flag":
            return Bits(numbers[0], 1, 0xFFFF_FFFF, numbers[1])
        case "type":
            return Bits(numbers[0], numbers[1], numbers[1], 0o170000)
    raise ValueError(text)


def _rows() -> tuple[Row, ...]:
    rows = []
    for head, note, names in GROUPS:
        word, *conditions = head.split(" if ")
        answer, _, error = word.partition(" ")
        when = tuple(_condition(one) for one in conditions[0].split(" or ")) if conditions else ()
        code = getattr(errno, error) if error else 0
        if answer == Answer.ABSENT:
            code = errno.ENOSYS
        rows += [
            Row(name, X86_64.get(name), I386.get(name), Answer(answer), note, code, when)
            for name in names.split()
        ]
    return tuple(rows)


TABLE: Final[tuple[Row, ...]] = _rows()
ROWS: Final = {row.name: row for row in TABLE}
