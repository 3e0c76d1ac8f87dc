"""Clients that mean harm, or nothing: each is bounded, and nobody else notices."""

from __future__ import annotations

import array
import contextlib
import os
import random
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from tests.unit.servicemanager_client import ROOT, TIMEOUT_S, Client, Served, encode

from ouassister.shadow.events import read_events
from ouassister.shadow.servicemanager import bus, journal
from ouassister.shadow.servicemanager.server import MAX_CLIENTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path)
    yield one
    one.stop()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_idle_connections_make_room_for_others(served: Served) -> None:
    idle = []
    for _ in range(MAX_CLIENTS * 2):
        one = socket.socket(socket.AF_UNIX)
        one.settimeout(TIMEOUT_S)
        one.connect(str(served.private))
        idle.append(one)
    client = Client(served.private)
    assert client.call("StartUnit", "ss", "plain.service", "replace") == (f"{ROOT}/job/1",)
    assert idle[0].recv(1) == b""  # cut off
    for one in (*idle, client.socket):
        one.close()


def test_what_is_told_to_the_log_is_kept_up_to_a_limit(served: Served, tmp_path: Path) -> None:
    for path in journal.SOCKETS:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as logger:
            logger.settimeout(TIMEOUT_S)  # whoever took nothing would let it wait
            logger.connect(str(tmp_path) + path)
            logger.send(b"<27>mysqld: " + path.encode() + b"\n\0")
            for _ in range(40):
                logger.send(b"x" * 60_000)
    client = Client(served.private)
    assert client.call("GetUnit", "s", "nginx.service")[0].endswith("nginx_2eservice")
    client.socket.close()
    served.stop()
    kept = served.log.read_bytes()
    assert kept.startswith(b"<27>mysqld: /run/systemd/journal/dev-log\nxxx")
    assert len(kept) <= (1 << 20) + 100
    assert kept.count(b"what follows in the log is not kept\n") == 1


def test_client_that_never_reads_waits_alone(served: Served) -> None:
    client = Client(served.private)
    client.socket.setblocking(False)
    message = b"".join(encode(i + 1, "ListUnits") for i in range(64))
    sent, limit = 0, 40 << 20  # far more than sockets hold
    with contextlib.suppress(BlockingIOError):
        while sent < limit:
            sent += client.socket.send(message)
    assert sent < limit
    other = Client(served.private)
    assert other.call("GetUnit", "s", "nginx.service")[0].endswith("nginx_2eservice")
    other.socket.close()
    client.socket.close()


def test_subscriber_that_never_reads_is_cut_off(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "MAX_UNSENT", 10_000)
    deaf, client = Client(served.private), Client(served.private)
    deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(500):
        assert client.call("StartUnit", "ss", "plain.service", "replace")[0].startswith(ROOT)
    client.socket.close()
    while deaf.socket.recv(65536):
        pass  # what was sent before it was cut off
    deaf.socket.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" + b"A" * 70000,
        b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n" + b"\xff" * 64,
        b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\nl\1\0\1" + struct.pack("<III", 1 << 30, 1, 8),
        b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\nl\1\0\1" + struct.pack("<III", 0, 1, 8)
        + b"\x01\x03a()" + b"\0" * 9,
    ],
)  # fmt: skip
def test_nonsense_ends_its_connection_alone(served: Served, sent: bytes) -> None:
    good = Client(served.private)
    with socket.socket(socket.AF_UNIX) as bad:
        bad.settimeout(TIMEOUT_S)
        bad.connect(str(served.private))
        try:
            bad.sendall(sent)
            while bad.recv(4096):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert good.call("GetUnit", "s", "nginx.service") == (f"{ROOT}/unit/nginx_2eservice",)
    good.socket.close()


def test_descriptors_sent_along_are_not_kept(served: Served) -> None:
    client = Client(served.private)
    before = descriptors()
    null = os.open("/dev/null", os.O_RDONLY)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * 16))]
    client.socket.sendmsg([encode(50, "ListJobs")], rights)
    client.receive()
    os.close(null)
    assert descriptors() == before
    client.socket.close()


def test_random_bytes_after_authentication_never_stop_the_server(served: Served) -> None:
    choose = random.Random(4)  # noqa: S311
    whole = encode(1, "StartUnit", "ss", "plain.service", "replace")
    for _ in range(150):
        client = Client(served.private)
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        client.socket.sendall(bytes(damaged))
        client.socket.close()
    last = Client(served.private)
    assert last.call("GetUnit", "s", "nginx.service") == (f"{ROOT}/unit/nginx_2eservice",)
    last.socket.close()
    served.stop()
    read_events(served.records)  # whole
