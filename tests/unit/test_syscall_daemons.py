"""Whom connect(2) calls, from the caller's bytes and from both kernels' tables."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from tests.unit.test_syscall_facts import UTS

from ouassister.shadow.events import END, Event, Outcome, encode
from ouassister.shadow.servicemanager.state import Daemon
from ouassister.shadow.syscalls import daemons
from ouassister.shadow.syscalls.context import Context
from ouassister.shadow.syscalls.facts import GuestFacts
from ouassister.shadow.syscalls.notify import Call, Pass
from ouassister.shadow.syscalls.records import Journal, Record
from ouassister.shadow.syscalls.stopped import Stopped

if TYPE_CHECKING:
    from pathlib import Path

UNIX = b"""Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 16123 /run/mysqld/mysqld.sock
0000000000000000: 00000002 00000000 00010000 0001 01 16124 @/tmp/abstract
0000000000000000: 00000003 00000000 00000000 0001 03 16125 /run/connected
0000000000000000: 00000002 00000000 00010000 0005 01 16126 /run/systemd/private
0000000000000000: 00000002 00000000 00010000 0001 01 16127 /run/a b
0000000000000000: 00000002 00000000 00010000 0001 01 16128
"""
TCP = b"""  sl  local_address rem_address   st and more
   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 15000
   1: 0100007F:0016 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 15001
