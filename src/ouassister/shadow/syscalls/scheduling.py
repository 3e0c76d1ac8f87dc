"""Priorities, policies and limits of the guest's processes, and how many processors it has.

Source: Linux v6.1 kernel/sys.c (``getpriority``, ``prlimit64``), kernel/sched/core.c
(``sched_getaffinity``, ``sched_getattr``), block/ioprio.c (``__get_task_ioprio``),
include/uapi/linux/{sched,sched/types,ioprio,resource}.h.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from ouassister.shadow import sandbox
from ouassister.shadow.syscalls import caller
from ouassister.shadow.syscalls.notify import Call, Pass, Result, read_memory, write_memory
from ouassister.shadow.syscalls.records import RECORDED

if TYPE_CHECKING:
    from ouassister.shadow.syscalls.context import Answerer, Context
    from ouassister.shadow.syscalls.facts import GuestProcess

_PRIO_PROCESS, _IOPRIO_WHO_PROCESS = 0, 1
_SCHED_FIFO, _SCHED_RR, _SCHED_IDLE = 1, 2, 5
_CLASS_RT, _CLASS_BE, _CLASS_IDLE, _CLASS_SHIFT = 1, 2, 3, 13
_ATTR: Final = struct.Struct("<IIQiIQQQ")  # struct sched_attr as it was first: 48 bytes
_LIMIT: Final = struct.Struct("<QQ")  # struct rlimit64, the same in both ABIs
_LIMITS: Final = 16  # RLIM_NLIMITS
_PAGE: Final = 4096
_LONG_BITS: Final = 64
_MAX_MASK: Final = 1024  # bytes: CONFIG_NR_CPUS is 8192 at most on x86


def _getpriority(context: Context, _listener: int, call: Call) -> Result:
    if call.signed(0) != _PRIO_PROCESS:  # a group, or a user's id
        return Pass.CONTINUE
    return 20 - context.process(call.signed(1)).nice


def _setpriority(context: Context, listener: int, call: Call) -> Result:
    if call.signed(0) != _PRIO_PROCESS:
        return Pass.CONTINUE
    pid, nice = call.signed(1), max(-20, min(19, call.signed(2)))
    return _record(context, listener, call, "setpriority", pid, [nice])


def _ioprio_get(context: Context, _listener: int, call: Call) -> Result:
    if call.signed(0) != _IOPRIO_WHO_PROCESS:
        return Pass.CONTINUE
    process = context.process(call.signed(1))
    level = (process.nice + 20) // 5
    if process.policy == _SCHED_IDLE:
        return _CLASS_IDLE << _CLASS_SHIFT | level
    real_time = process.policy in (_SCHED_FIFO, _SCHED_RR)
    return (_CLASS_RT if real_time else _CLASS_BE) << _CLASS_SHIFT | level


def _ioprio_set(context: Context, listener: int, call: Call) -> Result:
    if call.signed(0) != _IOPRIO_WHO_PROCESS:
        return Pass.CONTINUE
    return _record(context, listener, call, "ioprio_set", call.signed(1), [call.unsigned(2)])


def _getscheduler(context: Context, _listener: int, call: Call) -> Result:
    return context.process(call.signed(0)).policy


def _getparam(context: Context, listener: int, call: Call) -> Result:
    priority = context.process(call.signed(0)).priority
    write_memory(listener, call, call.args[1], struct.pack("<i", priority))
    return 0


def _getattr(context: Context, listener: int, call: Call) -> Result:
    process = context.process(call.signed(0))
    if not _ATTR.size <= call.unsigned(2) <= _PAGE or call.unsigned(3):
        raise OSError(errno.EINVAL, "size or flags")
    attributes = (_ATTR.size, process.policy, 0, process.nice, process.priority, 0, 0, 0)
    write_memory(listener, call, call.args[1], _ATTR.pack(*attributes))
    return 0


def _setscheduler(context: Context, listener: int, call: Call) -> Result:
    (priority,) = struct.unpack("<i", read_memory(listener, call, call.args[2], 4))
    more = [call.signed(1), priority]
    return _record(context, listener, call, "sched_setscheduler", call.signed(0), more)


def _setparam(context: Context, listener: int, call: Call) -> Result:
    (priority,) = struct.unpack("<i", read_memory(listener, call, call.args[1], 4))
    return _record(context, listener, call, "sched_setparam", call.signed(0), [priority])


def _setattr(context: Context, listener: int, call: Call) -> Result:
    raw = read_memory(listener, call, call.args[1], _ATTR.size)
    _size, policy, _flags, nice, priority, *_deadline = _ATTR.unpack(raw)
    more = [policy, nice, priority]
    return _record(context, listener, call, "sched_setattr", call.signed(0), more)


def _setaffinity(context: Context, listener: int, call: Call) -> Result:
    size = min(call.unsigned(1), _MAX_MASK)
    mask = int.from_bytes(read_memory(listener, call, call.args[2], size), "little")
    return _record(context, listener, call, "sched_setaffinity", call.signed(0), [f"{mask:#x}"])


def _getaffinity(context: Context, listener: int, call: Call) -> Result:
    """All processes may run everywhere, as far as is known."""
    pid, size = call.signed(0), call.unsigned(1)
    if 0 < pid < sandbox.FIRST_PID and context.processes:
        context.process(pid)
    cpus = context.facts.cpus
    if not cpus:
        return Pass.CONTINUE
    if size % (4 if call.compat else 8) or size * 8 < cpus:
        raise OSError(errno.EINVAL, "size")
    whole = -(-cpus // _LONG_BITS) * _LONG_BITS // 8  # cpumask_size
    mask = ((1 << cpus) - 1).to_bytes(whole, "little")[:size]
    write_memory(listener, call, call.args[2], mask)
    return len(mask)


def _prlimit64(context: Context, listener: int, call: Call) -> Result:
    process, resource = context.process(call.signed(0)), call.unsigned(1)
    new, old = call.args[2], call.args[3]
    if resource >= _LIMITS:
        raise OSError(errno.EINVAL, "no such limit")
    if old:
        _require_owner(listener, call, process, caller.CAP_SYS_RESOURCE)
        if resource >= len(process.limits):
            raise OSError(errno.EPERM, "the guest did not tell")
    if new:
        soft, hard = _LIMIT.unpack(read_memory(listener, call, new, _LIMIT.size))
        if soft > hard:
            raise OSError(errno.EINVAL, "soft over hard")
        more = [resource, soft, hard]
        _record(context, listener, call, "prlimit64", process.pid, more, caller.CAP_SYS_RESOURCE)
    if old:
        write_memory(listener, call, old, _LIMIT.pack(*process.limits[resource]))
    return 0


def _getpgid(context: Context, _listener: int, call: Call) -> Result:
    return _told(context.process(call.signed(0)).group)


def _getsid(context: Context, _listener: int, call: Call) -> Result:
    return _told(context.process(call.signed(0)).session)


def _told(value: int | None) -> int:
    if value is None:
        raise OSError(errno.EPERM, "the guest did not tell")
    return value


def _record(
    context: Context,
    listener: int,
    call: Call,
    name: str,
    pid: int,
    more: list[int | str],
    capability: int = caller.CAP_SYS_NICE,
) -> int:
    process = context.process(pid)
    _require_owner(listener, call, process, capability)
    context.journal.note(call, name, RECORDED, [pid, *more], target=process.comm)
    return 0


def _require_owner(listener: int, call: Call, process: GuestProcess, capability: int) -> None:
    who = caller.look(listener, call)
    if who.euid != process.uid:
        who.require(capability)


ANSWERERS: Final[dict[str, Answerer]] = {
    "getpriority": _getpriority,
    "setpriority": _setpriority,
    "ioprio_get": _ioprio_get,
    "ioprio_set": _ioprio_set,
    "sched_getscheduler": _getscheduler,
    "sched_getparam": _getparam,
    "sched_getattr": _getattr,
    "sched_getaffinity": _getaffinity,
    "sched_setscheduler": _setscheduler,
    "sched_setparam": _setparam,
    "sched_setattr": _setattr,
    "sched_setaffinity": _setaffinity,
    "prlimit64": _prlimit64,
    "getpgid": _getpgid,
    "getsid": _getsid,
}
