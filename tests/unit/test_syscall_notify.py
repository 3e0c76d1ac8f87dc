"""Copying from a caller and writing down what it did; the caller is this process.

Only the kernel's check of the cookie is left out; `tests/host/test_syscalls.py` has it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
from typing import TYPE_CHECKING, Any, Final

import pytest

from ouassister.errors import InternalError
from ouassister.model import Uts
from ouassister.shadow.syscalls.facts import GuestFacts
from ouassister.shadow.syscalls.handlers import handlers
from ouassister.shadow.syscalls.notify import Call, read_memory, read_string
from ouassister.shadow.syscalls.records import (
    DENIED,
    RECORDED,
    UNKNOWN,
    Journal,
    JsonLines,
    read_devices,
)

if TYPE_CHECKING:
    from pathlib import Path

PAGE: Final = mmap.PAGESIZE
LAST: Final = 20
CALL: Final = Call(7, os.getpid(), compat=False, number=0, args=(0,) * 6)


@pytest.fixture(autouse=True)
def cookie_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda *_arguments: 0)


@pytest.fixture
def pages(tmp_path: Path) -> tuple[mmap.mmap, int]:
    """Two pages and their address; the third is behind the end of the mapped file."""
    with (tmp_path / "pages").open("w+b") as file:
        file.truncate(3 * PAGE)
        area = mmap.mmap(file.fileno(), 3 * PAGE)
        file.truncate(2 * PAGE)
    return area, ctypes.addressof(ctypes.c_char.from_buffer(area))


def failure(address: int, limit: int = 4096) -> int | None:
    with pytest.raises(OSError, match=r".") as caught:
        read_string(99, CALL, address, limit)
    return caught.value.errno


def test_a_string_may_cross_a_page(pages: tuple[mmap.mmap, int]) -> None:
    area, address = pages
    text = b"/a/path/of/some/length"
    for before in (1, 5, len(text), len(text) + 1):
        area[PAGE - before : PAGE - before + len(text) + 1] = text + b"\0"
        assert read_string(99, CALL, address + PAGE - before) == text


def test_a_string_may_end_with_the_last_page(pages: tuple[mmap.mmap, int]) -> None:
    area, address = pages
    area[2 * PAGE - 4 : 2 * PAGE] = b"abc\0"
    assert read_string(99, CALL, address + 2 * PAGE - 4) == b"abc"
    area[2 * PAGE - 4 : 2 * PAGE] = b"abcd"
    assert failure(address + 2 * PAGE - 4) == errno.EFAULT


def test_a_string_without_end_is_too_long(pages: tuple[mmap.mmap, int]) -> None:
    area, address = pages
    area[: 2 * PAGE] = b"x" * (2 * PAGE)
    assert failure(address) == errno.ENAMETOOLONG
    assert failure(address, 10) == errno.ENAMETOOLONG
    area[9] = 0
    assert read_string(99, CALL, address, 10) == b"x" * 9


@pytest.mark.parametrize("address", [0, 1, 1 << 63, (1 << 64) - 1])
def test_bad_addresses_are_told(address: int) -> None:
    assert failure(address) == errno.EFAULT
    with pytest.raises(OSError, match="bad address"):
        read_memory(99, CALL, address, 8)


def test_memory_is_read_whole_or_not(pages: tuple[mmap.mmap, int]) -> None:
    area, address = pages
    area[2 * PAGE - 4 : 2 * PAGE] = b"abcd"
    assert read_memory(99, CALL, address + 2 * PAGE - 4, 4) == b"abcd"
    with pytest.raises(OSError, match="bad address"):
        read_memory(99, CALL, address + 2 * PAGE - 4, 5)
    assert read_memory(99, CALL, address, 0) == b""


def test_arguments_are_taken_as_the_kernel_does() -> None:
    call = Call(7, 1, compat=False, number=0, args=(0xFFFF_FFFF, 1 << 32 | 5, 0x8000_0000, 0, 0, 0))
    assert [call.signed(at) for at in range(3)] == [-1, 5, -(1 << 31)]
    assert [call.unsigned(at) for at in range(3)] == [0xFFFF_FFFF, 5, 0x8000_0000]


# --- records ---


def test_denied_and_unknown_calls_are_told_once_for_each_program() -> None:
    records: list[dict[str, Any]] = []
    journal = Journal(records.append)
    for _ in range(3):
        journal.note(CALL, "bpf", DENIED, [])
        journal.note(CALL, "x86_64 999", UNKNOWN, [])
        journal.note(CALL, "kill", RECORDED, [571, "SIGHUP"], target=b"a\x1bb")
    assert [record["name"] for record in records] == ["bpf", "x86_64 999", *["kill"] * 3]
    assert records[2]["target"] == "a\\x1bb"
    assert records[2]["kind"] == "syscall"


def test_records_end_at_a_limit_and_say_so() -> None:
    records: list[dict[str, Any]] = []
    journal = Journal(records.append, LAST)
    for _ in range(LAST + 5):
        journal.note(CALL, "kill", RECORDED, [571, "SIGHUP"])
    assert len(records) == LAST
    assert [at for at, record in enumerate(records) if "truncated" in record] == [LAST - 1]


def test_long_records_end_sooner() -> None:
    records: list[dict[str, Any]] = []
    journal = Journal(records.append)
    for _ in range(600):
        journal.note(CALL, "sethostname", RECORDED, [b"\xff" * 10_000])
    assert 400 < len(records) < 500  # 20 KiB each, in 8 MiB
    assert [at for at, one in enumerate(records) if "truncated" in one] == [len(records) - 1]


def test_devices_are_read_from_records(tmp_path: Path) -> None:
    path = tmp_path / "syscalls.jsonl"
    assert read_devices(path) == {}
    journal = Journal(JsonLines(str(path)))
    journal.note(CALL, "mknod", RECORDED, [b"/dev/x", "600", "c 1 3"], inode=17, marked=True)
    journal.note(CALL, "mknod", RECORDED, [b"/tmp/y", "600", "b 8 1"], inode=18, marked=False)
    journal.note(CALL, "reboot", RECORDED, ["restart"])
    assert read_devices(path) == {17: "c 1 3"}


@pytest.mark.parametrize("content", ["nonsense", "[1]", '{"marked": true}', "7"])
def test_records_that_nobody_wrote_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "syscalls.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(InternalError, match="a record of system calls"):
        read_devices(path)


def test_a_caller_that_is_gone_is_recorded_without_its_name() -> None:
    records: list[dict[str, Any]] = []
    gone = Call(7, 1 << 22, compat=False, number=0, args=(0,) * 6)
    Journal(records.append).note(gone, "reboot", RECORDED, [b"\xff"])
    assert (records[0]["program"], records[0]["package"]) == ("", "")
    assert records[0]["args"] == ["\\xff"]


def test_records_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "syscalls.jsonl"
    recorder = JsonLines(str(path))
    recorder({"a": "line\nfeed"})
    recorder({"b": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"a": "line\nfeed"},
        {"b": 2},
    ]


def test_a_link_in_place_of_the_records_is_not_followed(tmp_path: Path) -> None:
    path, secret = tmp_path / "syscalls.jsonl", tmp_path / "secret"
    path.symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        JsonLines(str(path))({})
    assert not secret.exists()


def test_an_unknown_number_is_answered_and_told() -> None:
    records: list[dict[str, Any]] = []
    table = handlers(GuestFacts(Uts("Linux", "w", "6", "#1", "x86_64", "")), records.append)
    for compat, name in ((False, "x86_64 1000"), (True, "i386 1000")):
        call = Call(7, os.getpid(), compat, 1000, (0,) * 6)
        with pytest.raises(OSError, match="in no table") as caught:
            table.find(call)(99, call)
        assert caught.value.errno == errno.ENOSYS
        assert records[-1]["name"] == name
