"""What recorders write into their pipe: programs that act on the running system, by D-Bus or not.

A line is a package, its script, the program's name and its words, separated by tabs; a line that
fits PIPE_BUF arrives in one piece (pipe(7)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.shadow.events import Event, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

# Each is a name of `recorder/recorder.sh`, which decides what of it is a question and is answered.
NAMES: Final = frozenset(
    ("grub-install", "grub-mkconfig", "modprobe", "sysctl", "systemd-tmpfiles", "telinit",
     "udevadm", "update-grub", "update-grub2")
)  # fmt: skip
_MAX_LINE: Final = 4096
_CALLER: Final = 2  # fields before the words


class Recorders:
    """Cuts the stream into lines and makes events of them.

    Args:
        record: Takes each event.
    """

    def __init__(self, record: Callable[[Event], None]) -> None:
        self._record = record
        self._pending = b""

    def feed(self, data: bytes) -> None:
        """Take what came out of the pipe."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._pending) > _MAX_LINE:
            self._line(self._pending[:_MAX_LINE])
            self._pending = b""

    def _line(self, line: bytes) -> None:
        text = line.decode("ascii", "backslashreplace")
        fields = text.split("\t")
        if len(line) < _MAX_LINE and len(fields) > _CALLER and fields[_CALLER] in NAMES:
            package, script, *words = fields
            self._record(Event(Outcome.DEFERRED, tuple(words), package[:128], script[:16]))
        else:
            why = "not what a recorder writes"
            self._record(Event(Outcome.REFUSED, (text[:80],), detail=why))
