"""The machine as a whole: what it has, its clock, its modules, swap and power.

Source: Linux v6.1 kernel/sys.c (``do_sysinfo``, ``sysinfo``), kernel/reboot.c, kernel/module/,
kernel/printk/printk.c (``do_syslog``), fs/quota/quota.c, kernel/time/{time,ntp}.c,
include/uapi/linux/{sysinfo,reboot,quota,timex}.h.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from ouassister.shadow.syscalls import caller
from ouassister.shadow.syscalls.notify import (
    Call,
    Pass,
    Result,
    read_memory,
    read_string,
    write_memory,
)
from ouassister.shadow.syscalls.records import DENIED, RECORDED

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.shadow.syscalls.context import Answerer, Context

_SYSINFO: Final = struct.Struct("<q9QHxx4x2QI4x")
_SYSINFO_32: Final = struct.Struct("<i9IHxx3I8x")
_PAGE_SHIFT: Final = 12
_WORD: Final = 0xFFFF_FFFF

_ADJ_ADJTIME, _ADJ_OFFSET_READONLY = 0x8000, 0x2000
_CLOCK_REALTIME: Final = 0

_REBOOT_MAGIC: Final = 0xFEE1DEAD
_REBOOT_MAGIC_2: Final = frozenset((672274793, 85072278, 369367448, 537993216))
_REBOOT: Final = {
    0x01234567: "restart",
    0xCDEF0123: "halt",
    0x4321FEDC: "power-off",
    0xA1B2C3D4: "restart2",
    0xD000FCE2: "suspend",
    0x45584543: "kexec",
    0x89ABCDEF: "ctrl-alt-del on",
    0: "ctrl-alt-del off",
}
_RESTART2: Final = 0xA1B2C3D4

_MODULE_NAME: Final = b"\0name="
_MAX_IMAGE: Final = 4 << 20

_LOG_OPEN: Final = frozenset((0, 1))
_LOG_CHANGES: Final = {5: "clear", 6: "console-off", 7: "console-on", 8: "console-level"}

# fs/quota/quota.c: subcommands that change something; 0x80_0001 is Q_SYNC.
_QUOTA_CHANGES: Final = {
    0x800002: "quotaon", 0x800003: "quotaoff", 0x800006: "setinfo", 0x800008: "setquota",
}  # fmt: skip
_QUOTA_SYNC: Final = 0x800001


def _sysinfo(context: Context, listener: int, call: Call) -> Result:
    memory, facts = context.facts.memory, context.facts
    if memory is None:
        return Pass.CONTINUE
    sizes = [memory.total, memory.free, memory.shared, memory.buffers]
    sizes += [memory.swap_total, memory.swap_free]
    threads = facts.threads & 0xFFFF
    if not call.compat:
        packed = _SYSINFO.pack(facts.uptime_s, *facts.loads, *sizes, threads, 0, 0, 1)
        write_memory(listener, call, call.args[0], packed)
        return 0
    unit = 1
    if max(sizes) > _WORD:  # as compat_sysinfo does, in units of a page
        unit = 1 << _PAGE_SHIFT
        sizes = [min(size >> _PAGE_SHIFT, _WORD) for size in sizes]
    packed = _SYSINFO_32.pack(facts.uptime_s, *facts.loads, *sizes, threads, 0, 0, unit)
    write_memory(listener, call, call.args[0], packed)
    return 0


# --- the clock ---


def _clock(name: str, words: int, *, wide: bool, clock: bool) -> Answerer:
    """A call that sets the time from ``words`` numbers, which are longs of the ABI or 64 bits."""

    def answer(context: Context, listener: int, call: Call) -> Result:
        caller.require(listener, call, caller.CAP_SYS_TIME)
        if clock and call.signed(0) != _CLOCK_REALTIME:
            raise OSError(errno.EINVAL, "a clock that cannot be set")
        address, args = call.args[1 if clock else 0], []
        if address:
            kind = "i" if call.compat and not wide else "q"
            layout = struct.Struct(f"<{words}{kind}")
            args = list(layout.unpack(read_memory(listener, call, address, layout.size)))
        context.journal.note(call, name, RECORDED, args)
        return 0

    return answer


def _adjust(name: str, argument: int) -> Answerer:
    def answer(context: Context, listener: int, call: Call) -> Result:
        (modes,) = struct.unpack("<I", read_memory(listener, call, call.args[argument], 4))
        if not modes or (modes & _ADJ_ADJTIME and modes & _ADJ_OFFSET_READONLY):
            return Pass.CONTINUE  # without CAP_SYS_TIME over the host, the kernel changes nothing
        caller.require(listener, call, caller.CAP_SYS_TIME)
        context.journal.note(call, name, RECORDED, [f"{modes:#x}"])
        return 0

    return answer


# --- power, modules, swap, accounting ---


def _reboot(context: Context, listener: int, call: Call) -> Result:
    caller.require(listener, call, caller.CAP_SYS_BOOT)
    command = call.unsigned(2)
    if call.unsigned(0) != _REBOOT_MAGIC or call.unsigned(1) not in _REBOOT_MAGIC_2:
        raise OSError(errno.EINVAL, "magic")
    if command not in _REBOOT:
        raise OSError(errno.EINVAL, "unknown command")
    args: list[int | bytes | str] = [_REBOOT[command]]
    if command == _RESTART2:
        args.append(read_string(listener, call, call.args[3], 256))
    context.journal.note(call, "reboot", RECORDED, args)
    return 0


def _init_module(context: Context, listener: int, call: Call) -> Result:
    caller.require(listener, call, caller.CAP_SYS_MODULE)
    image = read_memory(listener, call, call.args[0], min(call.args[1], _MAX_IMAGE))
    _before, _key, rest = image.partition(_MODULE_NAME)  # of the section .modinfo
    name = rest.partition(b"\0")[0][:64]
    parameters = read_string(listener, call, call.args[2])
    context.journal.note(call, "init_module", RECORDED, [name, parameters])
    return 0


def _finit_module(context: Context, listener: int, call: Call) -> Result:
    caller.require(listener, call, caller.CAP_SYS_MODULE)
    path = caller.descriptor_path(listener, call, call.signed(0))
    parameters = read_string(listener, call, call.args[1])
    context.journal.note(call, "finit_module", RECORDED, [path, parameters])
    return 0


def _named(name: str, capability: int, *, optional: bool = False) -> Answerer:
    """A call whose first argument is a name or a path, to be recorded."""

    def answer(context: Context, listener: int, call: Call) -> Result:
        caller.require(listener, call, capability)
        args: list[int | bytes | str] = []
        if call.args[0] or not optional:
            args.append(read_string(listener, call, call.args[0]))
        context.journal.note(call, name, RECORDED, args)
        return 0

    return answer


def _syslog(context: Context, listener: int, call: Call) -> Result:
    action = call.signed(0)
    if action in _LOG_OPEN:
        return 0
    if action not in _LOG_CHANGES:
        context.journal.note(call, "syslog", DENIED, [action])
        raise OSError(errno.EPERM, "the host's kernel log")
    caller.require(listener, call, caller.CAP_SYSLOG)
    context.journal.note(call, "syslog", RECORDED, [_LOG_CHANGES[action]])
    return 0


def _quota(name: str, argument: int, place: Callable[[int, Call], bytes]) -> Answerer:
    def answer(context: Context, listener: int, call: Call) -> Result:
        command = call.unsigned(argument) >> 8
        if command == _QUOTA_SYNC:
            return 0
        if command not in _QUOTA_CHANGES:
            raise OSError(errno.ESRCH, "no quota")
        caller.require(listener, call, caller.CAP_SYS_ADMIN)
        what: list[int | bytes | str] = [_QUOTA_CHANGES[command], place(listener, call)]
        context.journal.note(call, name, RECORDED, what)
        return 0

    return answer


def _quota_path(listener: int, call: Call) -> bytes:
    return read_string(listener, call, call.args[1]) if call.args[1] else b""


def _quota_descriptor(listener: int, call: Call) -> bytes:
    return caller.descriptor_path(listener, call, call.signed(0))


ANSWERERS: Final[dict[str, Answerer]] = {
    "sysinfo": _sysinfo,
    "settimeofday": _clock("settimeofday", 2, wide=False, clock=False),
    "stime": _clock("stime", 1, wide=False, clock=False),
    "clock_settime": _clock("clock_settime", 2, wide=False, clock=True),
    "clock_settime64": _clock("clock_settime64", 2, wide=True, clock=True),
    "adjtimex": _adjust("adjtimex", 0),
    "clock_adjtime": _adjust("clock_adjtime", 1),
    "clock_adjtime64": _adjust("clock_adjtime64", 1),
    "reboot": _reboot,
    "init_module": _init_module,
    "finit_module": _finit_module,
    "delete_module": _named("delete_module", caller.CAP_SYS_MODULE),
    "swapon": _named("swapon", caller.CAP_SYS_ADMIN),
    "swapoff": _named("swapoff", caller.CAP_SYS_ADMIN),
    "acct": _named("acct", caller.CAP_SYS_PACCT, optional=True),
    "syslog": _syslog,
    "quotactl": _quota("quotactl", 0, _quota_path),
    "quotactl_fd": _quota("quotactl_fd", 1, _quota_descriptor),
}
