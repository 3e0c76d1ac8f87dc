"""D-Bus as bytes: the authentication, and messages within bounds.

Who speaks here is a program of the guest. The header is read by code of its own, since a general
parser takes signatures from the message, and some of them never end; the body is read only by a
signature that the stand-in itself expects.

Source: D-Bus Specification 0.43, "Message Protocol" and "Authentication Protocol".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from jeepney import low_level  # type: ignore[import-untyped]

MAX_MESSAGE: Final = 1 << 20
MAX_AUTHENTICATION: Final = 4096
_MAX_LINES: Final = 32
_FIXED: Final = 16
_FIELDS: Final = {1: "o", 2: "s", 3: "s", 4: "s", 5: "u", 6: "s", 7: "s", 8: "g", 9: "u"}
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL = 1, 2, 3, 4, 5
_DESTINATION, _SENDER, _SIGNATURE = 6, 7, 8
_METHOD_CALL: Final = 1
_NO_REPLY: Final = 1


class ProtocolError(Exception):
    """A client does not speak D-Bus, or too much of it; its connection ends."""


@dataclass(frozen=True, slots=True)
class Call:
    """A method call; absent fields are empty."""

    serial: int
    path: str
    interface: str
    member: str
    destination: str
    signature: str
    wants_reply: bool
    message: bytes
    body: int  # where the body starts in ``message``

    def arguments(self, signature: str) -> tuple[Any, ...]:
        """Read the body; the caller has compared the signature with what it expects.

        Raises:
            ProtocolError: The body is not what its signature says.
        """
        if not signature:
            return ()
        kind = low_level.parse_signature(list(f"({signature})"))
        endianness = low_level.endian_map[self.message[:1]]
        try:
            values, end = kind.parse_data(self.message, self.body, endianness)
        except (ValueError, AssertionError, IndexError, struct.error) as error:
            raise ProtocolError(f"the body of {self.member} is damaged") from error
        if end > len(self.message):
            raise ProtocolError(f"the body of {self.member} ends early")
        result: tuple[Any, ...] = values
        return result


class Authentication:
    """The server's side of SASL EXTERNAL: the kernel says who the peer is.

    Clients send all their lines at once and count the answers (libsystemd,
    ``bus_socket_start_auth_client``). Descriptors are declined: nothing here takes one.
    """

    def __init__(self, guid: str, uid: int) -> None:
        self._ok = f"OK {guid}".encode()
        self._uid = uid
        self._buffer = b""
        self._accepted = False
        self._begun = False
        self._started = False
        self._lines = 0

    @property
    def done(self) -> bool:
        """The client has begun to send messages."""
        return self._begun

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Take what came in.

        Returns:
            What to answer, and what came after the end of the conversation.

        Raises:
            ProtocolError: The client does not get to the end of it.
        """
        self._buffer += data
        if not self._started and self._buffer:
            if self._buffer[0] != 0:
                raise ProtocolError("no zero byte at the start")
            self._started, self._buffer = True, self._buffer[1:]
        answers = b""
        while not self._begun and b"\r\n" in self._buffer[:MAX_AUTHENTICATION]:
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            self._lines += 1
            if self._lines > _MAX_LINES:
                raise ProtocolError("the authentication does not end")
            answer = self._answer(line)
            answers += answer + b"\r\n" if answer else b""
        if self._begun:
            return answers, self._buffer
        if len(self._buffer) > MAX_AUTHENTICATION:
            raise ProtocolError("a line of the authentication does not end")
        return answers, b""

    def _answer(self, line: bytes) -> bytes:
        words = line.split(b" ")
        match words[0]:
            case b"AUTH" if words[1:2] == [b"EXTERNAL"] and len(words) == 2:
                return b"DATA"
            case b"AUTH" if words[1:2] == [b"EXTERNAL"] and len(words) == 3:
                return self._identify(words[2])
            case b"DATA":
                return self._identify(words[1] if len(words) > 1 else b"")
            case b"NEGOTIATE_UNIX_FD":
                return b"ERROR"
            case b"BEGIN" if self._accepted:
                self._begun = True
                return b""
            case b"BEGIN":
                raise ProtocolError("messages without authentication")
            case b"AUTH" | b"CANCEL" | b"ERROR":
                return b"REJECTED EXTERNAL"
        return b"ERROR"

    def _identify(self, claim: bytes) -> bytes:
        """An empty claim means: whoever the kernel says."""
        try:
            same = not claim or int(bytes.fromhex(claim.decode("ascii"))) == self._uid
        except ValueError:
            same = False
        if not same:
            return b"REJECTED EXTERNAL"
        self._accepted = True
        return self._ok


