"""uname(2) as the guest would answer it: the layout, and a caller that is answered for real."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Any

import pytest

from ouassister.model import Uts
from ouassister.shadow.syscalls import notify
from ouassister.shadow.syscalls.facts import GuestFacts
from ouassister.shadow.syscalls.handlers import handlers
from ouassister.shadow.syscalls.notify import Call
from ouassister.shadow.syscalls.uts import pack_utsname

UTS = Uts("Linux", "web1", "6.1.0-56-cloud-amd64", "#1 SMP Debian", "x86_64", "(none)")


def fields(packed: bytes) -> list[bytes]:
    assert len(packed) == 6 * 65
    return [packed[at : at + 65].rstrip(b"\0") for at in range(0, len(packed), 65)]


def test_utsname_has_the_fields_in_the_order_of_the_kernel() -> None:
    assert fields(pack_utsname(UTS)) == [
        b"Linux",
        b"web1",
        b"6.1.0-56-cloud-amd64",
        b"#1 SMP Debian",
        b"x86_64",
        b"(none)",
    ]


def test_utsname_cuts_long_fields_and_keeps_their_end() -> None:
    long = Uts("é" * 100, "", "x" * 64, "x" * 65, "\udcff", "d")
    packed = pack_utsname(long)
    assert all(packed[at + 64] == 0 for at in range(0, len(packed), 65))
    assert fields(packed) == [b"\xc3\xa9" * 32, b"", b"x" * 64, b"x" * 64, b"\xff", b"d"]


def answer(call: Call) -> notify.Result:
    table = handlers(GuestFacts(UTS), lambda record: pytest.fail(str(record)))
    return table.find(call)(99, call)


@pytest.mark.parametrize(("compat", "number"), [(False, 63), (True, 122)])
def test_handler_writes_into_the_caller_s_memory(
    monkeypatch: pytest.MonkeyPatch, compat: bool, number: int
) -> None:
    """The caller is this process; only the kernel's check of the cookie is left out."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *arguments: asked.append(arguments))
    area = bytearray(b"\xaa" * 400)
    address = _address(area)
    call = Call(7, os.getpid(), compat, number, (address, 0, 0, 0, 0, 0))
    assert answer(call) == 0
    assert bytes(area) == pack_utsname(UTS) + b"\xaa" * 10
    assert [(one[0], one[2]) for one in asked] == [(99, (7).to_bytes(8, "little"))]


def _address(area: bytearray) -> int:
    import ctypes

    return ctypes.addressof((ctypes.c_char * len(area)).from_buffer(area))


@pytest.mark.parametrize("address", [0, 1, 2**63, 2**64 - 1])
def test_bad_address_is_efault(monkeypatch: pytest.MonkeyPatch, address: int) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda *_arguments: 0)
    call = Call(cookie=7, pid=os.getpid(), compat=False, number=63, args=(address,))
    with pytest.raises(OSError, match="bad address") as caught:
        answer(call)
    assert caught.value.errno == errno.EFAULT


def test_caller_that_is_gone_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_arguments: object) -> None:
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(fcntl, "ioctl", gone)
    monkeypatch.setattr(os, "pwrite", lambda *_arguments: pytest.fail("written"))
    call = Call(cookie=7, pid=os.getpid(), compat=False, number=63, args=(0,))
    with pytest.raises(OSError, match="No such file") as caught:
        notify.write_memory(99, call, 0, b"x")
    assert caught.value.errno == errno.ENOENT
