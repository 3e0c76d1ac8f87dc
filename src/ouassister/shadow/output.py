"""What a program prints, kept in a file up to a limit.

The program has a pipe and not the file: it could write without end, or cut it off. What is over
the limit is read and dropped, so that who prints too much goes on, and fails by its own limits.
"""

from __future__ import annotations

import os
from typing import Final

_CHUNK: Final = 1 << 16
CUT: Final = b"\n[ouassister: more was printed, and is not kept]\n"


class Output:
    """One program's standard output and error.

    Args:
        path: The file; what an earlier program printed there is gone.
        limit: Bytes that are kept.

    Attributes:
        reader: Readable when there is something to `take`.
        writer: For the program.
    """

    def __init__(self, path: str, limit: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o644)
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self._left = limit
        self._writer_open = True

    def started(self) -> None:
        """The program has its end: ours is closed."""
        os.close(self.writer)
        self._writer_open = False

    def take(self) -> bool:
        """Keep what there is now; False when nobody can write any more.

        Raises:
            OSError: The disk is full.
        """
        chunk = self._read()
        return chunk is None or self._keep(chunk)

    def finish(self) -> None:
        """Keep what a program that has ended left in the pipe, and close everything.

        Raises:
            OSError: The disk is full.
        """
        try:
            while chunk := self._read():
                self._keep(chunk)
        finally:
            if self._writer_open:
                self.started()
            os.close(self.reader)
            os.close(self._file)

    def _read(self) -> bytes | None:
        """What is in the pipe; None when nothing is, and nothing once it has no writer."""
        try:
            return os.read(self.reader, _CHUNK)
        except BlockingIOError:
            return None

    def _keep(self, chunk: bytes) -> bool:
        if self._left > 0:
            kept = chunk[: self._left]
            self._left -= len(kept)
            _write(self._file, kept if self._left else kept + CUT)
        return bool(chunk)


def _write(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]