"""
LISTEN = (b"/run/a b", b"/run/mysqld/mysqld.sock", b"/run/systemd/private", b"@/tmp/abstract",
          b"tcp:80")  # fmt: skip


def unix(path: bytes) -> bytes:
    return struct.pack("<H", socket.AF_UNIX) + path


def inet(host: str, port: int) -> bytes:
    return struct.pack("<H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host)


def inet6(host: str, port: int) -> bytes:
    address = socket.inet_pton(socket.AF_INET6, host)
    return struct.pack("<H", socket.AF_INET6) + struct.pack(">HI", port, 0) + address + bytes(4)


def test_listeners_are_read_from_the_guests_tables() -> None:
    files = {b"1/net/unix": UNIX, b"1/net/tcp": TCP, b"7/net/tcp": b"not asked"}
    assert daemons.listeners(files) == LISTEN
    assert daemons.listeners({}) == ()


@pytest.mark.parametrize(
    ("address", "called"),
    [
        (unix(b"/run/mysqld/mysqld.sock\0\0"), b"/run/mysqld/mysqld.sock"),
        (unix(b"/var/run/mysqld/mysqld.sock"), b"/run/mysqld/mysqld.sock"),
        (unix(b"\0/tmp/abstract"), b"@/tmp/abstract"),
        (inet("127.0.0.1", 80) + bytes(8), b"tcp:80"),
        (inet("0.0.0.0", 80), b"tcp:80"),  # noqa: S104 - called, not bound
        (inet6("::1", 80), b"tcp:80"),
        (inet6("::ffff:127.0.0.1", 80), b"tcp:80"),
        (inet("127.0.0.53", 53), b""),  # any look-up of a name
        (inet("192.0.2.1", 80), b""),
        (inet6("2001:db8::1", 80), b""),
        (unix(b""), b""),
        (b"\1", b""),
        (inet("127.0.0.1", 80)[:6], b""),
        (inet6("::1", 80)[:20], b""),
        (struct.pack("<H", socket.AF_NETLINK) + bytes(10), b""),
    ],
)
def test_address_is_read_as_the_kernel_reads_it(address: bytes, called: bytes) -> None:
    assert daemons._target(address) == called


@pytest.mark.parametrize(
    ("target", "own", "told"),
    [
        (b"/run/mysqld/mysqld.sock", set(), 1),
        (b"/run/mysqld/mysqld.sock", {b"/run/mysqld/mysqld.sock"}, 0),  # the script's own server
        (b"/run/systemd/private", set(), 0),
        (b"/run/nobody", set(), 0),
    ],
)
def test_call_of_a_sleeping_daemon_is_told_and_left_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch, target: bytes, own: set[bytes], told: int
) -> None:
    records: list[Record] = []
    context = Context(GuestFacts(UTS, listeners=LISTEN), Journal(records.append))
    address = unix(target)
    monkeypatch.setattr(daemons, "read_memory", lambda *_arguments: address)
    monkeypatch.setattr(daemons, "_own", lambda *_arguments: own)
    call = Call(1, os.getpid(), compat=False, number=42, args=(3, 0x1000, len(address), 0, 0, 0))
    answer = daemons.ANSWERERS["connect"]
    assert answer(context, -1, call) is Pass.CONTINUE
    assert answer(context, -1, call) is Pass.CONTINUE
    assert [record["outcome"] for record in records] == ["foreign"] * told
    context.stand_ins.close()


# --- daemons that were stopped ---

SOCKET = b"/run/mysqld/mysqld.sock"
DAEMONS = (
    Daemon(SOCKET.decode(), ("mariadb.service",)),
    Daemon("tcp:80", ("apache2.service", "nginx.service")),
    Daemon("/run/a\udcff", ("init.scope",)),
)


def deferred(*words: str, outcome: Outcome = Outcome.DEFERRED) -> bytes:
    return encode(Event(outcome, ("systemctl", *words)))


def test_daemon_listens_until_a_script_has_stopped_its_unit(tmp_path: Path) -> None:
    records = tmp_path / "services"
    stopped = Stopped(DAEMONS, str(records))
    told = []
    for written in (
        b"",
        deferred("stop", "other.service"),
        deferred("stop", "mariadb.service", outcome=Outcome.REFUSED),
        deferred("reload", "mariadb.service"),
        deferred("stop", "--job-mode=fail", "mariadb.service"),
        deferred("start", "mariadb.service"),
        deferred("stop", "mariadb.service")[:-9],  # half a line is none
        deferred("stop", "mariadb.service")[-9:],
        END,  # another program, whose manager knows nothing of that
    ):
        with records.open("ab") as file:
            file.write(written)
        told.append(stopped.nobody_listens(SOCKET))
    assert told == [False, False, False, False, True, False, False, True, False]


def test_all_that_listen_must_have_been_stopped(tmp_path: Path) -> None:
    records = tmp_path / "services"
    stopped = Stopped(DAEMONS, str(records))
    assert not stopped.nobody_listens(b"tcp:80")  # no records at all
    records.write_bytes(deferred("stop", "nginx.service", "init.scope"))
    assert not stopped.nobody_listens(b"tcp:80")
    assert stopped.nobody_listens(b"/run/a\xff")
    with records.open("ab") as file:
        file.write(deferred("stop", "apache2.service"))
    assert stopped.nobody_listens(b"tcp:80")
    assert not stopped.nobody_listens(b"@unknown")


def test_stopped_daemon_that_is_called_is_not_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "services").write_bytes(deferred("stop", "mariadb.service"))
    records: list[Record] = []
    stopped = Stopped(DAEMONS, str(tmp_path / "services"))
    context = Context(GuestFacts(UTS, listeners=LISTEN), Journal(records.append), stopped)
    address = unix(SOCKET)
    monkeypatch.setattr(daemons, "read_memory", lambda *_arguments: address)
    monkeypatch.setattr(daemons, "_own", lambda *_arguments: set())
    call = Call(1, os.getpid(), compat=False, number=42, args=(3, 0x1000, len(address), 0, 0, 0))
    assert daemons.ANSWERERS["connect"](context, -1, call) is Pass.CONTINUE
    assert records == []
    context.stand_ins.close()


def test_guest_without_listeners_costs_nothing() -> None:
    context = Context(GuestFacts(UTS), Journal(lambda _record: None))
    call = Call(1, os.getpid(), compat=False, number=42, args=(3, 0, 16, 0, 0, 0))
    assert daemons.ANSWERERS["connect"](context, -1, call) is Pass.CONTINUE
    context.stand_ins.close()
