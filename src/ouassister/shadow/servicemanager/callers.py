"""Who calls: the package whose script a process belongs to.

dpkg tells each script the name of its package in the environment (dpkg(1), "Internal
environment"); what the script starts inherits it. A program that cleans its environment is found by
its parents. All of it is what a program of the guest says of itself: it names, it decides nothing.

Source: proc(5); proc_pid_environ(5); proc_pid_stat(5).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

_MAX_PARENTS: Final = 32
_MAX_FILE: Final = 1 << 17
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]{0,127}")  # Debian Policy 5.6.1
_SCRIPT: Final = re.compile(r"[a-z]{1,16}")
_READ: Final = os.O_RDONLY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Caller:
    """A package and which of its scripts; empty when the call came from none."""

    package: str = ""
    script: str = ""


class Callers:
    """Looks processes up.

    Args:
        procfs: Descriptor of a /proc that shows the processes of the shadow.
    """

    def __init__(self, procfs: int) -> None:
        self._procfs = procfs

    def of(self, pid: int) -> Caller:
        """The package that a process works for."""
        for _ in range(_MAX_PARENTS):
            if pid <= 1:
                break
            caller = from_environment(self._read(f"{pid}/environ"))
            if caller.package:
                return caller
            pid = _parent(self._read(f"{pid}/stat"))
        return Caller()

    def _read(self, path: str) -> bytes:
        try:
            descriptor = os.open(path, _READ, dir_fd=self._procfs)
        except OSError:
            return b""  # it has ended, or is not ours to look at
        try:
            return os.read(descriptor, _MAX_FILE)
        except OSError:
            return b""
        finally:
            os.close(descriptor)


def from_environment(environ: bytes) -> Caller:
    """What an environment, as /proc/PID/environ shows it, says of package and script."""
    found = dict(part.partition(b"=")[::2] for part in environ.split(b"\0"))
    package = found.get(b"DPKG_MAINTSCRIPT_PACKAGE", b"").decode("ascii", "replace")
    script = found.get(b"DPKG_MAINTSCRIPT_NAME", b"").decode("ascii", "replace")
    if not _PACKAGE.fullmatch(package):
        return Caller()
    return Caller(package, script if _SCRIPT.fullmatch(script) else "")


def _parent(stat: bytes) -> int:
    """The fourth field; the second, a name in brackets, may contain anything."""
    fields = stat.rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else 0
