"""What is handed over of /sys and /dev: at once, or when it is asked for.

Nothing of the guest's memory is readable in the sandbox. So who looks at /sys there for the first
time calls, at a socket in the run's folder, a process on the host's side that reads it then.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import InternalError
from ouassister.shadow.served import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ouassister.shadow.served.snapshot import Node

SYS: Final = "sys"
SYS_FIRST: Final = "sys-first"  # what is asked for by everybody
DEV: Final = "dev"
_SOCKET: Final = "sys.socket"
_READY: Final = b"ready"
_ROOT: Final = snapshot.Node(0, b"", 0o40555, links=2, number=1)


@dataclass(frozen=True, slots=True)
class Tree:
    """What memory tells of /sys or /dev.

    Attributes:
        raw: The files, as `ouassister.shadow.served.snapshot.encode` makes it; None for nothing.
        notes: What is not there or not told, for the user.
    """

    raw: bytes | None = None
    notes: tuple[str, ...] = ()


def write(folder: Path, name: str, tree: Tree) -> None:
    """Write a tree, and its notes.

    Args:
        folder: Exists; private to the run.
        name: ``SYS``, ``SYS_FIRST`` or ``DEV``.
        tree: What is known.
    """
    if tree.raw is not None:
        snapshot.write(folder / name, tree.raw)
    _notes(folder, name).write_text(json.dumps(tree.notes))


def read_notes(folder: Path) -> tuple[str, ...]:
    """Read the notes of the trees that were written."""
    paths = [_notes(folder, name) for name in (DEV, SYS)]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    return tuple(str(note) for text in texts for note in json.loads(text))


@contextmanager
def listen(folder: Path) -> Iterator[socket.socket]:
    """Make the socket at which /sys is asked for."""
    with socket.socket(socket.AF_UNIX) as listener:
        with _short(folder) as place:
            listener.bind(f"{place}/{_SOCKET}")
        (folder / _SOCKET).chmod(0o666)  # for subordinate ids; a folder above is private
        listener.listen(1)
        yield listener


def answer(listener: socket.socket, folder: Path, make: Callable[[], Tree]) -> None:
    """Wait until /sys is asked for, and write it; for a process of its own."""
    caller, _ = listener.accept()
    with caller:
        write(folder, SYS, make())
        caller.sendall(_READY)


def ask(folder: Path) -> list[Node]:
    """Ask for /sys and wait for it.

    Raises:
        InternalError: Nobody answers, or with no tree.
        OSError: Likewise.
    """
    with socket.socket(socket.AF_UNIX) as caller:
        with _short(folder) as place:
            caller.connect(f"{place}/{_SOCKET}")
        if caller.recv(len(_READY), socket.MSG_WAITALL) != _READY:
            raise InternalError("nobody reads the guest's /sys")
    return snapshot.read(folder / SYS) if (folder / SYS).exists() else system_first(folder)[:1]


def system_first(folder: Path) -> list[Node]:
    """Return the root of /sys and what is known beside it: all or nothing of a folder.

    Where memory does not tell, it is the root of an empty one.

    Raises:
        InternalError: What was handed over is no tree.
    """
    path = folder / SYS_FIRST
    return snapshot.read(path) if path.exists() else [_ROOT]


def _notes(folder: Path, name: str) -> Path:
    return folder / f"{name}-notes.json"


@contextmanager
def _short(folder: Path) -> Iterator[str]:
    """Give a path to a folder that is short enough for a socket's (sun_path, 108 bytes)."""
    descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
