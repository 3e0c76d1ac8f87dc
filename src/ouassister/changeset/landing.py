"""Where a layer lands: in the store already, and nothing of the store until it is kept.

The layer is written by the root of a user namespace, whom the store must not trust. It comes
through a pipe, is hashed on this side, and no byte of it is on the disk twice.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from ouassister.errors import WorkDiskFullError

if TYPE_CHECKING:
    from types import TracebackType

PARTIAL: Final = ".partial-"
LAYER: Final = "layer.tar"

_CHUNK: Final = 1 << 20


class Landing:
    """A place in the store for one layer at a time; at the end of the block it is gone.

    The caller holds the VM's lock: what a killed run left in the folder is removed.

    Args:
        folder: Of all change sets of a VM; made when it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._place: Path | None = None
        self.sha256 = ""
        self.size = 0

    def __enter__(self) -> Self:
        """Nothing is made before something lands."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove what was not taken away."""
        if self._place is not None:
            discard(self._place)
            self._place = None

    @property
    def place(self) -> Path:
        """The folder with the layer in it, on the store's file system."""
        assert self._place is not None  # noqa: S101 - something has landed
        return self._place

    def receive(self, source: int, ended: int = -1) -> None:
        """Read a layer to its end; an earlier one is forgotten.

        Args:
            source: A pipe or a file; of a pipe, what comes before its first writer is waited for.
            ended: A descriptor that becomes readable when nothing more comes, or -1.

        Raises:
            WorkDiskFullError: No room; nothing is left of it.
        """
        try:
            self._begin()
            with (self.place / LAYER).open("xb", buffering=0) as file:
                os.fchmod(file.fileno(), 0o400)
                self._copy(source, ended, file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise WorkDiskFullError(f"no room for a change set in {self._folder}") from error
            raise

    def sync(self) -> None:
        """Make what landed durable."""
        file = os.open(self.place / LAYER, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def take(self, target: Path) -> None:
        """Give the folder its name in the store; it is no landing any more."""
        self.place.rename(target)
        self._place = None

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stale in self._folder.glob(f"{PARTIAL}*"):
            discard(stale)
        self._place = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self._folder))

    def _copy(self, source: int, ended: int, target: int) -> None:
        digest = hashlib.sha256()
        size = 0
        buffer = memoryview(bytearray(_CHUNK))
        poll = select.poll()
        poll.register(source, select.POLLIN)
        if ended >= 0:
            poll.register(ended, select.POLLIN)
        while True:
            if not any(descriptor == source for descriptor, _events in poll.poll()):
                break
            count = os.readv(source, [buffer])
            if not count:
                break
            digest.update(buffer[:count])
            _write(target, buffer[:count])
            size += count
        self.sha256, self.size = digest.hexdigest(), size


def discard(place: Path) -> None:
    """Remove a change set's folder, if it is there."""
    if place.is_dir() and not place.is_symlink():
        place.chmod(0o700)
        shutil.rmtree(place)


def _write(target: int, data: memoryview) -> None:
    while data:
        data = data[os.write(target, data) :]
