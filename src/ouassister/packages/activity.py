"""What the guest's package manager was doing when the guest fell asleep.

Processes tell: the package manager's own, with the locks that they hold, and the maintainer scripts
that dpkg has started, whose path names the package that is half-installed.

Source: dpkg 1.21 ``lib/dpkg/pkg-files.c`` (``INFODIR/NAME[:ARCH].SCRIPT``), ``src/main/script.c``
(``maintscript_exec``), ``src/main/unpack.c`` (``tmp.ci`` holds the scripts of a package on its way
in); dpkg-deb(1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.model import GuestPid
from ouassister.packages import apt
from ouassister.text import to_text

if TYPE_CHECKING:
    from ouassister.model import GuestView, Task

_SCRIPT: Final = re.compile(
    rb"/var/lib/dpkg/(?:info/(?P<name>[a-z0-9][a-z0-9+.-]{0,254}(?::[a-z0-9-]{1,64})?)\.|tmp\.ci/)"
    rb"(?P<script>preinst|postinst|prerm|postrm|config)"
)
_ARCHIVE: Final = re.compile(rb"(?:.*/)?(?P<name>[a-z0-9][a-z0-9+.-]{0,254})_[^/]*\.deb")
_DPKG_DEB: Final = b"/usr/bin/dpkg-deb"


@dataclass(frozen=True, slots=True)
class Activity:
    """One process of the package manager.

    Attributes:
        pid: Of the process.
        program: Its executable.
        package: Which one it works on, as far as its command line tells; "" otherwise.
        step: "preinst", "postinst", "prerm", "postrm", "config" or "unpack"; "" otherwise.
        locks: Which locks of the package manager it holds.
    """

    pid: GuestPid
    program: str
    package: str
    step: str
    locks: tuple[str, ...]


def activity(view: GuestView) -> tuple[Activity, ...]:
    """List the processes that are at work on packages, or hold the package manager's locks."""
    held: dict[int, list[str]] = {}
    for lock in view.held_locks or ():
        if lock.path in apt.LOCKS:
            held.setdefault(lock.pid, []).append(to_text(lock.path))
    found = []
    for task in view.tasks:
        package, step = _work(task)
        if task.exe in apt.UPDATERS or step or task.pid in held:
            program = to_text(task.exe or task.comm)
            locks = tuple(held.get(task.pid, ()))
            found.append(Activity(task.pid, program, package, step, locks))
    return tuple(found)


def _work(task: Task) -> tuple[str, str]:
    for word in task.cmdline[:3]:  # a script is the interpreter's first argument, or its second
        if match := _SCRIPT.fullmatch(word):
            return (match["name"] or b"").decode(), match["script"].decode()
    if task.exe == _DPKG_DEB:
        for word in task.cmdline[1:]:
            if match := _ARCHIVE.fullmatch(word):
                return match["name"].decode(), "unpack"
    return "", ""
