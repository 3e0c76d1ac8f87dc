"""What the sleeping guest's service manager had running, as far as memory tells.

The manager's own tables lie in its heap, without types to read them by. What it leaves outside of
it tells most: the control groups of its units and the processes in them, the links that it keeps
in /run/systemd/units while a unit is not inactive, the mounts, and the sockets that it holds open.

Not known, and answered as if it were not so: that a unit failed, that a job waits, the state of a
device unit, why a unit is where it is. Targets, timers and paths leave nothing at all: `units`
takes those for active that the default target leads to.

Source: systemd v252 src/core/unit.c (``unit_export_state_files``, ``unit_prepare_exec``,
``unit_notify``); Linux mount(8) names, systemd.mount(5) for how a path becomes a unit's name.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.shadow.servicemanager.unitfiles import is_unit_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.model import GuestView, Task, Tmpfs, TmpfsNode

_MAX_UNITS: Final = 16384
_MAX_PROCESSES: Final = 65536
_MAX_TEXT: Final = 512
_LINKS: Final = b"/systemd/units/"
_INVOCATION: Final = b"invocation:"
_RUN: Final = b"/run"
# systemd makes no units of what it mounts before all else (src/shared/mount-setup.c).
_NO_UNITS: Final = frozenset(
    (b"/proc", b"/sys", b"/dev", b"/dev/shm", b"/dev/pts", b"/run", b"/run/lock",  # Debian's
     b"/sys/kernel/security",
     b"/sys/fs/cgroup", b"/sys/fs/pstore", b"/sys/fs/bpf", b"/sys/firmware/efi/efivars")
)  # fmt: skip
_PLAIN: Final = frozenset((string.ascii_letters + string.digits + ":_.").encode())
_NEEDS_QUOTES: Final = frozenset(b" \t\n\r\"\\`$*?['()<>|&;!")


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a unit. ``command`` is cut."""

    pid: int
    parent: int
    threads: int
    start_us: int  # since boot
    name: str
    command: str


@dataclass(frozen=True, slots=True)
class Invocation:
    """A unit that was not inactive, since when, and systemd's id for that time."""

    unit: str
    id: str
    since_us: int  # since the epoch


@dataclass(frozen=True, slots=True)
class RunningUnit:
    """A unit with processes."""

    unit: str
    cgroup: str
    processes: tuple[Process, ...]


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount of init's namespace, by the name of its unit."""

    unit: str
    what: str
    where: str
    fstype: str


@dataclass(frozen=True, slots=True)
class Daemon:
    """Where processes listen, and their units: ``/path``, ``@name`` or ``tcp:80``.

    The manager's own sockets are of its own unit, init.scope, which nobody stops.
    """

    address: str
    units: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ManagerState:
    """All that the stand-in is told of the guest. None: memory did not tell."""

    booted_us: int  # since the epoch
    units: tuple[RunningUnit, ...]
    invocations: tuple[Invocation, ...] | None
    mounts: tuple[Mounted, ...]
    swaps: tuple[str, ...]  # names of units
    sockets: tuple[str, ...] | None  # what the manager listens on: a path, or a port
    daemons: tuple[Daemon, ...] = ()


def collect(view: GuestView) -> ManagerState:
    """Take the service manager's state out of what the kernel knows.

    Args:
        view: With tasks in detail; with tmpfs, files and network where they can be had.
    """
    tmpfs = view.tmpfs
    if tmpfs is None and view.tmpfs_content is not None:
        tmpfs = tuple(content.tmpfs for content in view.tmpfs_content)
    grouped: dict[str, list[Task]] = {}
    for task in view.tasks[:_MAX_PROCESSES]:
        if task.detail is not None and is_unit_name(task.detail.unit):
            grouped.setdefault(task.detail.unit, []).append(task)
    units = tuple(
        RunningUnit(unit, _cgroup(tasks[0], unit), tuple(map(_process, _in_order(tasks))))
        for unit, tasks in sorted(grouped.items())[:_MAX_UNITS]
    )
    mounts = {
        name: Mounted(name, _text(mount.source), _text(mount.target), mount.fstype)
        for mount in view.mounts[:_MAX_UNITS]
        if mount.target not in _NO_UNITS
        and mount.fstype != "autofs"
        and is_unit_name(name := path_unit(mount.target, "mount"))
    }
    swaps = tuple(path_unit(swap.path, "swap") for swap in view.swaps or ())
    return ManagerState(
        booted_us=(view.suspended_at_s - view.uptime_s) * 1_000_000,
        units=units,
        invocations=None if tmpfs is None else _invocations(tmpfs),
        mounts=tuple(mounts.values()),
        swaps=tuple(filter(is_unit_name, swaps)),
        sockets=_sockets(view),
        daemons=_daemons(view),
    )


