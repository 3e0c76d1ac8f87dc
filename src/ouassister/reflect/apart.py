"""A command that runs apart from the channel: what ends the channel does not end it.

It is a service of its own, since an agent's children end with the agent's control group. Its output
lies in the guest until it was fetched, so that whoever comes back asks for it again.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import time
from typing import TYPE_CHECKING, Final

from ouassister.errors import ChannelError, DeadlineError, OUassisterError
from ouassister.provider.channel import ExecResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ouassister.provider.interface import Running

_PLACE: Final = "/run"
_START_S: Final = 60.0
_ASK_S: Final = 10.0
_PAUSE_S: Final = 0.5
_BACK_S: Final = 120.0  # for the channel to come back
_SCRIPT: Final = """cd "$0" || exit 1
/bin/sh ./command <./input >./out 2>./err
echo $? >./status.new; mv ./status.new ./status
"""
_START: Final = """umask 077
mkdir "$1" && mv "$1.command" "$1/command" && mv "$1.input" "$1/input" || exit 1
if [ -d /run/systemd/system ]; then
	exec systemd-run --quiet --collect --property=KillMode=process --unit="$2" \\
		/bin/sh -c "$3" "$1"
fi
setsid /bin/sh -c "$3" "$1" </dev/null >/dev/null 2>&1 &
"""
# One answer holds all, so that it is whole or lost: both lengths, the status, both streams.
_ASK: Final = """n=0
while [ -d "$1" ] && ! [ -e "$1/status" ] && [ $n -lt 12 ]; do sleep 0.25; n=$((n + 1)); done
[ -e "$1/status" ] || { [ -d "$1" ]; exit; }
read -r status <"$1/status"; cd "$1" && echo "$status $(wc -c <out) $(wc -c <err)" && cat out err"""
_HEAD: Final = re.compile(rb"([0-9]{1,3}) ([0-9]{1,9}) ([0-9]{1,9})\n")


def run(vm: Running, command: Sequence[str], *, stdin: bytes, timeout_s: float) -> ExecResult:
    """Run a program in the guest to its end, whatever becomes of the channel meanwhile.

    Raises:
        ChannelError: It did not start, or the channel did not come back.
        DeadlineError: It still runs after ``timeout_s``; it is not killed.
    """
    end = time.monotonic() + timeout_s
    name = f"ouassister-apart-{secrets.token_hex(8)}"
    state = f"{_PLACE}/{name}"
    channel = vm.channel()
    channel.write_file(f"{state}.command", f"exec {shlex.join(command)}\n".encode())
    channel.write_file(f"{state}.input", stdin)
    start = ["/bin/sh", "-c", _START, "ouassister", state, f"{name}.service", _SCRIPT]
    done = channel.run(start, timeout_s=_START_S)
    if done.exit_status != 0:
        words = done.stderr.decode("utf-8", "backslashreplace").strip()[:500]
        raise ChannelError(f"the guest starts no service of ours: {words}")
    result = _await(vm, state, end, command[0], timeout_s)
    with contextlib.suppress(ChannelError, DeadlineError):  # /run ends with the guest's boot
        channel.run(["/bin/rm", "-rf", state], timeout_s=_ASK_S)
    return result


def _await(vm: Running, state: str, end: float, program: str, timeout_s: float) -> ExecResult:
    heard = time.monotonic()
    while time.monotonic() < end:
        try:
            done = vm.channel().run(["/bin/sh", "-c", _ASK, "ouassister", state], timeout_s=_ASK_S)
        except (ChannelError, DeadlineError):
            if time.monotonic() >= heard + _BACK_S or has_ended(vm):
                raise
            time.sleep(_PAUSE_S)  # it is being restarted, which nothing tells
            continue
        heard = time.monotonic()
        if done.stdout:
            return _read(done.stdout)
        if done.exit_status != 0:
            raise ChannelError(f"the guest removed {state}")
    raise DeadlineError(f"{program} still runs in the guest after {timeout_s:.1f} s")


def has_ended(vm: Running) -> bool:
    """Tell whether a lost channel will not come back, since its VM does not run any more."""
    try:
        return not vm.runs()
    except OUassisterError:
        return True


def _read(told: bytes) -> ExecResult:
    match = _HEAD.match(told)
    if match is None:
        raise ChannelError("what the guest tells of a service of ours is malformed")
    status, size, rest = (int(one) for one in match.groups())
    body = told[match.end() :]
    killed = 128 < status <= 192  # as a shell tells it
    return ExecResult(
        128 - status if killed else status,
        body[:size],
        body[size : size + rest],
        len(body) != size + rest,
    )
