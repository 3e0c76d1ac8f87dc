"""The table itself: complete, without doubles, answered by somebody, and told on the page."""

from __future__ import annotations

import argparse
import errno
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from ouassister.cli import support_verb
from ouassister.model import Uts
from ouassister.shadow.syscalls import policy
from ouassister.shadow.syscalls.facts import GuestFacts
from ouassister.shadow.syscalls.handlers import handlers
from ouassister.shadow.syscalls.notify import Call
from ouassister.shadow.syscalls.numbers import I386, X86_64
from ouassister.shadow.syscalls.table import NOTIFIED, ROWS, TABLE, Answer

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "support.md"
UTS = Uts("Linux", "web1", "6.1.0", "#1", "x86_64", "(none)")


def test_every_call_of_both_abis_has_one_row() -> None:
    names = [row.name for row in TABLE]
    assert len(names) == len(set(names))
    assert set(names) == X86_64.keys() | I386.keys()


def test_numbers_are_those_of_the_kernel() -> None:
    """Spot checks across both tables: the first and last of each run, and where they differ."""
    native = {"read": 0, "uname": 63, "uprobe": 336, "pidfd_send_signal": 424, "fchroot": 472}
    compat = {"restart_syscall": 0, "uname": 122, "gettid": 224, "exit_group": 252, "fchroot": 472}
    compat |= {"clock_gettime64": 403, "socket": 359, "io_uring_setup": 425, "mq_open": 277}
    assert {name: X86_64[name] for name in native} == native
    assert {name: I386[name] for name in compat} == compat
    for table in (X86_64, I386):
        assert len(set(table.values())) == len(table)
        assert all(0 <= number < 1024 for number in table.values())


def test_rows_give_reasons_and_errors() -> None:
    for row in TABLE:
        assert row.note
        assert row.x86_64 is not None or row.i386 is not None
        assert bool(row.errno) == (row.answer in (Answer.DENIED, Answer.ABSENT)), row.name
        if row.when:
            assert row.answer in NOTIFIED, row.name


def test_what_must_not_reach_the_host_does_not() -> None:
    kept = {Answer.DENIED, Answer.ABSENT, Answer.RECORDED}
    names = (
        "bpf kexec_load kexec_file_load init_module finit_module delete_module reboot swapon"
        " io_uring_setup keyctl add_key perf_event_open userfaultfd open_by_handle_at setns"
        " pivot_root settimeofday clock_settime iopl ioperm ptrace process_vm_writev fsopen"
    )
    for name in names.split():
        assert ROWS[name].answer in kept, name


def test_notified_rows_have_a_handler() -> None:
    table = handlers(GuestFacts(UTS), lambda _record: None)
    for row in TABLE:
        for number, compat in ((row.x86_64, False), (row.i386, True)):
            if number is not None and row.answer in NOTIFIED:
                assert callable(table.find(Call(1, 1, compat, number, (0,) * 6)))


def test_a_condition_with_a_word_of_no_meaning_is_refused() -> None:
    from ouassister.shadow.syscalls.table import _condition

    with pytest.raises(ValueError, match="odd 1 2"):
        _condition("odd 1 2")


def test_support_prints_every_row() -> None:
    status, value, text = support_verb.run(argparse.Namespace())
    assert status == 0
    assert isinstance(value, dict)
    rows: list[dict[str, Any]] = value["syscalls"]
    assert [row["name"] for row in rows] == [row.name for row in TABLE]
    by_name = {row["name"]: row for row in rows}
    assert by_name["kexec_load"]["errno"] == "EPERM"
    assert by_name["kill"]["in_part"]
    assert re.search(r"^bpf +denied ENOSYS +would reach", text, re.MULTILINE)


def page_rows() -> list[str]:
    """The table of the page: a line for each answer and reason, with all its calls."""
    lines = []
    for (label, note), rows in itertools.groupby(TABLE, lambda row: (row.label, row.note)):
        names = " ".join(f"`{row.name}`" for row in rows)
        lines.append(f"| {label} | {note} | {names} |")
    return lines


def test_support_page_is_the_table() -> None:
    text = PAGE.read_text()
    start = text.index("## System calls")
    found = re.findall(r"^\| (?!Answer|---).*\|$", text[start:], re.MULTILINE)
    assert found == page_rows()


def test_policy_has_no_group_without_calls() -> None:
    for head, note, names in policy.GROUPS:
        assert head.split()[0] in set(Answer), head
        assert note
        assert names.split()
        assert "|" not in note


def test_errors_are_those_of_an_older_kernel_or_a_refusal() -> None:
    allowed = {errno.ENOSYS, errno.EPERM, errno.EAFNOSUPPORT}
    assert {row.errno for row in TABLE if row.errno} <= allowed
