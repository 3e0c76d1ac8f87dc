"""The proxy of the download phase: it leads to the mirrors, and nowhere else."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import signal
import socket
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import pytest
from tests.conftest import need

from ouassister.shadow.fetch import proxy
from ouassister.shadow.fetch.mirrors import Mirrors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.host


class Mirror(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with connections that stay open; notes what it was asked."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[tuple[str, str]]]

    def parse_request(self) -> bool:
        good = super().parse_request()
        self.asked.append((self.path, str(self.headers)))
        return good

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


class Server(http.server.ThreadingHTTPServer):
    """Knows what its handler was asked."""

    asked: list[tuple[str, str]]


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Server]:
    """A web server on loopback with one file."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "file").write_bytes(b"content" * 100_000)

    class Handler(Mirror):
        asked: ClassVar[list[tuple[str, str]]] = []

    make = functools.partial(Handler, directory=str(tmp_path / "www"))
    with Server(("127.0.0.1", 0), make) as server:
        server.asked = Handler.asked
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def running(mirrors: Mirrors, told: Path) -> Iterator[int]:
    """A proxy; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener, told.open("wb") as file:
        pid = proxy.start(listener, mirrors, file.fileno())
        try:
            yield listener.getsockname()[1]
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def local(*ports: int) -> Mirrors:
    places = tuple(("127.0.0.1", port) for port in ports)
    return Mirrors(places, local=places)


def talk(port: int, data: bytes) -> bytes:
    """Send, and read to the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def test_file_of_a_mirror_comes_as_it_is(mirror: Server, tmp_path: Path) -> None:
    host = f"127.0.0.1:{mirror.server_port}"
    request = f"GET http://{host}/file HTTP/1.1\r\nHost: {host}\r\n".encode()
    with running(local(mirror.server_port), tmp_path / "told") as port:
        secret = b"Proxy-Authorization: x\r\n"
        # Two at once, as apt pipelines them.
        answer = talk(port, request + secret + b"\r\n" + request + b"Connection: close\r\n\r\n")
    assert answer.count(b"content") == 200_000
    assert [path for path, _ in mirror.asked] == ["/file", "/file"]
    assert "Proxy-Authorization" not in mirror.asked[0][1]
    assert (tmp_path / "told").read_text() == ""


def test_tunnel_leads_to_a_mirror(mirror: Server, tmp_path: Path) -> None:
    with running(local(mirror.server_port), tmp_path / "told") as port:
        head = f"CONNECT 127.0.0.1:{mirror.server_port} HTTP/1.1\r\n\r\n".encode()
        answer = talk(port, head + b"GET /file HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.")
    assert answer.count(b"content") == 100_000


@pytest.mark.parametrize(
    "line",
    ["GET http://127.0.0.1:{other}/x HTTP/1.1", "CONNECT 127.0.0.1:{other} HTTP/1.1",
     "CONNECT metadata.invalid:80 HTTP/1.1"],
)  # fmt: skip
def test_host_that_is_no_mirror_is_refused_and_told_once(
    mirror: Server,
    tmp_path: Path,
    line: str,
) -> None:
    with running(local(1), tmp_path / "told") as port:
        request = line.format(other=mirror.server_port).encode() + b"\r\n\r\n"
        for _ in range(3):
            answer = talk(port, request)
            assert answer.startswith(b"HTTP/1.1 403 ")
            assert b"not a mirror of this guest" in answer
    assert mirror.asked == []
    (told,) = (tmp_path / "told").read_text().splitlines()
    assert told.endswith("\tnot a mirror of this guest")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_source_that_names_this_host_is_refused(
    mirror: Server,
    tmp_path: Path,
    name: str,
) -> None:
    mirrors = Mirrors(((name, mirror.server_port),))
    with running(mirrors, tmp_path / "told") as port:
        request = f"GET http://{name}:{mirror.server_port}/file HTTP/1.1\r\n\r\n"
        assert b"403 " in talk(port, request.encode())
    assert mirror.asked == []
    assert "an address of this host or its links" in (tmp_path / "told").read_text()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST http://127.0.0.1:1/ HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /file HTTP/1.1\r\n\r\n", b"400"),
        (b"GET https://127.0.0.1:1/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://127.0.0.1:1/ HTTP/1.1\r\nContent-Length: 5\r\n\r\nGET x", b"400"),
        (b"GET http://127.0.0.1:1/ HTTP/1.1\r\nX: a\nHost: evil\r\n\r\n", b"400"),
        (b"GET http://127.0.0.1:1/ HTTP/2\r\n\r\n", b"400"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET http://127.0.0.1:1/ HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", b"431"),
        (b"GET http://127.0.0.1:1/ HTTP/1.1\r\n\r\n", b"502"),  # nobody listens
    ],
)
def test_odd_request_is_refused(tmp_path: Path, request_: bytes, status: bytes) -> None:
    with (
        running(local(1), tmp_path / "told") as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as sock,
    ):
        sock.sendall(request_)
        assert sock.recv(12) == b"HTTP/1.1 " + status


def test_other_host_on_the_same_connection_is_not_sent_to_the_first(
    mirror: Server,
    tmp_path: Path,
) -> None:
    first = f"GET http://127.0.0.1:{mirror.server_port}/file HTTP/1.1\r\nHost: x\r\n\r\n"
    with running(local(mirror.server_port, 1), tmp_path / "told") as port:
        talk(port, first.encode() + b"GET http://127.0.0.1:1/secret HTTP/1.1\r\n\r\n")
    assert {path for path, _ in mirror.asked} <= {"/file"}  # it may have ended before


def test_guest_with_a_proxy_of_its_own_goes_through_it(
    mirror: Server,
    tmp_path: Path,
) -> None:
    upstream = ("127.0.0.1", mirror.server_port)
    mirrors = Mirrors((("deb.example", 80),), local=(upstream,), upstream=upstream)
    with running(mirrors, tmp_path / "told") as port:
        talk(port, b"GET http://deb.example/file HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert [path for path, _ in mirror.asked] == ["http://deb.example/file"]


def test_apt_fetches_through_it(mirror: Server, tmp_path: Path) -> None:
    """The real client: with keep-alive, pipelining and conditional requests."""
    helper = "/usr/lib/apt/apt-helper"
    if not shutil.which(helper):
        need("apt-helper")
    with running(local(mirror.server_port), tmp_path / "told") as port:
        for number in range(2):
            done = subprocess.run(
                [helper, "-o", f"Acquire::http::Proxy=http://127.0.0.1:{port}/", "download-file",
                 f"http://127.0.0.1:{mirror.server_port}/file", str(tmp_path / f"got{number}")],
                capture_output=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    assert (tmp_path / "got1").read_bytes() == b"content" * 100_000
