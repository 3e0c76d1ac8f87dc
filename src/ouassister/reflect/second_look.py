"""Commands of ours that are told twice when the channel is lost in the middle of one.

What a command of the reflection does, or what happens in the guest meanwhile, may end what the
channel talks to: an agent that is upgraded takes its children along, and a new one knows nothing of
them. Each command can be given again: the applier goes on from its journal, or says by its marker
that all is done; actions and verification are done anew. So what became of it is not asked of
anybody's memory, but seen. The second time it runs apart from the channel, which it may end again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ouassister.errors import ChannelError
from ouassister.reflect import apart, bootstrap
from ouassister.reflect.apart import has_ended

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ouassister.provider.channel import ExecResult
    from ouassister.provider.interface import Running

_MOST: Final = 2  # times that it is begun apart
_BACK_S: Final = 120.0  # for what the channel talks to, to come back
_PAUSE_S: Final = 0.5


def run(
    vm: Running,
    command: Sequence[str],
    *,
    stdin: bytes = b"",
    timeout_s: float,
    most_s: float = 0.1,
) -> ExecResult:
    """Run a command through the VM's channel; when that is lost, run it again apart from it.

    Raises:
        ChannelError: The channel did not come back.
        DeadlineError: The command still runs after ``timeout_s``.
    """
    end = time.monotonic() + timeout_s
    try:
        return vm.channel().run(command, stdin=stdin, timeout_s=timeout_s, most_s=most_s)
    except ChannelError:
        if time.monotonic() >= end or has_ended(vm):
            raise
    for attempt in range(1, _MOST + 1):
        await_end(vm, end)
        try:
            left = max(end - time.monotonic(), 1.0)
            return apart.run(vm, command, stdin=stdin, timeout_s=left)
        except ChannelError:
            if attempt == _MOST or time.monotonic() >= end or has_ended(vm):
                raise
    raise AssertionError  # the loop returns or raises


def await_end(vm: Running, end: float) -> None:
    """Wait until nothing that was begun in the guest runs; the channel has some time to come back.

    The medium must not go while somebody reads it, nor may things be done twice at once.

    Raises:
        ChannelError: It did not come back.
        DeadlineError: Something still runs at ``end``.
    """
    back = min(time.monotonic() + _BACK_S, end)
    while True:
        try:
            left = max(end - time.monotonic(), 1.0)
            vm.channel().run(bootstrap.await_command(), timeout_s=left)
            return
        except ChannelError:
            if time.monotonic() >= back or has_ended(vm):
                raise
        time.sleep(_PAUSE_S)  # it is being restarted, which nothing tells
