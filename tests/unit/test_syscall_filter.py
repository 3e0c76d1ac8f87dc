"""The seccomp program, run by a small interpreter of classic BPF: each row's verdict, each way in.

Source: Linux Documentation/networking/filter.rst and net/core/filter.c (``bpf_check_classic``);
kernel/seccomp.c (``seccomp_is_const_allow``: which instructions leave a verdict to be remembered).
"""

from __future__ import annotations

import re
import struct
from typing import Final

import pytest

from ouassister.shadow import sandbox
from ouassister.shadow.syscalls import filter as bpf
from ouassister.shadow.syscalls.table import NOTIFIED, TABLE, Answer, Bits, Condition, Row

Instruction = tuple[int, int, int, int]


def decode(program: bytes) -> list[Instruction]:
    return [struct.unpack("<HBBI", raw) for raw in re.findall(b"(?s).{8}", program)]


PROGRAM: Final = decode(bpf.build_filter())
NATIVE, COMPAT = bpf.AUDIT_ARCH_X86_64, bpf.AUDIT_ARCH_I386
ALLOW, KILL, NOTIFY, ERRNO = 0x7FFF0000, 0x80000000, 0x7FC00000, 0x00050000
FIRST: Final = sandbox.FIRST_PID
KNOWN: Final = {NATIVE: "x86_64", COMPAT: "i386"}


class ArgumentsReadError(Exception):
    """The verdict depends on more than the number."""


def verdict(
    number: int,
    arch: int,
    *arguments: int,
    program: list[Instruction] = PROGRAM,
    by_number: bool = False,
) -> int:
    """What the kernel would do with this ``struct seccomp_data``."""
    whole = [value & (1 << 64) - 1 for value in (*arguments, 0, 0, 0, 0, 0, 0)][:6]
    data = struct.pack("<iIQ6Q", number, arch, 0x400000, *whole)
    accumulator, at = 0, 0
    for _step in range(len(program) + 1):
        code, if_true, if_false, value = program[at]
        at += 1
        match code:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS: aligned, inside of the structure
                assert value % 4 == 0
                assert value + 4 <= len(data)
                if by_number and value > 4:
                    raise ArgumentsReadError
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                accumulator &= value
            case 0x05:  # BPF_JMP | BPF_JA
                at += value
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
                at += if_true if accumulator == value else if_false
            case 0x25:  # BPF_JMP | BPF_JGT | BPF_K
                at += if_true if accumulator > value else if_false
            case 0x35:  # BPF_JMP | BPF_JGE | BPF_K
                at += if_true if accumulator >= value else if_false
            case 0x06:  # BPF_RET | BPF_K
                return int(value)
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")
    raise AssertionError("the program goes round")


def numbers(row: Row) -> list[tuple[int, int]]:
    found = [(row.x86_64, NATIVE), (row.i386, COMPAT)]
    return [(number, arch) for number, arch in found if number is not None]


def fulfilling(condition: Condition) -> list[tuple[int, ...]]:
    """Arguments that fulfil a condition: both ends, with the upper half set too."""
    values = [edge for pair in bpf.bounds(condition, FIRST) for edge in pair]
    if isinstance(condition, Bits) and condition.mask != 0xFFFF_FFFF:
        kept = condition.mask if condition.low == 1 else condition.low
        values = [kept, kept | ~condition.mask & 0xFFFF_FFFF]
    return [(0,) * condition.arg + (value | high,) for value in values for high in (0, 7 << 32)]


@pytest.mark.parametrize("answer", Answer)
def test_rows_have_their_verdict_in_both_abis(answer: Answer) -> None:
    rows = [one for one in TABLE if one.answer is answer]
    assert rows
    for row, (number, arch) in [(one, pair) for one in rows for pair in numbers(one)]:
        if row.when:
            assert verdict(number, arch) == ALLOW
            for condition in row.when:
                for arguments in fulfilling(condition):
                    assert verdict(number, arch, *arguments) == NOTIFY, arguments
        elif row.answer in NOTIFIED:
            assert verdict(number, arch) == NOTIFY
        elif row.answer in (Answer.FULL, Answer.PARTIAL):
            assert verdict(number, arch) == ALLOW
        else:
            assert verdict(number, arch) == ERRNO | row.errno


def test_kernel_can_remember_what_the_number_decides() -> None:
    decided = [pair for row in TABLE if not row.when for pair in numbers(row)]
    assert len(decided) > 700
    for number, arch in decided:
        assert verdict(number, arch, by_number=True) == verdict(number, arch)


def test_arguments_are_seen_to_be_read() -> None:
    with pytest.raises(ArgumentsReadError):
        verdict(62, NATIVE, by_number=True)  # kill


