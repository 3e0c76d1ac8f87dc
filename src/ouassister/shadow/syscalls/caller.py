"""Who makes a system call: its owner, its capabilities, its place in the tree of files.

Source: Linux fs/proc/array.c (``proc_pid_status``), include/uapi/linux/capability.h.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.shadow.syscalls.notify import Call, check

if TYPE_CHECKING:
    from collections.abc import Iterator

CAP_DAC_OVERRIDE: Final = 1
CAP_KILL: Final = 5
CAP_NET_RAW: Final = 13
CAP_SYS_MODULE: Final = 16
CAP_SYS_PACCT: Final = 20
CAP_SYS_ADMIN: Final = 21
CAP_SYS_BOOT: Final = 22
CAP_SYS_NICE: Final = 23
CAP_SYS_RESOURCE: Final = 24
CAP_SYS_TIME: Final = 25
CAP_MKNOD: Final = 27
CAP_SYSLOG: Final = 34

_AT_FDCWD: Final = -100
_MAX_SMALL: Final = 1 << 16
_STATUS: Final = re.compile(rb"^(Umask|Uid|Gid|NSpid|CapEff):(.*)$", re.MULTILINE)
_MAX_LINKS: Final = 40  # MAXSYMLINKS
_RUN_DEPTH: Final = 2  # pid namespaces from the supervisor's to that of a run


@dataclass(frozen=True, slots=True)
class Caller:
    """Credentials of a calling thread, as its user namespace has them.

    ``nested`` tells that it lives in a pid namespace that a program of the run has made: its pids
    are its own then, and none is the guest's.
    """

    uid: int
    euid: int
    fsuid: int
    fsgid: int
    capabilities: int
    umask: int
    nested: bool

    def capable(self, capability: int) -> bool:
        """Whether it has a capability."""
        return bool(self.capabilities >> capability & 1)

    def require(self, *capabilities: int) -> None:
        """Fail the call without them.

        Raises:
            OSError: EPERM.
        """
        if not all(map(self.capable, capabilities)):
            raise OSError(errno.EPERM, "not permitted")


@functools.lru_cache(maxsize=1)  # several handlers of one call ask; its caller waits meanwhile
def look(listener: int, call: Call) -> Caller:
    """Read the credentials of a caller.

    Raises:
        OSError: It is gone.
    """
    status = read_small(call, "status")
    check(listener, call)
    words = {key: rest.split() for key, rest in _STATUS.findall(status)}
    uid, euid, _suid, fsuid = (int(word) for word in words[b"Uid"])
    return Caller(
        uid=uid,
        euid=euid,
        fsuid=fsuid,
        fsgid=int(words[b"Gid"][3]),
        capabilities=int(words[b"CapEff"][0], 16),
        umask=int(words[b"Umask"][0], 8),
        nested=len(words[b"NSpid"]) > _RUN_DEPTH,
    )


def read_small(call: Call, name: str) -> bytes:
    """Read a short file below /proc of a caller, without checking that it is the same still."""
    descriptor = os.open(f"/proc/{call.pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _MAX_SMALL)
    finally:
        os.close(descriptor)


def require(listener: int, call: Call, *capabilities: int) -> None:
    """Fail a call whose caller lacks a capability.

    Raises:
        OSError: EPERM.
    """
    look(listener, call).require(*capabilities)


def descriptor_path(listener: int, call: Call, descriptor: int) -> bytes:
    """What a descriptor of the caller is called.

    Raises:
        OSError: EBADF.
    """
    try:
        target = _link(call, f"fd/{descriptor}")
    except OSError as error:
        raise OSError(errno.EBADF, "no such descriptor") from error
    check(listener, call)
    return target


def working_folder(call: Call) -> bytes:
    """Where a caller is, as its mount namespace names it."""
    return _link(call, "cwd")


def root(call: Call) -> bytes:
    """What a caller takes for the root, as its mount namespace names it."""
    return _link(call, "root")


def _link(call: Call, name: str) -> bytes:
    return os.readlink(os.fsencode(f"/proc/{call.pid}/{name}"))  # noqa: PTH115 - bytes


@contextlib.contextmanager
def parent_folder(
    listener: int, call: Call, folder: int, path: bytes
) -> Iterator[tuple[int, bytes]]:
    """Open the folder that a path of the caller's leads to, and tell the name in it.

    Every link on the way is followed inside of the caller's root, as text: no name below /proc
    leads anywhere else, and nothing that another process renames meanwhile does.

    Args:
        listener: The listener.
        call: The call.
        folder: Descriptor of the caller's that a relative path starts from, or AT_FDCWD.
        path: The path; its last component is not followed.

    Raises:
        OSError: As path resolution fails, path_resolution(7).
    """
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if not path:
        raise OSError(errno.ENOENT, "empty path")
    if not parts or parts[-1] == b"..":
        raise OSError(errno.EEXIST, "a folder")
    with _Walk(listener, call, folder, absolute=path.startswith(b"/")) as walk:
        walk.go(parts[:-1])
        if path.endswith((b"/", b"/.")):  # names a folder, and there is none to be made
            os.stat(parts[-1], dir_fd=walk.here, follow_symlinks=False)
            raise OSError(errno.EEXIST, "there")
        yield walk.here, parts[-1]


class _Walk:
    """A way through folders, as a stack of descriptors."""

    def __init__(self, listener: int, call: Call, folder: int, *, absolute: bool) -> None:
        process = f"/proc/{call.pid}"
        start = f"{process}/cwd" if folder == _AT_FDCWD else f"{process}/fd/{folder}"
        self._root = os.open(f"{process}/root", os.O_PATH | os.O_CLOEXEC)
        self._stack: list[int] = []
        try:
            self._stack.append(
                os.dup(self._root) if absolute else os.open(start, os.O_PATH | os.O_CLOEXEC)
            )
            check(listener, call)
            if not stat.S_ISDIR(os.fstat(self.here).st_mode):
                raise OSError(errno.ENOTDIR, "not a folder")
        except OSError as error:
            self.close()
            if isinstance(error, FileNotFoundError) and folder != _AT_FDCWD:
                raise OSError(errno.EBADF, "no such descriptor") from error
            raise

    def __enter__(self) -> _Walk:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in (self._root, *self._stack):
            os.close(descriptor)
        self._stack.clear()

    @property
    def here(self) -> int:
        return self._stack[-1]

    def go(self, parts: list[bytes]) -> None:
        left, links = list(reversed(parts)), 0
        while left:
            part = left.pop()
            if part == b"..":
                self._up()
                continue
            found = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.here)
            mode = os.fstat(found).st_mode
            if stat.S_ISDIR(mode):
                self._stack.append(found)
                continue
            try:
                if not stat.S_ISLNK(mode):
                    raise OSError(errno.ENOTDIR, "not a folder")
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, "too many links")
                target = os.readlink(b"", dir_fd=found)
            finally:
                os.close(found)
            if target.startswith(b"/"):
                self._to_root()
            left += [one for one in reversed(target.split(b"/")) if one not in (b"", b".")]

    def _to_root(self) -> None:
        while self._stack:
            os.close(self._stack.pop())
        self._stack.append(os.dup(self._root))

    def _up(self) -> None:
        if len(self._stack) > 1:
            os.close(self._stack.pop())
        elif not _same(self.here, self._root):
            above = os.open("..", os.O_PATH | os.O_CLOEXEC, dir_fd=self.here)
            os.close(self._stack.pop())
            self._stack.append(above)


def _same(one: int, other: int) -> bool:
    """Whether two descriptors are of one folder on one mount."""
    return os.path.sameopenfile(one, other) and _mount(one) == _mount(other)


def _mount(descriptor: int) -> bytes:
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_bytes().splitlines()
    return next(line for line in lines if line.startswith(b"mnt_id:"))
