"""What every channel into a guest has to hold, as one check for ours and for others'.

The oracle is the guest's own shell.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

from ouassister.errors import ChannelError, DeadlineError

if TYPE_CHECKING:
    from ouassister.provider.channel import Channel

_WAIT_S = 120.0
_PLACE = "/run/ouassister-check"
_WORD_BYTES = 100_000  # an argument may have 128 KiB


def check_channel(channel: Channel) -> None:
    """Run every written rule against an open channel of a guest that runs.

    Raises:
        AssertionError: One does not hold.
    """
    channel.ping(timeout_s=_WAIT_S)
    _check_results(channel)
    _check_input(channel)
    _check_size(channel)
    _check_deadline(channel)


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError(f"{found!r:.500} instead of {wanted!r:.500}")


def _check_results(channel: Channel) -> None:
    done = channel.run(["/bin/sh", "-c", "echo out; echo err >&2; exit 7"], timeout_s=_WAIT_S)
    _expect((done.exit_status, done.stdout, done.stderr), (7, b"out\n", b"err\n"))
    done = channel.run(["/bin/sh", "-c", "printf 'no end of line' >&2"], timeout_s=_WAIT_S)
    _expect((done.exit_status, done.stdout, done.stderr), (0, b"", b"no end of line"))
    for status in (1, 127, 255):
        done = channel.run(["/bin/sh", "-c", f"exit {status}"], timeout_s=_WAIT_S)
        _expect(done.exit_status, status)
    done = channel.run(["/bin/sh", "-c", "kill -9 $$"], timeout_s=_WAIT_S)
    _expect(done.exit_status, -9)
    odd = ["a b", "", "*", "$HOME", "'\"", "\\n", "line\nline", "ä", "-n", "!!"]
    shown = channel.run(["/usr/bin/printf", "<%s>", *odd], timeout_s=_WAIT_S)
    _expect(shown.stdout, "".join(f"<{word}>" for word in odd).encode())
    _expect(channel.run(["/usr/bin/id", "-u"], timeout_s=_WAIT_S).stdout, b"0\n")
    try:
        done = channel.run(["/no/such/program"], timeout_s=_WAIT_S)
    except ChannelError:
        return
    _expect(done.exit_status, 127)


def _check_input(channel: Channel) -> None:
    data = bytes(range(256)) * 4 + b"\n"
    _expect(channel.run(["/bin/cat"], stdin=data, timeout_s=_WAIT_S).stdout, data)
    _expect(channel.run(["/bin/cat"], timeout_s=_WAIT_S).stdout, b"")
    _expect(channel.run(["/bin/true"], stdin=data * 256, timeout_s=_WAIT_S).exit_status, 0)
    content = secrets.token_bytes(300_000)
    channel.write_file(_PLACE, content, timeout_s=_WAIT_S)
    digest = hashlib.sha256(content).hexdigest()
    told = channel.run(["/usr/bin/sha256sum", _PLACE], timeout_s=_WAIT_S).stdout
    _expect(told.split()[0].decode(), digest)
    told = channel.run(["/usr/bin/stat", "-c", "%a %u %g", _PLACE], timeout_s=_WAIT_S).stdout
    _expect(told, b"600 0 0\n")
    channel.write_file(_PLACE, b"", timeout_s=_WAIT_S)
    _expect(channel.run(["/bin/cat", _PLACE], timeout_s=_WAIT_S).stdout, b"")
    channel.run(["/bin/rm", _PLACE], timeout_s=_WAIT_S)
    try:
        channel.write_file("/no/such/folder/file", b"x", timeout_s=_WAIT_S)
    except ChannelError:
        return
    raise AssertionError("a file was written where there is no folder")


def _check_size(channel: Channel) -> None:
    words = [chr(ord("a") + number) * _WORD_BYTES for number in range(4)]
    count = ["/bin/sh", "-c", 'cat; printf " %s" ${#1} ${#2} ${#3} ${#4}', "check", *words]
    done = channel.run(count, stdin=b"input", timeout_s=_WAIT_S)
    _expect(done.stdout, b"input" + f" {_WORD_BYTES}".encode() * 4)
    size = 1 << 20
    done = channel.run(["/usr/bin/head", "-c", str(size), "/dev/zero"], timeout_s=_WAIT_S)
    _expect((len(done.stdout), done.truncated), (size, False))
    _expect(done.stdout.count(b"\0"), size)


def _check_deadline(channel: Channel) -> None:
    try:
        channel.run(["/bin/sleep", "600"], timeout_s=2)
    except DeadlineError:
        pass
    else:
        raise AssertionError("a program ran beyond its time")
    _expect(channel.run(["/bin/echo", "mine"], timeout_s=_WAIT_S).stdout, b"mine\n")
