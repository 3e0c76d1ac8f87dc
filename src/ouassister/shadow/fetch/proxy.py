"""A forward proxy for one package manager: HTTP by absolute URI, and CONNECT for TLS.

It runs in the host's network, in a process of its own; its listening socket was made inside the
shadow's network, where nothing else leads out. Names are resolved here, so that the shadow needs no
resolver, and the address that was checked is the one that is connected to.

Source: RFC 9112 (sections 3.2.2 and 3.2.3), RFC 9110 (sections 7.6.1 and 9.3.6); apt's http method
pipelines requests of one host over a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import encodings.idna  # noqa: F401 - of ours may be readable
import os
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.shadow import raw
from ouassister.shadow.fetch.mirrors import place_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.shadow.fetch.mirrors import Mirrors

ADDRESS: Final = ("127.0.0.1", 3142)  # in the shadow; the port is apt-cacher's by custom
PROXY: Final = "http://{}:{}/".format(*ADDRESS)
REFUSED: Final = "refused-hosts.log"  # among the outputs of a shadow
_MAX_HEAD: Final = 64 << 10
_MAX_CONNECTIONS: Final = 64
_CHUNK: Final = 256 << 10
_CONNECT_S: Final = 20.0
_IDLE_S: Final = 120.0
_METHODS: Final = (b"GET", b"HEAD")
# Between a client and this proxy alone.
_HOP: Final = (b"proxy-connection", b"proxy-authorization", b"keep-alive", b"te", b"upgrade")


class _RefusedError(Exception):
    """A request that is not passed on; status line and reason for the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Request:
    """The head of a request; ``line`` and ``rest`` are as they came."""

    method: bytes
    target: bytes
    version: bytes
    headers: tuple[bytes, ...]


def start(listener: socket.socket, mirrors: Mirrors, told: int) -> int:
    """Fork the proxy; return its pid. It ends with the parent.

    Args:
        listener: A listening socket in the network that is served.
        mirrors: Where it leads.
        told: Descriptor of a file for one line about each host that was refused.
    """
    child = os.fork()
    if child:
        return child
    raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)

    _close_all_but(listener.fileno(), told)

    def tell(line: str) -> None:
        os.write(told, f"{line}\n".encode("utf-8", "backslashreplace"))

    try:
        asyncio.run(serve(listener, mirrors, tell))
    finally:
        os._exit(1)


def _close_all_but(*kept: int) -> None:
    """Close what the parent has open, standard streams aside: its sockets tell that it lives."""
    low = 3
    for descriptor in sorted(kept):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


async def serve(listener: socket.socket, mirrors: Mirrors, tell: Callable[[str], None]) -> None:
    """Serve connections until cancelled; ``tell`` gets a line for each host refused, once."""
    proxy = _Proxy(mirrors, tell)
    server = await asyncio.start_server(proxy.handle, sock=listener, limit=_MAX_HEAD)
    async with server:
        await server.serve_forever()


