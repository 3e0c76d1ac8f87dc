"""Mounts as data: frozen operations that can be printed before, and executed in order.

Operations run after pivot_root(2): targets and the guest's symlinks resolve inside the guest's
tree and nowhere else. What comes from outside is opened before, as an O_PATH descriptor, and
reached through it; `Sources` holds these.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ouassister.shadow import raw
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DEVICE_NODES: Final = ("null", "zero", "full", "random", "urandom", "tty")
_SIZE: Final = "size=256m,nr_inodes=128k"  # else half of the host's memory, for each
_INERT: Final = raw.MS_NOSUID | raw.MS_NODEV


class Sources:
    """Descriptors of what lies outside of the tree, opened before the way there is closed."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._descriptors = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths}

    def descriptor(self, path: str) -> int:
        """The descriptor of ``path``."""
        return self._descriptors[path]

    def __getitem__(self, path: str) -> str:
        """A path that leads to ``path`` from inside the tree, while /proc is mounted there."""
        return f"/proc/self/fd/{self._descriptors[path]}"

    def close(self) -> None:
        """Close all; mounts made from them stay."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class Operation(Protocol):
    """One step of building a mount tree."""

    def describe(self) -> str:
        """One line, as a shell would say it."""

    def sources(self) -> tuple[str, ...]:
        """Outside paths that it takes."""

    def execute(self, sources: Sources) -> None:
        """Do it; raises OSError."""


@contextlib.contextmanager
def exact(target: bytes) -> Iterator[str]:
    """A path to ``target``, to which no symbolic link may lead.

    A program of an earlier run may have put one where the guest has a directory.
    """
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        place = raw.open_part(root, target)
    finally:
        os.close(root)
    try:
        yield f"/proc/self/fd/{place}"
    finally:
        os.close(place)


@dataclass(frozen=True, slots=True)
class Tmpfs:
    """A fresh tmpfs. With ``exact``, no symbolic link may lead to where it is mounted."""

    target: str
    mode: int = 0o755
    read_only: bool = False
    exact: bool = False

    def describe(self) -> str:
        """See `Operation`."""
        return f"mount -t tmpfs -o mode={self.mode:o} tmpfs {self.target}"

    def sources(self) -> tuple[str, ...]:
        """See `Operation`."""
        return ()

    def execute(self, sources: Sources) -> None:
        """See `Operation`."""
        del sources
        options = f"mode={self.mode:o},{_SIZE}"
        if self.exact:
            with exact(os.fsencode(self.target)) as place:
                raw.mount("tmpfs", place, "tmpfs", _INERT, options)
        else:
            raw.mount("tmpfs", self.target, "tmpfs", _INERT, options)
        if self.read_only:
            raw.mount("", self.target, "", raw.MS_REMOUNT | raw.MS_RDONLY | _INERT)


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder made on a tmpfs that was mounted before."""

    target: str
    mode: int = 0o755

    def describe(self) -> str:
        """See `Operation`."""
        return f"mkdir -p -m {self.mode:o} {self.target}"

    def sources(self) -> tuple[str, ...]:
        """See `Operation`."""
        return ()

    def execute(self, sources: Sources) -> None:
        """See `Operation`."""
        del sources
        Path(self.target).mkdir(parents=True, exist_ok=True)
        Path(self.target).chmod(self.mode)


@dataclass(frozen=True, slots=True)
class Bind:
    """A bind mount; the target must exist."""

    source: str
    target: str
    read_only: bool = False

    def describe(self) -> str:
        """See `Operation`."""
        return f"mount --bind {self.source} {self.target}{' (read-only)' * self.read_only}"

    def sources(self) -> tuple[str, ...]:
        """See `Operation`."""
        return (self.source,)

    def execute(self, sources: Sources) -> None:
        """See `Operation`."""
        raw.mount(sources[self.source], self.target, "", raw.MS_BIND)
        if self.read_only:
            flags = raw.MS_BIND | raw.MS_REMOUNT | raw.MS_RDONLY | _INERT
            raw.mount("", self.target, "", flags)


