"""Records what programs write to files below /sys, and what they read there in vain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.shadow.events import Event, Outcome, encode
from ouassister.shadow.servicemanager.callers import Callers
from ouassister.shadow.sysfs.filesystem import POLICY
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable

ATTRIBUTES: Final = "attributes"
"""The file of records, among the outputs of a shadow: no program of the guest reaches it."""
_MAX_BYTES: Final = 1 << 20
_MAX_UNTOLD: Final = 64
_UEVENT: Final = "/uevent"
_PARSER: Final = "apparmor_parser"
_MAX_WORDS: Final = 1 << 14
# lib/kobject_uevent.c, kobject_actions
_ACTIONS: Final = frozenset(
    (b"add", b"remove", b"change", b"move", b"online", b"offline", b"bind", b"unbind")
)


def recorders(
    path: Path, caller: Callable[[], int]
) -> tuple[Callable[[str, bytes], None], Callable[[str], None]]:
    """Return what `SysFiles` calls when a program wrote a value, and read one that is not told.

    An event of a device is one that udevadm(8) can trigger in the guest; a policy of AppArmor is
    loaded there by the call of its parser that loads it here. A file that is full says so in its
    last line, once.

    Args:
        path: The file of records.
        caller: Tells the pid of who writes, as this process's /proc shows it.
    """
    read = 0

    def record(event: Event) -> None:
        with path.open("ab") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _MAX_BYTES:
                file.write(encode(event))
                if file.tell() >= _MAX_BYTES:
                    file.write(encode(Event(Outcome.LOST, (), detail="more values below /sys")))

    def wrote(name: str, value: bytes) -> None:
        where = f"/sys{to_text(os.fsencode(name))}"
        action = value.partition(b" ")[0]
        if name.endswith(_UEVENT) and action in _ACTIONS:
            device = where.removesuffix(_UEVENT)
            words = ("udevadm", "trigger", f"--action={action.decode()}", device)
            record(Event(Outcome.DEFERRED, words))
            return
        if name in POLICY:
            record(loaded(Path("/proc"), caller()))
            return
        detail = "a value below /sys, for the running guest alone"
        record(Event(Outcome.WITHHELD, ("write", where, to_text(value)), detail=detail))

    def untold(name: str) -> None:
        nonlocal read
        read += 1
        if read <= _MAX_UNTOLD:
            where = f"/sys{to_text(os.fsencode(name))}"
            detail = "the guest's memory does not tell it"
            record(Event(Outcome.REFUSED, ("read", where), detail=detail))
        elif read == _MAX_UNTOLD + 1:
            detail = "more files below /sys that the guest's memory does not tell were read"
            record(Event(Outcome.LOST, (), detail=detail))

    return wrote, untold


def loaded(procfs: Path, pid: int) -> Event:
    """What loads the policy in the guest that a process loads here: the same call.

    The words are a guest's, as those of every recorded call.
    """
    descriptor = os.open(procfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        by = Callers(descriptor).of(pid)
    finally:
        os.close(descriptor)
    try:
        with (procfs / str(pid) / "cmdline").open("rb") as file:
            raw = file.read(_MAX_WORDS)
    except OSError:  # it has been killed
        raw = b""
    words = tuple(to_text(word) for word in raw.split(b"\0")[:-1])
    if words and Path(words[0]).name == _PARSER and words[-1].startswith("/"):
        return Event(Outcome.DEFERRED, (_PARSER, *words[1:]), by.package, by.script)
    detail = "a policy that comes from no file is loaded by no call"
    return Event(Outcome.WITHHELD, words[:1] or ("load",), by.package, by.script, detail)