def path_unit(path: bytes, kind: str) -> str:
    """The unit that stands for a path, as systemd-escape(1) makes it."""
    parts = [part for part in path.split(b"/") if part]
    if not parts:
        return f"-.{kind}"
    escaped = "-".join(
        "".join(
            chr(byte) if byte in _PLAIN and not (i == n == 0 and byte == 0x2E) else f"\\x{byte:02x}"
            for n, byte in enumerate(part)
        )
        for i, part in enumerate(parts)
    )
    return f"{escaped}.{kind}"


def _in_order(tasks: Iterable[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: (task.start_ns, task.pid))


def _process(task: Task) -> Process:
    detail = task.detail
    words = list(task.cmdline)
    while words and not words[-1]:  # what a title has left of the words before it
        words.pop()
    command = _text(b" ".join(map(_quoted, words))) if words else f"[{_text(task.comm)}]"
    return Process(
        pid=task.pid,
        parent=task.parent,
        threads=len(detail.threads) if detail is not None else 1,
        start_us=task.start_ns // 1000,
        name=_text(task.comm),
        command=command,
    )


def _quoted(word: bytes) -> bytes:
    """As systemd shows a word of a command line.

    Source: systemd v252 src/basic/escape.c (``shell_maybe_quote``).
    """
    if word and not set(word) & _NEEDS_QUOTES:
        return word
    return b'"%s"' % re.sub(rb'(["\\\\`$])', rb"\\\1", word)


def _cgroup(task: Task, unit: str) -> str:
    """The control group of the unit itself: processes may lie in groups below it."""
    for group in task.detail.cgroups if task.detail is not None else ():
        if group.hierarchy == 0 or group.controllers == "name=systemd":
            head, found, _ = group.path.partition(b"/" + unit.encode())
            if found:
                return _text(head + found)
    return ""


def _invocations(tmpfs: tuple[Tmpfs, ...]) -> tuple[Invocation, ...] | None:
    for one in tmpfs:
        if one.target == _RUN:
            links = [node for node in one.nodes if node.path.startswith(_LINKS + _INVOCATION)]
            found = map(_invocation, links[:_MAX_UNITS])
            return tuple(item for item in found if item is not None)
    return None


def _invocation(node: TmpfsNode) -> Invocation | None:
    unit = node.path.removeprefix(_LINKS + _INVOCATION).decode("ascii", "replace")
    target = (node.target or b"").decode("ascii", "replace")
    hexadecimal = len(target) == 32 and set(target) <= set("0123456789abcdef")
    if not is_unit_name(unit) or not hexadecimal:
        return None
    return Invocation(unit, target, node.mtime_ns // 1000)


def _sockets(view: GuestView) -> tuple[str, ...] | None:
    """What the first process holds open of the sockets that others can reach."""
    if view.files is None or view.sockets is None:
        return None
    held = {
        file.path for process in view.files if process.pid == 1 for file in process.files
    }  # fmt: skip
    return tuple(
        sorted(
            {
                _text(one.address) if one.protocol.startswith("unix") else str(one.port)
                for one in view.sockets.bound
                if b"socket:[%d]" % one.inode in held
            }
        )
    )


def _daemons(view: GuestView) -> tuple[Daemon, ...]:
    """Who listens where; one that a process of no unit listens at as well is left out."""
    if view.files is None or view.sockets is None:
        return ()
    unit_of = {
        task.pid: task.detail.unit
        for task in view.tasks
        if task.detail is not None and is_unit_name(task.detail.unit)
    }
    holders: dict[bytes, set[str]] = {}
    for process in view.files:
        for file in process.files:
            holders.setdefault(file.path, set()).add(unit_of.get(process.pid, ""))
    found: dict[str, set[str]] = {}
    for one in view.sockets.bound[:_MAX_UNITS]:
        if not one.listening:
            continue
        address = f"tcp:{one.port}"
        if one.protocol.startswith("unix"):
            address = one.address.decode("utf-8", "surrogateescape").replace("\0", "@")
        if address.startswith("/var/run/"):
            address = address.removeprefix("/var")
        units = found.setdefault(address, set())
        units |= holders.get(b"socket:[%d]" % one.inode, {""})
    return tuple(
        Daemon(address, tuple(sorted(units)))
        for address, units in sorted(found.items())
        if "" not in units
    )


def _text(raw: bytes) -> str:
    """What D-Bus takes for a string; only a program of the guest gets to see it."""
    return raw[:_MAX_TEXT].replace(b"\0", b" ").decode("utf-8", "replace").rstrip()
