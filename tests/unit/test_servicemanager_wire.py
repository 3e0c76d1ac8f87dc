"""D-Bus from hostile programs: what is taken, and that everything else ends soon and loudly."""

from __future__ import annotations

import random
import struct

import pytest
from tests.unit.servicemanager_client import encode

from ouassister.shadow.servicemanager import wire
from ouassister.shadow.servicemanager.wire import Authentication, Messages, ProtocolError

PIPELINED = b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"


def authenticate(data: bytes, uid: int = 0) -> tuple[bytes, bytes]:
    return Authentication("00" * 16, uid).feed(data)


def test_pipelined_lines_are_all_answered_and_messages_follow() -> None:
    answer, rest = authenticate(PIPELINED + b"l\1\0\1")
    assert answer == b"DATA\r\nOK " + b"00" * 16 + b"\r\nERROR\r\n"
    assert rest == b"l\1\0\1"


def test_lines_may_come_byte_by_byte() -> None:
    one = Authentication("aa", 0)
    answers = b"".join(one.feed(PIPELINED[i : i + 1])[0] for i in range(len(PIPELINED)))
    assert one.done
    assert answers == b"DATA\r\nOK aa\r\nERROR\r\n"


def test_claim_is_held_against_what_the_kernel_says() -> None:
    claim = b"\0AUTH EXTERNAL " + b"1000".hex().encode() + b"\r\n"
    assert authenticate(claim, uid=1000)[0].startswith(b"OK")
    assert authenticate(claim, uid=0)[0] == b"REJECTED EXTERNAL\r\n"
    assert authenticate(b"\0AUTH EXTERNAL zz\r\n")[0] == b"REJECTED EXTERNAL\r\n"
    assert authenticate(b"\0AUTH EXTERNAL -30\r\n")[0] == b"REJECTED EXTERNAL\r\n"


def test_other_mechanisms_are_rejected() -> None:
    lines = b"\0AUTH\r\nAUTH ANONYMOUS 00\r\nCANCEL\r\nWHAT\r\n"
    assert authenticate(lines)[0] == b"REJECTED EXTERNAL\r\n" * 3 + b"ERROR\r\n"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"AUTH EXTERNAL\r\n", "zero byte"),
        (b"\0BEGIN\r\n", "without authentication"),
        (b"\0AUTH EXTERNAL\r\nBEGIN\r\n", "without authentication"),
        (b"\0" + b"A" * 5000, "does not end"),
        (b"\0" + b"A" * 5000 + b"\r\n", "does not end"),
        (b"\0" + b"AUTH\r\n" * 40, "does not end"),
    ],
)
def test_authentication_that_leads_nowhere_ends(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        authenticate(data)


def test_call_is_read_whole_and_in_pieces() -> None:
    message = encode(7, "StartUnit", "ss", "nginx.service", "replace", to="a.b")
    (call,) = Messages().feed(message)
    assert (call.serial, call.member, call.destination) == (7, "StartUnit", "a.b")
    assert call.wants_reply
    assert call.arguments(call.signature) == ("nginx.service", "replace")
    stream = Messages()
    found = [call for i in range(len(message)) for call in stream.feed(message[i : i + 1])]
    assert [call.member for call in found] == ["StartUnit"]
    both = Messages().feed(message + encode(8, "Reload", flags=1))
    assert [(call.member, call.wants_reply) for call in both] == [
        ("StartUnit", True),
        ("Reload", False),
    ]


def test_big_endian_call_is_read() -> None:
    def field(code: int, kind: bytes, text: bytes) -> bytes:
        head = bytes([code, 1]) + kind + b"\0" + struct.pack(">I", len(text)) + text + b"\0"
        return head + b"\0" * (-len(head) % 8)

    fields = field(1, b"o", b"/x") + field(3, b"s", b"Do") + b"\x08\1g\0\1u\0"
    header = b"B\1\0\1" + struct.pack(">III", 4, 9, len(fields)) + fields
    message = header + b"\0" * (-len(header) % 8) + struct.pack(">I", 77)
    (call,) = Messages().feed(message)
    assert (call.member, call.serial, call.arguments("u")) == ("Do", 9, (77,))


def test_other_kinds_of_messages_are_dropped() -> None:
    signal = wire.signal(3, wire.Address(), "/x", "a.b.C", "s", ("d",))
    answer = wire.reply(4, 1, wire.Address(), "", ())
    assert Messages().feed(signal + answer) == []


def test_message_longer_than_any_is_refused_before_it_is_there() -> None:
    for body, fields in ((wire.MAX_MESSAGE, 8), (8, wire.MAX_MESSAGE), (0xFFFFFFFF, 0xFFFFFFFF)):
        with pytest.raises(ProtocolError, match="too large"):
            Messages().feed(b"l\1\0\1" + struct.pack("<III", body, 1, fields))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (b"\x01\x03a()\0\0\0", "header field 1"),  # the element takes no room: no parser gets on
        (b"\x08\1v\0\1v\0\0", "header field 8"),
        (b"\x63\1s\0\1\0\0\0x\0", "header field 99"),
        (b"\x01\1o\0\xff\xff\xff\xff/\0", "does not end"),
        (b"\x01\1o\0\1\0\0\0/x", "does not end"),
        (b"\x01\1o\0\1\0\0\0\xff\0", "damaged"),
        (b"\x05\1u\0\1\0", "damaged|past the header"),
        (b"\x03\1s\0\1\0\0\0x\0", "lacks"),
    ],
)
def test_header_that_no_client_sends_is_refused(fields: bytes, why: str) -> None:
    message = b"l\1\0\1" + struct.pack("<III", 0, 1, len(fields)) + fields
    with pytest.raises(ProtocolError, match=why):
        Messages().feed(message + b"\0" * (-len(message) % 8))


@pytest.mark.parametrize("start", [b"x\1\0\1", b"l\1\0\2"])
def test_first_bytes_that_are_no_message_are_refused(start: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"byte order|protocol version"):
        Messages().feed(start + struct.pack("<III", 0, 1, 0))


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("s", b"\xff\xff\xff\xff"),
        ("s", b"\2\0\0\0\xff\xff\0"),
        ("s", b"\1\0\0\0xy"),
        ("as", b"\xf0\xff\xff\xff" + b"\0" * 16),
        ("as", b"\4\0\0\0"),
        ("t", b"\0\0\0\0"),
        ("ss", b"\0\0\0\0\0"),
    ],
)
def test_body_that_is_not_what_its_signature_says_is_refused(signature: str, body: bytes) -> None:
    fields = encode(1, "Do")[16:]
    sign = b"\x08\1g\0" + bytes([len(signature)]) + signature.encode() + b"\0"
    fields = fields + b"\0" * (-len(fields) % 8) + sign
    message = b"l\1\0\1" + struct.pack("<III", len(body), 1, len(fields)) + fields
    (call,) = Messages().feed(message + b"\0" * (-len(message) % 8) + body)
    assert call.signature == signature
    with pytest.raises(ProtocolError):
        call.arguments(signature)


def test_any_damage_ends_in_a_refusal_or_a_call() -> None:
    choose = random.Random(20261123)  # noqa: S311
    whole = encode(1, "ListUnitsByPatterns", "asas", ["active", "x"], ["*.service"], to="a.b")
    refused = taken = 0
    for _ in range(4000):
        damaged = bytearray(whole)
        for _ in range(choose.randint(1, 6)):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        try:
            for call in Messages().feed(bytes(damaged)):
                if call.signature == "asas":
                    call.arguments("asas")
                    taken += 1
        except ProtocolError:
            refused += 1
    assert refused > 500
    assert taken > 100
