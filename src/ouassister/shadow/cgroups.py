"""A control group of our own for the guest's programs, where the host lets us make one.

Version 2 has one tree, version 1 one for each controller; hosts have either, or both. A group is
made below the caller's own. On version 2 a group with processes in it passes no controllers on, so
that it may have to stand beside the caller's, below the nearest group that does; limits of what is
stepped over are kept. Who may neither has none, and is bounded by `limits` alone.

A process joins through a descriptor that was opened by who made the group: the kernel asks for the
rights of the opener, so that a child without any on the host can still go in (since Linux v5.16,
commit 1756d7994ad8, "cgroup: Use open-time credentials for process migration perm checks").

Source: Linux v6.1 Documentation/admin-guide/cgroup-v2.rst ("No Internal Process Constraint",
"Delegation"), Documentation/admin-guide/cgroup-v1/{memory,pids}.rst, kernel/cgroup/cgroup-v1.c
(``__cgroup1_procs_write``); cgroups(7); proc_pid_mountinfo(5).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PIDS: Final = "pids"
MEMORY: Final = "memory"
_PREFIX: Final = "ouassister-"
_OLD_S: Final = 3600.0
_GONE_S: Final = 5.0
_MAX_COUNTERS: Final = 1 << 16
_V2_LIMITS: Final = {PIDS: "pids.max", MEMORY: "memory.max"}
_V1_LIMITS: Final = {PIDS: "pids.max", MEMORY: "memory.limit_in_bytes"}
# What takes swap: memory that is only moved to the disk of the host is not bounded.
_SWAP: Final = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}
# Counters of what was refused: file, and the word before the number.
_COUNTERS: Final = {
    (1, PIDS): ("pids.events", b"max"),
    (2, PIDS): ("pids.events", b"max"),
    (1, MEMORY): ("memory.oom_control", b"oom_kill"),
    (2, MEMORY): ("memory.events", b"oom_kill"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a group can be made for one controller.

    Attributes:
        controller: Its name.
        version: Of control groups; 1 or 2.
        folder: The group to make it in.
        most: The least limit of the groups between that one and the caller's; None for no limit.
    """

    controller: str
    version: int
    folder: Path
    most: int | None = None


