"""The seccomp program, run by a small interpreter of classic BPF: each row's verdict, each way in.

Source: Linux Documentation/networking/filter.rst and net/core/filter.c (``bpf_check_classic``).
"""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from ouassister.shadow.syscalls import filter as bpf
from ouassister.shadow.syscalls.table import TABLE, Answer, Row

PROGRAM = [struct.unpack("<HBBI", raw) for raw in re.findall(b"(?s).{8}", bpf.build_filter())]
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "support.md"
NATIVE, COMPAT = bpf.AUDIT_ARCH_X86_64, bpf.AUDIT_ARCH_I386
ALLOW, KILL, NOTIFY, ERRNO = 0x7FFF0000, 0x80000000, 0x7FC00000, 0x00050000


def verdict(number: int, arch: int, argument: int = 0) -> int:
    """What the kernel would do with this ``struct seccomp_data``."""
    data = struct.pack("<iIQ6Q", number, arch, 0x400000, *(argument,) * 6)
    accumulator, at = 0, 0
    for _step in range(len(PROGRAM) + 1):
        code, if_true, if_false, value = PROGRAM[at]
        at += 1
        match code:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS: aligned, inside of the structure
                assert value % 4 == 0
                assert value + 4 <= len(data)
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
                at += if_true if accumulator == value else if_false
            case 0x35:  # BPF_JMP | BPF_JGE | BPF_K
                at += if_true if accumulator >= value else if_false
            case 0x06:  # BPF_RET | BPF_K
                return int(value)
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")
    raise AssertionError("the program goes round")


def expected(row: Row) -> int:
    if row.answer is Answer.NOTIFY:
        return NOTIFY
    return ERRNO | row.errno


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_row_has_its_verdict_on_both_architectures(row: Row) -> None:
    if row.x86_64 is not None:
        assert verdict(row.x86_64, NATIVE) == expected(row)
        assert verdict(row.x86_64, NATIVE, argument=2**64 - 1) == expected(row)
    if row.i386 is not None:
        assert verdict(row.i386, COMPAT) == expected(row)


@pytest.mark.parametrize("arch", [NATIVE, COMPAT])
def test_every_other_number_goes_to_the_kernel(arch: int) -> None:
    listed = {row.x86_64 if arch == NATIVE else row.i386 for row in TABLE}
    for number in (*range(1024), 0x3FFFFFFF):
        if number not in listed:
            assert verdict(number, arch) == ALLOW, number


def test_x32_programs_are_killed() -> None:
    for number in (0, 63, 512, 547, 0x3FFFFFFF):
        assert verdict(number | 0x40000000, NATIVE) == KILL
    assert verdict(-1, NATIVE) == KILL  # a number that ptrace(2) may set


def test_foreign_architectures_are_killed() -> None:
    for arch in (0, 0xC00000B7, 0x40000028, 0xC000003D, NATIVE ^ 0x80000000, 0xFFFFFFFF):
        for number in (0, 1, 63, 122, 425):
            assert verdict(number, arch) == KILL


def test_program_is_valid_for_the_kernel() -> None:
    assert 0 < len(PROGRAM) <= 4096  # BPF_MAXINSNS
    assert PROGRAM[-1][0] == 0x06
    for at, (code, if_true, if_false, _value) in enumerate(PROGRAM):
        assert code in (0x20, 0x15, 0x35, 0x06)
        if code in (0x15, 0x35):
            assert at + 1 + max(if_true, if_false) < len(PROGRAM)


def test_jumps_over_a_grown_table_still_fit() -> None:
    """Only one jump grows with the table; its offset is a byte."""
    longest = max(max(if_true, if_false) for _, if_true, if_false, _ in PROGRAM)
    assert longest <= 255


@pytest.mark.parametrize("arch", ["x86_64", "i386"])
def test_table_lists_no_number_twice(arch: str) -> None:
    numbers = [getattr(row, arch) for row in TABLE if getattr(row, arch) is not None]
    assert len(numbers) == len(set(numbers))
    assert all(0 <= number < 1024 for number in numbers)


def test_table_lists_no_name_twice_and_gives_reasons() -> None:
    names = [row.name for row in TABLE]
    assert len(names) == len(set(names))
    for row in TABLE:
        assert row.note
        assert row.x86_64 is not None or row.i386 is not None
        if row.answer is Answer.REFUSE:
            assert row.errno in (errno.ENOSYS, errno.EPERM)
        else:
            assert row.errno == 0


def test_support_page_lists_exactly_the_rows_of_the_table() -> None:
    text = PAGE.read_text()
    start = text.index("## System calls")
    found = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.+) \|$", text[start:], re.MULTILINE)
    assert found == [(row.name, _answer(row), row.note) for row in TABLE]


def _answer(row: Row) -> str:
    if row.answer is Answer.REFUSE:
        return f"{row.answer} {errno.errorcode[row.errno]}"
    return str(row.answer)