class _Proxy:
    def __init__(self, mirrors: Mirrors, tell: Callable[[str], None]) -> None:
        self._mirrors = mirrors
        self._tell = tell
        self._told: set[str] = set()
        self._open = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self._open += 1
        try:
            if self._open > _MAX_CONNECTIONS:
                raise _RefusedError(503, "too many connections")
            await self._converse(reader, writer)
        except _RefusedError as error:
            words = f"HTTP/1.1 {error.status} {error}\r\nContent-Length: 0\r\nConnection: close"
            writer.write(f"{words}\r\n\r\n".encode("ascii", "replace"))
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client sees the connection end, and tells
        finally:
            self._open -= 1
            with contextlib.suppress(OSError):
                await writer.drain()
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass requests on over one connection to the mirror; answers come back as they are."""
        place: tuple[str, int] | None = None
        upstream: asyncio.StreamWriter | None = None
        answers: asyncio.Task[None] | None = None
        try:
            while (request := await _read_head(reader)) is not None:
                if request.method == b"CONNECT":
                    await self._tunnel(request, reader, writer)
                    return
                wanted = self._place(request)
                if upstream is None:
                    place = wanted
                    source, upstream = await self._connect(*wanted)
                    answers = asyncio.create_task(_pump(source, writer))
                elif wanted != place:
                    return  # another host: the client comes again with a connection of its own
                upstream.write(self._rewritten(request))
                await upstream.drain()
            if answers is not None:
                await answers
        finally:
            if answers is not None:
                answers.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError, TimeoutError):
                    await answers
            if upstream is not None:
                upstream.close()

    def _place(self, request: _Request) -> tuple[str, int]:
        """Host and port of a request, if it may be passed on."""
        if request.method not in _METHODS:
            raise _RefusedError(405, "only GET, HEAD and CONNECT are passed on")
        if any(line.lower().startswith((b"content-length:", b"transfer-encoding:"))
               for line in request.headers):  # fmt: skip
            raise _RefusedError(400, "a request with a body")
        uri = request.target.decode("ascii", "replace")
        place = place_of(uri) if uri.lower().startswith("http://") else None
        if place is None:
            raise _RefusedError(400, "no absolute URI")
        self._check(*place)
        return place

    def _check(self, host: str, port: int) -> None:
        if not self._mirrors.reaches(host, port):
            self._refuse(f"{host}:{port}", "not a mirror of this guest")

    def _refuse(self, place: str, why: str) -> None:
        if place not in self._told and len(self._told) < _MAX_CONNECTIONS:
            self._told.add(place)
            self._tell(f"{place}\t{why}")
        raise _RefusedError(403, f"{place} is {why}")

    def _rewritten(self, request: _Request) -> bytes:
        """The request as the mirror, or the next proxy, wants it."""
        target = request.target
        if self._mirrors.upstream is None:
            _, _, rest = target.partition(b"://")
            slash = rest.find(b"/")
            target = rest[slash:] if slash >= 0 else b"/"
        kept = [
            line for line in request.headers if line.partition(b":")[0].strip().lower() not in _HOP
        ]
        return b"\r\n".join([b" ".join((request.method, target, request.version)), *kept, b"", b""])

    async def _tunnel(
        self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        place = place_of(f"https://{request.target.decode('ascii', 'replace')}")
        if place is None:
            raise _RefusedError(400, "no host and port")
        self._check(*place)
        source, sink = await self._connect(*place)
        try:
            if self._mirrors.upstream is None:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                words = b" ".join((b"CONNECT", request.target, b"HTTP/1.1"))
                sink.write(words + b"\r\nHost: " + request.target + b"\r\n\r\n")
            await asyncio.gather(_pump(reader, sink), _pump(source, writer))
        finally:
            sink.close()

    async def _connect(
        self, host: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the mirror, or to the proxy that leads there."""
        host, port = self._mirrors.upstream or (host, port)
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise _RefusedError(502, f"{host}: {error.strerror}") from error
        addresses = [(family, address[0]) for family, _, _, _, address in found]
        allowed = [one for one in addresses if self._mirrors.may_connect(host, port, str(one[1]))]
        if not allowed:
            self._refuse(f"{host}:{port}", "an address of this host or its links")
        last: OSError | None = None
        for family, address in allowed:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    return await asyncio.open_connection(str(address), port, family=family)
            except (OSError, TimeoutError) as error:
                last = OSError(str(error) or "no answer")
        raise _RefusedError(502, f"{host}:{port}: {last}")


async def _read_head(reader: asyncio.StreamReader) -> _Request | None:
    """Read the head of a request; None at the end of the connection."""
    try:
        async with asyncio.timeout(_IDLE_S):
            raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise
    except asyncio.LimitOverrunError as error:
        raise _RefusedError(431, "the head of a request is too long") from error
    line, *headers = raw[:-4].split(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3 or words[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise _RefusedError(400, "no request line of HTTP/1")
    if any(b"\n" in one or b"\r" in one or b"\0" in one for one in (line, *headers)):
        raise _RefusedError(400, "a control character in the head of a request")
    return _Request(words[0], words[1], words[2], tuple(headers))


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Copy until the source ends, or nothing came for too long; the sink ends with it."""
    try:
        while True:
            async with asyncio.timeout(_IDLE_S):
                data = await source.read(_CHUNK)
            if not data:
                break
            sink.write(data)
            await sink.drain()
    finally:
        with contextlib.suppress(OSError):
            if sink.can_write_eof():
                sink.write_eof()
