"""Signals to the guest's processes: recorded. Whether a process exists: told from memory.

Source: Linux v6.1 kernel/signal.c (``kill_something_info``, ``kill_ok_by_cred``, ``do_tkill``),
kernel/pid.c (``pidfd_open``), fs/proc/fd.c and kernel/fork.c (``pidfd_show_fdinfo``).
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.shadow.syscalls import caller
from ouassister.shadow.syscalls.notify import Call, Descriptor, Pass, Result, check
from ouassister.shadow.syscalls.records import RECORDED

if TYPE_CHECKING:
    from ouassister.shadow.syscalls.context import Answerer, Context
    from ouassister.shadow.syscalls.facts import GuestProcess

_LAST_SIGNAL: Final = 64  # _NSIG
_PIDFD_FLAGS: Final = os.O_NONBLOCK | os.O_EXCL  # PIDFD_NONBLOCK, PIDFD_THREAD


def signal_name(number: int) -> str:
    """What a signal is called; its number where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _kill(context: Context, listener: int, call: Call) -> Result:
    pid, number = call.signed(0), call.signed(1)
    if pid == -1:
        found = context.facts.processes
    elif pid < 0:
        found = context.group(-pid)
    else:
        found = (context.process(pid),)
    return _send(context, listener, call, "kill", found, [pid], number)


def _tkill(context: Context, listener: int, call: Call) -> Result:
    thread, number = call.signed(0), call.signed(1)
    found = (context.process(thread),)
    return _send(context, listener, call, "tkill", found, [thread], number)


def _tgkill(context: Context, listener: int, call: Call) -> Result:
    return _to_thread(context, listener, call, "tgkill")


def _rt_tgsigqueueinfo(context: Context, listener: int, call: Call) -> Result:
    return _to_thread(context, listener, call, "rt_tgsigqueueinfo")


def _to_thread(context: Context, listener: int, call: Call, name: str) -> Result:
    pid, thread, number = call.signed(0), call.signed(1), call.signed(2)
    process = context.process(thread)
    if process.pid != pid:
        raise OSError(errno.ESRCH, "no such thread of that process")
    return _send(context, listener, call, name, (process,), [pid, thread], number)


def _rt_sigqueueinfo(context: Context, listener: int, call: Call) -> Result:
    pid, number = call.signed(0), call.signed(1)
    found = (context.process(pid),)
    return _send(context, listener, call, "rt_sigqueueinfo", found, [pid], number)


def _pidfd_send_signal(context: Context, listener: int, call: Call) -> Result:
    pid = _stand_in(context, listener, call, call.signed(0))
    if pid is None:
        return Pass.CONTINUE
    found = (context.process(pid),)
    return _send(context, listener, call, "pidfd_send_signal", found, [pid], call.signed(1))


def _send(
    context: Context,
    listener: int,
    call: Call,
    name: str,
    targets: tuple[GuestProcess, ...],
    pids: list[int],
    number: int,
) -> int:
    """Record a signal to all processes that the caller may send one to."""
    if not 0 <= number <= _LAST_SIGNAL:
        raise OSError(errno.EINVAL, "no such signal")
    who = caller.look(listener, call)
    allowed = [one for one in targets if _may_signal(who, one)]
    if not allowed:
        raise OSError(errno.EPERM, "another owner's process")
    if number:
        comms = b" ".join(dict.fromkeys(one.comm for one in allowed))
        context.journal.note(call, name, RECORDED, [*pids, signal_name(number)], target=comms)
    return 0


def _may_signal(who: caller.Caller, target: GuestProcess) -> bool:
    same = {who.uid, who.euid} & {target.uid, target.suid}
    return bool(same) or who.capable(caller.CAP_KILL)


def _pidfd_open(context: Context, _listener: int, call: Call) -> Result:
    pid, flags = call.signed(0), call.unsigned(1)
    if flags & ~_PIDFD_FLAGS:
        raise OSError(errno.EINVAL, "unknown flags")
    process = context.process(pid)
    if process.pid != pid and not flags & os.O_EXCL:
        raise OSError(errno.EINVAL, "a thread that leads no process")
    return Descriptor(context.stand_ins.descriptor(process.pid, flags & os.O_NONBLOCK))


def _stand_in(context: Context, listener: int, call: Call, descriptor: int) -> int | None:
    """The guest's process that a descriptor of the caller stands for.

    The descriptor shows its process's pid in the namespace of the /proc that is asked, ours.
    """
    try:
        text = Path(f"/proc/{call.pid}/fdinfo/{descriptor}").read_bytes()
    except FileNotFoundError as error:
        raise OSError(errno.EBADF, "no such descriptor") from error
    check(listener, call)
    for line in text.splitlines():
        if line.startswith(b"Pid:"):
            return context.stand_ins.guest_pid(int(line.split()[1]))
    return None


ANSWERERS: Final[dict[str, Answerer]] = {
    "kill": _kill,
    "tkill": _tkill,
    "tgkill": _tgkill,
    "rt_sigqueueinfo": _rt_sigqueueinfo,
    "rt_tgsigqueueinfo": _rt_tgsigqueueinfo,
    "pidfd_open": _pidfd_open,
    "pidfd_send_signal": _pidfd_send_signal,
}