@dataclass(frozen=True, slots=True)
class BindPart:
    """A bind mount of what lies at ``inside`` of a source; no link of the guest's is followed."""

    source: str
    inside: bytes
    target: bytes
    read_only: bool = False
    noexec: bool = False

    def describe(self) -> str:
        """See `Operation`."""
        inside, target = to_text(self.inside), to_text(self.target)
        flags = f"{' (read-only)' * self.read_only}{' (noexec)' * self.noexec}"
        return f"mount --bind {self.source}{inside} {target}{flags}"

    def sources(self) -> tuple[str, ...]:
        """See `Operation`."""
        return (self.source,)

    def execute(self, sources: Sources) -> None:
        """See `Operation`."""
        part = raw.open_part(sources.descriptor(self.source), self.inside)
        try:
            with exact(self.target) as place:
                raw.mount(f"/proc/self/fd/{part}", place, "", raw.MS_BIND)
        finally:
            os.close(part)
        flags = raw.MS_RDONLY * self.read_only | raw.MS_NOEXEC * self.noexec
        if flags:
            with exact(self.target) as place:  # what is mounted there now
                raw.mount("", place, "", raw.MS_BIND | raw.MS_REMOUNT | flags | _INERT)


@dataclass(frozen=True, slots=True)
class Devices:
    """A /dev with harmless nodes only, bound from the host; its own pts and shm."""

    target: str = "/dev"

    def describe(self) -> str:
        """See `Operation`."""
        return f"mount a /dev with {', '.join(DEVICE_NODES)}, pts and shm"

    def sources(self) -> tuple[str, ...]:
        """See `Operation`."""
        return tuple(f"/dev/{name}" for name in DEVICE_NODES)

    def execute(self, sources: Sources) -> None:
        """See `Operation`."""
        raw.mount("tmpfs", "/dev", "tmpfs", raw.MS_NOSUID, f"mode=755,{_SIZE}")
        device = Path("/dev")
        for name in DEVICE_NODES:
            (device / name).touch()
            raw.mount(sources[f"/dev/{name}"], str(device / name), "", raw.MS_BIND)
        for name, mode in (("pts", 0o755), ("shm", 0o1777)):
            Folder(f"/dev/{name}", mode).execute(sources)
        options = "newinstance,ptmxmode=0666,mode=620,gid=5"
        raw.mount("devpts", "/dev/pts", "devpts", raw.MS_NOSUID | raw.MS_NOEXEC, options)
        for name, link in (
            ("ptmx", "pts/ptmx"),
            ("fd", "/proc/self/fd"),
            ("stdin", "fd/0"),
            ("stdout", "fd/1"),
            ("stderr", "fd/2"),
            ("log", "/run/systemd/journal/dev-log"),
        ):
            (device / name).symlink_to(link)


def enter_tree(root: str, operations: Iterable[Operation]) -> None:
    """Make ``root`` the root of the calling process, with ``operations`` on it.

    The caller is alone in new mount and pid namespaces, and ``root`` is a mount. /proc is
    mounted first: it is what makes the sources reachable.

    Raises:
        OSError: The message names the operation that failed.
    """
    plan = tuple(operations)
    sources = Sources({path for operation in plan for path in operation.sources()})
    outside = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir(root)
    raw.pivot_root(".", ".")  # the old root now covers the new one, and goes below
    raw.mount("proc", "/proc", "proc", _INERT | raw.MS_NOEXEC)
    for operation in plan:
        try:
            operation.execute(sources)
        except OSError as error:
            raise OSError(error.errno, f"{operation.describe()}: {error.strerror}") from error
    os.fchdir(outside)
    raw.umount(".", raw.MNT_DETACH)
    os.chdir("/")
    os.close(outside)
    sources.close()
