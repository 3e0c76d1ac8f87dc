"""Which files each process runs: its mappings, its program, and the script of an interpreter.

Source: Linux v6.1 ``fs/proc/task_mmu.c``, ``fs/binfmt_script.c`` (a script's path follows the
interpreter and its one argument).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.guest_model import GuestPid

if TYPE_CHECKING:
    from ouassister.guest_model import Vma
    from ouassister.model import GuestView, Task

_DELETED: Final = b" (deleted)"
# Where the applier keeps what an update replaced (guest/keep.c): its name is as good as gone.
_KEPT: Final = re.compile(
    rb"(?:/var/lib/ouassister/old-|.*/\.ouassister-)[0-9a-f]{12}(?:-undo)?/.*", re.DOTALL
)
# What is mapped and is no program: the kernel's or a process's own memory.
_MEMORY: Final = (b"/dev/", b"/memfd:", b"/SYSV", b"/run/", b"/tmp/", b"/proc/", b"/sys/")
_INTERPRETER: Final = re.compile(
    rb"/(?:usr/)?(?:local/)?bin/(?:python[0-9.]*|perl[0-9.]*|ruby[0-9.]*|php[0-9.]*|lua[0-9.]*"
    rb"|(?:ba|da|z|k|tc)?sh|node|nodejs|tclsh[0-9.]*|guile[0-9.-]*)"
)
_MOST_ARGUMENTS: Final = 8


@dataclass(frozen=True, slots=True)
class UsedFile:
    """A file that a process runs; ``gone`` when it had no name any more when the guest slept."""

    path: bytes
    inode: int
    gone: bool = False


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """One process of user space, and what it runs.

    ``script`` is the path that an interpreter was given, whose contents it has read once: there
    is no inode to compare. ``apart`` tells that it is in another pid namespace than init.
    """

    pid: GuestPid
    comm: bytes
    unit: str
    user_unit: str
    apart: bool
    files: tuple[UsedFile, ...]
    script: bytes


def of_view(view: GuestView) -> tuple[ProcessUse, ...]:
    """Read it from what is known of a guest: with details of tasks, and with mappings."""
    maps = {one.pid: one.vmas for one in view.maps or ()}
    init = next((task.detail for task in view.tasks if task.pid == 1), None)
    home = init.namespaces.pid if init and init.namespaces else 0
    found = []
    for task in view.tasks:
        if task.kernel_thread or task.detail is None:
            continue
        spaces = task.detail.namespaces
        found.append(
            ProcessUse(
                pid=task.pid,
                comm=task.comm,
                unit=task.detail.unit,
                user_unit=task.detail.user_unit,
                apart=bool(spaces and home and spaces.pid != home),
                files=_files(maps.get(task.pid, ())),
                script=_script(task),
            )
        )
    return tuple(found)


def _files(vmas: tuple[Vma, ...]) -> tuple[UsedFile, ...]:
    """Files that are mapped to be executed, and libraries' other parts go with them."""
    found: dict[int, UsedFile] = {}
    for vma in vmas:
        path = vma.path
        if "x" not in vma.permissions or not path.startswith(b"/") or path.startswith(_MEMORY):
            continue
        gone = path.endswith(_DELETED) or _KEPT.fullmatch(path) is not None
        found[vma.inode] = UsedFile(path.removesuffix(_DELETED), vma.inode, gone)
    return tuple(found.values())


def _script(task: Task) -> bytes:
    """The first argument of an interpreter that is a path; relative ones are the working folder's.

    Options before it have no arguments in what starts services.
    """
    if task.exe is None or not _INTERPRETER.fullmatch(task.exe.removesuffix(_DELETED)):
        return b""
    for word in task.cmdline[1 : 1 + _MOST_ARGUMENTS]:
        if word.startswith(b"-"):
            if word in (b"-c", b"-e", b"-m"):
                return b""
            continue
        cwd = task.detail.cwd if task.detail else None
        if not word.startswith(b"/"):
            if cwd is None:
                return b""
            word = cwd + b"/" + word
        return os.path.normpath(word)
    return b""