def test_signals_to_own_processes_are_the_kernel_s() -> None:
    for pid in (0, FIRST, FIRST + 1, 1 << 22, -FIRST, -(1 << 22)):
        assert verdict(62, NATIVE, pid) == verdict(37, COMPAT, pid & 0xFFFF_FFFF) == ALLOW
    for pid in (1, 571, FIRST - 1, -1, -571, 1 - FIRST):
        assert verdict(62, NATIVE, pid) == verdict(37, COMPAT, pid & 0xFFFF_FFFF) == NOTIFY


def test_pids_above_all_of_the_guest_s_are_nobody_s_and_the_kernel_says_so() -> None:
    program = decode(bpf.build_filter(572))
    for pid in (0, 572, FIRST - 1, FIRST, -572, 1 - FIRST):
        assert verdict(62, NATIVE, pid, program=program) == ALLOW
    for pid in (1, 571, -1, -571):
        assert verdict(62, NATIVE, pid, program=program) == NOTIFY


def test_without_high_pids_no_pid_is_the_guest_s() -> None:
    program = decode(bpf.build_filter(bpf.ALL_PIDS))
    for pid in (0, 1, 571, FIRST, -1):
        assert verdict(62, NATIVE, pid, program=program) == ALLOW
    assert verdict(56, NATIVE, 0x10000000, program=program) == NOTIFY  # clone, CLONE_NEWUSER


def test_only_a_new_user_namespace_is_kept_from_clone() -> None:
    for flags in (0, 17, 0x4111, 0x3D0F00, 0x00020000, 0x20000000, 0x6C020000):
        assert verdict(56, NATIVE, flags) == verdict(120, COMPAT, flags) == ALLOW
        assert verdict(56, NATIVE, flags | 0x10000000) == NOTIFY
        assert verdict(272, NATIVE, flags | 0x10000000) == NOTIFY


def test_only_device_nodes_are_kept_from_mknod() -> None:
    fates = {0: ALLOW, 0o010000: ALLOW, 0o100000: ALLOW, 0o140000: ALLOW}
    for kind, wanted in (fates | {0o020000: NOTIFY, 0o060000: NOTIFY}).items():
        for mode in (kind, kind | 0o7777):
            assert verdict(133, NATIVE, 1 << 40, mode) == wanted
            assert verdict(297, COMPAT, 0, 1, mode) == wanted


@pytest.mark.parametrize("arch", [NATIVE, COMPAT])
def test_every_other_number_is_told_to_the_supervisor(arch: int) -> None:
    listed = {getattr(row, KNOWN[arch]) for row in TABLE}
    for number in (*range(1024), 0x3FFFFFFF):
        if number not in listed:
            assert verdict(number, arch) == NOTIFY, number


def test_x32_programs_are_killed() -> None:
    for number in (0, 63, 512, 547, 0x3FFFFFFF):
        assert verdict(number | 0x40000000, NATIVE) == KILL
    assert verdict(-1, NATIVE) == KILL  # a number that ptrace(2) may set


def test_large_numbers_of_32_bit_programs_are_unknown() -> None:
    for number in (-1, 0x40000000, 0x40000000 | 122):
        assert verdict(number, COMPAT) == NOTIFY


def test_foreign_architectures_are_killed() -> None:
    for arch in (0, 0xC00000B7, 0x40000028, 0xC000003D, NATIVE ^ 0x80000000, 0xFFFFFFFF):
        for number in (0, 1, 63, 122, 425):
            assert verdict(number, arch) == KILL


def test_program_is_valid_for_the_kernel() -> None:
    assert 0 < len(PROGRAM) <= 4096  # BPF_MAXINSNS
    assert PROGRAM[-1][0] == 0x06
    for at, (code, if_true, if_false, value) in enumerate(PROGRAM):
        assert code in (0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x06)
        if code in (0x15, 0x25, 0x35):
            assert at + 1 + max(if_true, if_false) < len(PROGRAM)
        if code == 0x05:
            assert at + 1 + value < len(PROGRAM)


def test_search_is_short() -> None:
    """What the kernel does not remember costs the whole way; a list would be 600 steps long."""
    for number, arch in (pair for row in TABLE for pair in numbers(row)):
        assert steps(number, arch) <= 25, number


def steps(number: int, arch: int) -> int:
    """Instructions of a call whose arguments fulfil no condition."""
    count, at, accumulator = 0, 0, 0
    data = struct.pack("<iIQ6Q", number, arch, 0, *(0,) * 6)
    while True:
        code, if_true, if_false, value = PROGRAM[at]
        at, count = at + 1, count + 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            return count
        elif code == 0x05:
            at += value
        elif code == 0x54:
            accumulator &= value
        else:
            test = {0x15: accumulator == value, 0x25: accumulator > value}
            at += if_true if test.get(code, accumulator >= value) else if_false
