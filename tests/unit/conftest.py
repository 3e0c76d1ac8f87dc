"""Unit tests need nothing: no program, no network and no privilege; each is refused here.

Python's audit hooks (PEP 578) see what every module does and cannot be got round by an import.
Privileges go by clearing the effective capabilities, so that root is a user like any other.
"""

from __future__ import annotations

import ctypes
import socket
import sys
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROGRAMS: Final = frozenset(
    (
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "pty.spawn",
        "subprocess.Popen",
    )
)
_LOOKUPS: Final = frozenset(
    ("socket.getaddrinfo", "socket.gethostbyaddr", "socket.gethostbyname", "socket.getnameinfo")
)
_CAPABILITY_VERSION_3: Final = 0x20080522  # include/uapi/linux/capability.h

_libc = ctypes.CDLL(None, use_errno=True)
_active = False


class BlockedError(BaseException):
    """A unit test reached for what it must not need; no handler of ours may swallow it."""


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if not _active:
        return
    if event in _PROGRAMS:
        raise BlockedError(f"a unit test starts a program: {event}{arguments}")
    if event in _LOOKUPS:
        raise BlockedError(f"a unit test looks up a name: {event}{arguments}")
    if event == "socket.__new__" and arguments[1] not in (-1, socket.AF_UNIX):
        raise BlockedError(f"a unit test opens a socket of {arguments[1]!r}")


sys.addaudithook(_refuse)


def _capabilities() -> tuple[ctypes.Array[ctypes.c_uint32], ctypes.Array[ctypes.c_uint32]]:
    """The calling thread's header and sets: effective, permitted, inheritable, twice 32 bits."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    if _libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    return header, sets


def _set_effective(low: int, high: int) -> None:
    header, sets = _capabilities()
    sets[0], sets[3] = low, high
    if _libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


@pytest.fixture(autouse=True)
def needs_nothing() -> Iterator[None]:
    """See the module."""
    global _active
    _header, before = _capabilities()
    _set_effective(0, 0)
    _active = True
    try:
        yield
    finally:
        _active = False
        _set_effective(before[0], before[3])


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the state of whoever runs it; one that needs a folder sets it."""
    monkeypatch.setenv("OUASSISTER_HOME", "/proc/nowhere")  # nobody can make a folder there
    monkeypatch.delenv("OUASSISTER_DEBUG", raising=False)