class Messages:
    """Cuts a stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Call]:
        """Take what came in; return the method calls that are complete. Other kinds are dropped.

        Raises:
            ProtocolError: A message is damaged or larger than any that is taken.
        """
        self._buffer += data
        calls = []
        while len(self._buffer) >= _FIXED:
            order = _order(self._buffer)
            body, _serial, fields = struct.unpack_from(f"{order}III", self._buffer, 4)
            start = _aligned(_FIXED + fields)
            if fields > MAX_MESSAGE or body > MAX_MESSAGE or start + body > MAX_MESSAGE:
                raise ProtocolError("a message is too large")
            if len(self._buffer) < start + body:
                break
            message = bytes(self._buffer[: start + body])
            del self._buffer[: start + body]
            call = _parse(message, order, _FIXED + fields, start)
            if call is not None:
                calls.append(call)
        return calls


def _order(buffer: bytes | bytearray) -> str:
    try:
        return {ord("l"): "<", ord("B"): ">"}[buffer[0]]
    except KeyError:
        raise ProtocolError(f"byte order {buffer[0]:#04x}") from None


def _aligned(position: int) -> int:
    return position + 7 & ~7


def _parse(message: bytes, order: str, end: int, body: int) -> Call | None:
    kind, flags, version = message[1:4]
    if version != 1:
        raise ProtocolError(f"protocol version {version}")
    fields: dict[int, str | int] = {}
    position = _FIXED
    try:
        while position < end:
            position = _aligned(position)
            code, length = message[position], message[position + 1]
            signature = message[position + 2 : position + 3].decode("ascii")
            if length != 1 or code not in _FIELDS or signature != _FIELDS[code]:
                raise ProtocolError(f"header field {code}")
            value, position = _value(message, order, signature, position + 4)
            if position > end:
                raise ProtocolError("a header field goes past the header")
            fields[code] = value
        (serial,) = struct.unpack_from(f"{order}I", message, 8)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ProtocolError("a header is damaged") from error
    if kind != _METHOD_CALL:
        return None
    if not serial or _PATH not in fields or _MEMBER not in fields:
        raise ProtocolError("a call lacks what each has")
    return Call(
        serial=serial,
        path=str(fields[_PATH]),
        interface=str(fields.get(_INTERFACE, "")),
        member=str(fields[_MEMBER]),
        destination=str(fields.get(_DESTINATION, "")),
        signature=str(fields.get(_SIGNATURE, "")),
        wants_reply=not flags & _NO_REPLY,
        message=message,
        body=body,
    )


def _value(message: bytes, order: str, signature: str, position: int) -> tuple[str | int, int]:
    if signature == "u":
        (number,) = struct.unpack_from(f"{order}I", message, position)
        return int(number), position + 4
    if signature == "g":
        length, position = message[position], position + 1
    else:
        (length,) = struct.unpack_from(f"{order}I", message, position)
        position += 4
    end = position + length
    if end >= len(message) or message[end] != 0:
        raise ProtocolError("a string of the header does not end")
    return message[position:end].decode("utf-8"), end + 1


@dataclass(frozen=True, slots=True)
class Address:
    """Who sends and who is meant; both empty without a bus between them."""

    sender: str = ""
    destination: str = ""


def reply(serial: int, to: int, address: Address, signature: str, body: tuple[Any, ...]) -> bytes:
    """Encode the return of a call."""
    return _message("method_return", serial, {_REPLY_SERIAL: to}, address, signature, body)


def error(serial: int, to: int, address: Address, name: str, text: str) -> bytes:
    """Encode the failure of a call."""
    fields: dict[int, str | int] = {_REPLY_SERIAL: to, _ERROR_NAME: name}
    return _message("error", serial, fields, address, "s", (text,))


def signal(
    serial: int,
    address: Address,
    path: str,
    name: str,
    signature: str,
    body: tuple[Any, ...],
) -> bytes:
    """Encode a signal; ``name`` is interface and member."""
    interface, _, member = name.rpartition(".")
    fields: dict[int, str | int] = {_PATH: path, _INTERFACE: interface, _MEMBER: member}
    return _message("signal", serial, fields, address, signature, body)


def _message(
    kind: str,
    serial: int,
    fields: dict[int, str | int],
    address: Address,
    signature: str,
    body: tuple[Any, ...],
) -> bytes:
    if address.sender:
        fields[_SENDER] = address.sender
    if address.destination:
        fields[_DESTINATION] = address.destination
    if signature:
        fields[_SIGNATURE] = signature
    header = low_level.Header(
        low_level.Endianness.little,
        low_level.MessageType[kind],
        low_level.MessageFlag.no_reply_expected if kind != "method_call" else 0,
        1,
        0,
        serial,
        {low_level.HeaderFields(code): value for code, value in fields.items()},
    )
    encoded: bytes = low_level.Message(header, body).serialise()
    return encoded
