"""Facts for the handlers of system calls out of the guest's /proc, as the shadow shows it.

Source: Linux v6.1 fs/proc/array.c (``do_task_stat``, ``proc_pid_status``), fs/proc/base.c
(``lnames``), fs/proc/meminfo.c, fs/proc/loadavg.c, fs/proc/uptime.c, kernel/sys.c
(``do_sysinfo``).
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

from ouassister.errors import InternalError
from ouassister.guest_model import GuestPid
from ouassister.shadow.syscalls.daemons import listeners
from ouassister.shadow.syscalls.facts import GuestFacts, GuestMemory, GuestProcess

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ouassister.model import Uts

_LOAD_ONE: Final = 1 << 16  # SI_LOAD_SHIFT
_INFINITY: Final = (1 << 64) - 1
_PID: Final = re.compile(rb"[1-9][0-9]{0,6}")
_LIMIT: Final = re.compile(rb"^Max .{21} +(unlimited|\d+) +(unlimited|\d+)", re.MULTILINE)
_LIMITS: Final = 16  # RLIM_NLIMITS
_STAT: Final = re.compile(rb"(\d+) \((.*)\) (.*)", re.DOTALL)  # a name may contain anything
_CPU: Final = re.compile(rb"^cpu\d+ ", re.MULTILINE)
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
# Fields of /proc/PID/stat, counted from the state: proc(5) counts from the pid, 1.
_GROUP, _SESSION, _NICE, _PRIORITY, _POLICY = 2, 3, 16, 37, 38


def read_facts(files: Mapping[bytes, bytes], uts: Uts) -> GuestFacts:
    """Make the facts.

    Args:
        files: Contents by path from /proc: ``b"1/stat"``. What is missing is not known.
        uts: The guest's names.

    Raises:
        InternalError: A file is not what the kernel prints.
    """
    threads: dict[bytes, list[GuestPid]] = {}
    for path in files:
        pid, _, rest = path.partition(b"/task/")
        if rest.endswith(b"/stat") and _PID.fullmatch(rest[:-5]):
            threads.setdefault(pid, []).append(GuestPid(int(rest[:-5])))
    try:
        return GuestFacts(
            uts,
            tuple(
                _process(files, path[:-5], tuple(sorted(threads.get(path[:-5], ()))))
                for path in files
                if path.endswith(b"/stat") and _PID.fullmatch(path[:-5])
            ),
            cpus=len(_CPU.findall(files.get(b"stat", b""))),
            memory=_memory(files.get(b"meminfo")),
            uptime_s=math.ceil(float(files.get(b"uptime", b"0 0").split()[0])),
            loads=_loads(files.get(b"loadavg")),
            threads=_threads(files.get(b"loadavg")),
            mounted=_mounted(files.get(b"1/mounts", b"")),
            listeners=listeners(files),
        )
    except (ValueError, LookupError, OverflowError) as error:
        raise InternalError(f"the guest's /proc is not as the kernel prints it: {error}") from error


def _process(
    files: Mapping[bytes, bytes], pid: bytes, threads: tuple[GuestPid, ...]
) -> GuestProcess:
    found = _STAT.fullmatch(files[pid + b"/stat"])
    if found is None:
        raise ValueError(f"{pid!r}/stat")
    fields = found[3].split()
    uid = _words(files[pid + b"/status"])[b"Uid"].split()
    limits = tuple((_limit(soft), _limit(hard)) for soft, hard in _limits(files, pid))
    return GuestProcess(
        pid=GuestPid(int(pid)),
        comm=found[2],
        uid=int(uid[0]),
        suid=int(uid[2]),
        threads=threads or (GuestPid(int(pid)),),
        nice=int(fields[_NICE]),
        policy=int(fields[_POLICY]),
        priority=int(fields[_PRIORITY]),
        group=int(fields[_GROUP]),
        session=int(fields[_SESSION]),
        limits=limits if len(limits) == _LIMITS else (),
    )


def _limits(files: Mapping[bytes, bytes], pid: bytes) -> list[tuple[bytes, bytes]]:
    """The lines stand in the order of the numbers."""
    return _LIMIT.findall(files.get(pid + b"/limits", b""))


def _limit(word: bytes) -> int:
    return _INFINITY if word == b"unlimited" else int(word)


def _words(text: bytes) -> dict[bytes, bytes]:
    return {key: rest for key, _, rest in (line.partition(b":") for line in text.splitlines())}


def _memory(text: bytes | None) -> GuestMemory | None:
    if text is None:
        return None
    words = _words(text)
    names = (b"MemTotal", b"MemFree", b"Shmem", b"Buffers", b"SwapTotal", b"SwapFree")
    return GuestMemory(*(int(words[name].split()[0]) << 10 for name in names))


def _loads(text: bytes | None) -> tuple[int, int, int]:
    if text is None:
        return (0, 0, 0)
    one, five, fifteen = (round(float(word) * _LOAD_ONE) for word in text.split()[:3])
    return (one, five, fifteen)


def _threads(text: bytes | None) -> int:
    return 0 if text is None else int(text.split()[3].partition(b"/")[2])


def _mounted(text: bytes) -> tuple[bytes, ...]:
    """Where file systems on devices are; spaces and the like are written in octal."""
    lines = [line.split(b" ") for line in text.splitlines()]
    places = [line[1] for line in lines if line[0].startswith(b"/dev/")]
    return tuple(
        _OCTAL.sub(lambda match: bytes((int(match[1], 8) & 0xFF,)), place) for place in places
    )
