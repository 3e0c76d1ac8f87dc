"""Files that sleeping processes hold open for writing, read from memory.

What the update writes there, the process does not know of: it would write its own over it, or to a
file that has no name any more.

Source: Linux v6.1 ``fs/proc/fd.c``; ``mmap(2)`` (a shared mapping outlives its descriptor).
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.guest_model import GuestPid, Subject
from ouassister.restart import reach, uses
from ouassister.restart.uses import ProcessUse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ouassister.model import Entry, GuestView

_UNIT: Final = re.compile(r"[A-Za-z0-9:_.@\\-]{1,200}\.service")
_DELETED: Final = b" (deleted)"
SUBJECTS: Final = frozenset((Subject.TASKS, Subject.MAPS, Subject.FILES, Subject.NETWORK))


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A file and the process that may write to it.

    ``program`` is that process's executable, ``unit`` the service manager's unit that it is of.
    """

    path: bytes
    inode: int
    pid: GuestPid
    comm: bytes
    program: bytes
    unit: str = ""

    @property
    def known_by(self) -> tuple[bytes, ...]:
        """Files whose package is the process's: its program, and what its unit is defined by."""
        files = [self.program] if self.program else []
        if _UNIT.fullmatch(self.unit):
            name = re.sub("@.*(?=[.])", "@", self.unit).encode("ascii")
            files.append(b"/usr/lib/systemd/system/" + name)
        return tuple(files)


@dataclass(frozen=True, slots=True)
class Running:
    """What processes run and hold; ``unknown`` tells what this kernel does not say of it.

    ``out_of_reach`` has units that nobody on a network reaches (`ouassister.restart.reach`).
    """

    uses: tuple[ProcessUse, ...]
    held: tuple[HeldFile, ...]
    unknown: tuple[str, ...] = ()
    out_of_reach: frozenset[str] = frozenset()


def running(view: GuestView) -> Running:
    """Read it from a view with `SUBJECTS`."""
    unknown = () if view.files is not None else ("which files are open cannot be told",)
    return Running(uses.of_view(view), of_view(view), unknown, reach.out_of_reach(view))


def of_view(view: GuestView) -> tuple[HeldFile, ...]:
    """Read it from a view with open files and mappings; each file once for each process."""
    tasks = {task.pid: task for task in view.tasks}
    found: dict[tuple[GuestPid, bytes, int], HeldFile] = {}
    for pid, path, inode in (*_open(view), *_mapped(view)):
        task = tasks.get(pid)
        if task is None:
            continue
        program = (task.exe or b"").removesuffix(_DELETED)
        unit = task.detail.unit if task.detail else ""
        found.setdefault((pid, path, inode), HeldFile(path, inode, pid, task.comm, program, unit))
    return tuple(found.values())


def written(held: Iterable[HeldFile], entries: Iterable[Entry]) -> tuple[HeldFile, ...]:
    """Those that a change set would write, replace or delete: the same path and inode."""
    old: dict[bytes, int] = {}
    for entry in entries:
        if entry.expected is not None:
            old[entry.path] = entry.expected.inode
        old.update((path, expected.inode) for path, expected in entry.below)
    return tuple(file for file in held if old.get(file.path, 0) == file.inode != 0)


def _open(view: GuestView) -> Iterator[tuple[GuestPid, bytes, int]]:
    for process in view.files or ():
        for file in process.files:
            if file.writable and not file.deleted and stat.S_ISREG(file.mode):
                yield process.pid, file.path, file.inode


def _mapped(view: GuestView) -> Iterator[tuple[GuestPid, bytes, int]]:
    for process in view.maps or ():
        for vma in process.vmas:
            shared = "w" in vma.permissions and vma.permissions.endswith("s")
            if shared and vma.inode and not vma.path.endswith(_DELETED):
                yield process.pid, vma.path, vma.inode