def find(proc: Path = Path("/proc/self")) -> tuple[Place, ...]:
    """Look for where the caller may make a group; nothing is made.

    Args:
        proc: The caller's folder in /proc.
    """
    own = _own_groups((proc / "cgroup").read_text())
    places: dict[str, Place] = {}
    for line in (proc / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mounted = (os.fsdecode(_unescape(word)) for word in before.split()[3:5])
        fstype, _source, options = after.split(" ", 2)
        if fstype == "cgroup2":
            group = _visible(own.get(""), root, mounted)
            for controller in (PIDS, MEMORY) if group is not None else ():
                found = _above(controller, group, Path(mounted)) if group is not None else None
                if found is not None:
                    places.setdefault(controller, found)
        elif fstype == "cgroup":
            for controller in {PIDS, MEMORY} & set(options.split(",")):
                group = _visible(own.get(controller), root, mounted)
                if group is not None and _is_open(group):
                    places[controller] = Place(controller, 1, group)
    return tuple(places[name] for name in sorted(places))


def forget(pid: int, patience_s: float = _GONE_S) -> None:
    """Remove the group that a process made which has ended, however that came.

    Raises:
        OSError: A process is still in it.
    """
    for place in find():
        for folder in place.folder.glob(f"{_PREFIX}{pid}-*"):
            _remove(folder, patience_s)


class Group:
    """A group, made in one or more trees.

    Args:
        places: Where; see `find`. One where it cannot be made is left out.
        limits: For each controller, the most.

    Attributes:
        controllers: What is bounded.
        refused: What is not, though there was a place for it, and why.
    """

    def __init__(self, places: tuple[Place, ...], limits: dict[str, int]) -> None:
        self._folders: list[Path] = []
        self._entrances: list[int] = []
        self._counters: dict[str, tuple[int, bytes]] = {}
        self._seen: dict[str, int] = {}
        self.controllers: tuple[str, ...] = ()
        self.refused: tuple[str, ...] = ()
        name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        for place in places:
            _sweep(place.folder)
            try:
                self._add(place, place.folder / name, limits[place.controller])
            except OSError as error:
                self.refused = (*self.refused, f"{place.controller}: {error}")

    def join(self) -> None:
        """Put the calling process in, and with it what it will start.

        Raises:
            OSError: A kernel before 5.16 asks for the rights of who writes.
        """
        for entrance in self._entrances:
            os.write(entrance, b"0")

    def reached(self) -> tuple[str, ...]:
        """The controllers whose limit refused something since the last call."""
        found = []
        for controller, (descriptor, word) in self._counters.items():
            count = _counter(os.pread(descriptor, _MAX_COUNTERS, 0), word)
            if count > self._seen[controller]:
                found.append(controller)
            self._seen[controller] = count
        return tuple(found)

    def remove(self) -> None:
        """Remove it; the last process in it has ended.

        Raises:
            OSError: A process is still in it.
        """
        for descriptor in (*self._entrances, *(one for one, _ in self._counters.values())):
            os.close(descriptor)
        self._entrances.clear()
        self._counters.clear()
        while self._folders:
            _remove(self._folders.pop(), _GONE_S)

    def _add(self, place: Place, folder: Path, most: int) -> None:
        if folder not in self._folders:
            folder.mkdir()
            self._folders.append(folder)
            self._entrances.append(os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
        if place.most is not None:
            most = min(most, place.most)
        name = (_V1_LIMITS if place.version == 1 else _V2_LIMITS)[place.controller]
        (folder / name).write_text(str(most))
        if place.controller == MEMORY:
            with contextlib.suppress(FileNotFoundError):  # a kernel that does not count swap
                swap = folder / _SWAP[place.version]
                with swap.open("r+") as file:
                    file.write(str(most if place.version == 1 else 0))
        counter, word = _COUNTERS[place.version, place.controller]
        descriptor = os.open(folder / counter, os.O_RDONLY | os.O_CLOEXEC)
        self._counters[place.controller] = (descriptor, word)
        self._seen[place.controller] = _counter(os.pread(descriptor, _MAX_COUNTERS, 0), word)
        self.controllers = (*self.controllers, place.controller)


def _own_groups(text: str) -> dict[str, str]:
    """The caller's group for each controller, and for none: that of version 2."""
    own = {}
    for line in text.splitlines():
        _number, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            own[controller] = path
    return own


def _visible(path: str | None, root: str, mounted: str) -> Path | None:
    """The folder of a group; None where the mount does not show it."""
    if path is None or path.startswith("/.."):
        return None
    if root != "/":
        if path != root and not path.startswith(f"{root}/"):
            return None
        path = path[len(root) :]
    return Path(mounted, path.lstrip("/"))


def _above(controller: str, group: Path, top: Path) -> Place | None:
    """The nearest group of version 2 that passes the controller on, from the caller's upwards."""
    most: int | None = None
    for folder in (group, *group.parents):
        try:
            if controller in (folder / "cgroup.subtree_control").read_text().split():
                return Place(controller, 2, folder, most) if _is_open(folder) else None
            most = _least(most, folder / _V2_LIMITS[controller])
        except OSError:
            return None  # it goes away, or is not ours to look at
        if folder == top:
            break
    return None


def _least(most: int | None, file: Path) -> int | None:
    try:
        word = file.read_text().strip()
    except FileNotFoundError:  # the root group has none, as one without the controller
        return most
    if word == "max":
        return most
    return int(word) if most is None else min(most, int(word))


def _is_open(folder: Path) -> bool:
    """Whether the caller may make a group here and move processes to it."""
    wanted = ((folder, os.W_OK | os.X_OK), (folder / "cgroup.procs", os.W_OK))
    return all(os.access(path, mode, effective_ids=True) for path, mode in wanted)


def _remove(folder: Path, patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)  # for the kernel to take the last process out of it
        else:
            return


def _sweep(folder: Path) -> None:
    """Remove groups of runs that were killed with all that would have removed them."""
    for left in folder.glob(f"{_PREFIX}*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):  # of somebody else, or somebody was faster
            if not Path("/proc", pid).exists() and time.time() - left.stat().st_mtime > _OLD_S:
                left.rmdir()


def _counter(content: bytes, word: bytes) -> int:
    for line in content.splitlines():
        name, _, number = line.partition(b" ")
        if name == word:
            return int(number)
    return 0


def _unescape(word: str) -> bytes:
    """Undo the octal escapes of mountinfo."""
    parts = word.encode().split(b"\\")
    return parts[0] + b"".join(bytes((int(one[:3], 8),)) + one[3:] for one in parts[1:])
