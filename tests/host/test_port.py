"""The helper on a virtio port: the rules of a channel, and whatever may reach it cut off."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import threading
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need
from tests.host.port_rig import Port

from ouassister.errors import ChannelError, DeadlineError
from ouassister.provider import port
from ouassister.provider.port import PortChannel
from ouassister.testing.channel import check_channel

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.host, pytest.mark.timeout(300)]

TOP = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["port-x86_64", "port-asan"])
def helper(request: pytest.FixtureRequest) -> Path:
    """The shipped program, and the one that checks itself."""
    for tool in ("musl-gcc", "gcc", "make"):
        need(tool)
    subprocess.run(["make", "-s", "-C", str(TOP / "guest"), "tests"], check=True)
    return TOP / "build" / "guest" / str(request.param)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Port]:
    made = Port(tmp_path)
    yield made
    made.close()


@pytest.fixture
def running(helper: Path, place: Port) -> Iterator[subprocess.Popen[bytes]]:
    process = place.start(helper)
    yield process
    assert process.poll() is None, f"the helper ended with {process.returncode}"
    process.kill()
    process.wait()


@pytest.fixture
def channel(place: Port, running: subprocess.Popen[bytes]) -> Iterator[PortChannel]:
    assert running.pid
    made = PortChannel(place.socket)
    yield made
    made.close()


def _echo(channel: PortChannel) -> bytes:
    return channel.run(["/bin/echo", "here"], timeout_s=60).stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="the rules are those of root's programs")
def test_helper_keeps_the_rules_of_a_channel(channel: PortChannel) -> None:
    check_channel(channel)


def test_program_that_is_not_there_is_told(channel: PortChannel) -> None:
    with pytest.raises(ChannelError, match="did not start in the guest: No such file"):
        channel.run(["/no/such/program"], timeout_s=60)
    assert _echo(channel) == b"here\n"


def test_what_a_dead_helper_ran_is_unknown_and_the_next_one_serves(
    helper: Path, place: Port
) -> None:
    first = place.start(helper)
    channel = PortChannel(place.socket)
    seen: list[Exception] = []

    def wait() -> None:
        try:
            channel.run(["/bin/sleep", "20"], timeout_s=120)
        except ChannelError as error:
            seen.append(error)

    try:
        assert _echo(channel) == b"here\n"
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(1)  # the program may have begun or not: either way it is unknown
    finally:
        first.kill()
        first.wait()
    second = place.start(helper)
    try:
        thread.join(60)
        assert "was started anew" in str(seen[0])
        assert _echo(channel) == b"here\n"
    finally:
        second.kill()
        second.wait()
        channel.close()


def _line(words: str) -> bytes:
    text = f"{words} ".encode()
    return b"\n%s%08x\n" % (text, zlib.crc32(text))


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(
    "rubbish",
    [
        _line(f"part {'a' * 16} 0 {'QUJD' * 9000}")[:20000],  # cut off in the middle
        _line("run 0123456789abcdef 1 5 5")[:-3],
        b"x" * (1 << 20),  # no end of a line
        b"\n" * 5000 + b"\0\n\xff\n \n  \n",
        _line("part 0123456789abcdef 0 QUJDRA==") + _line("run 0123456789abcdef 1 4 4"),  # no NUL
        _line("part 0123456789abcdef 0 QQBCAA==") + _line("run 0123456789abcdef 3 4 4"),
        _line("part 0123456789abcdef 0 QQBCAA==") + _line("run 0123456789abcdef 1 5 4"),
        _line("part 0123456789abcdef 0 QQBCAA==") + _line("run 0123456789abcdef 0 0 4"),
        _line("part 0123456789abcdef 0 Q=BCAA==") + _line("part 0123456789abcdef 9 QQ=="),
        _line("run 0123456789abcdef 99999999999999999999 4 4"),
        _line("ask nobody") + _line("ask") + _line("what 0123456789abcdef"),
        _line("part 0123456789abcdef 8388607 QUJDRA=="),
    ],
)
def test_what_was_cut_off_or_is_no_request_disturbs_nobody(place: Port, rubbish: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as earlier:
        earlier.connect(str(place.socket))
        earlier.sendall(rubbish)
    channel = PortChannel(place.socket)
    assert _echo(channel) == b"here\n"
    channel.close()


@pytest.mark.usefixtures("running")
def test_random_bytes_disturb_nobody(place: Port) -> None:
    chance = random.Random(7)  # noqa: S311 - the same each time
    valid = _line(f"part {'a' * 16} 0 {'QUJD' * 30}") + _line(f"run {'a' * 16} 1 2 3")
    with socket.socket(socket.AF_UNIX) as earlier:
        earlier.connect(str(place.socket))
        for _ in range(500):
            damaged = bytearray(valid)
            for _ in range(chance.randint(1, 8)):
                damaged[chance.randrange(len(damaged))] = chance.choice(b"\n \0a=\xff")
            earlier.sendall(damaged[: chance.randint(1, len(damaged))])
    channel = PortChannel(place.socket)
    assert _echo(channel) == b"here\n"
    channel.close()


def test_what_an_earlier_session_began_is_not_taken_for_ours(
    place: Port, running: subprocess.Popen[bytes]
) -> None:
    assert running.pid
    earlier = PortChannel(place.socket)
    with pytest.raises(DeadlineError):
        earlier.run(["/bin/sh", "-c", "while :; do echo noise; sleep 0.01; done"], timeout_s=1)
    earlier.close()
    channel = PortChannel(place.socket)
    done = channel.run(["/bin/sh", "-c", "sleep 3; echo mine"], timeout_s=60)
    assert (done.stdout, done.exit_status) == (b"mine\n", 0)
    channel.run(["/usr/bin/pkill", "-f", "echo noise; sleep 0.0[1]"], timeout_s=60)
    channel.close()


def test_more_programs_than_there_is_room_for_are_refused(channel: PortChannel) -> None:
    for _ in range(8):
        with pytest.raises(DeadlineError):
            channel.run(["/bin/sleep", "5"], timeout_s=0.1)
    with pytest.raises(ChannelError, match="did not start in the guest: Resource temporarily"):
        channel.run(["/bin/echo", "no"], timeout_s=60)
    end = time.monotonic() + 60
    while time.monotonic() < end:  # they end by and by
        try:
            assert _echo(channel) == b"here\n"
            return
        except ChannelError:
            time.sleep(0.2)  # between two looks
    pytest.fail("there is no room any more")


def test_request_that_is_too_large_is_refused_before_it_is_sent(channel: PortChannel) -> None:
    with pytest.raises(ChannelError, match="more than the helper"):
        channel.run(["/bin/cat"], stdin=bytes(8 << 20), timeout_s=60)
    almost = bytes((8 << 20) - 11)  # behind its words
    assert channel.run(["/bin/wc", "-c"], stdin=almost, timeout_s=120).stdout.split() == [
        b"8388597"
    ]


def test_port_that_others_may_use_is_refused(helper: Path, place: Port) -> None:
    Path(place.device).chmod(0o620)
    done = subprocess.run([helper, place.device], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "others than its owner may use it" in done.stderr
    done = subprocess.run([helper, "/no/port"], capture_output=True, text=True, check=False)
    assert (done.returncode, "No such file" in done.stderr) == (1, True)
    usage = subprocess.run([helper], capture_output=True, text=True, check=False)
    assert (usage.returncode, usage.stderr[:6]) == (2, "usage:")
    assert port.PROTOCOL_NAME.decode() in usage.stderr
