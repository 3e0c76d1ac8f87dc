"""What ends a program, or a script of a package, that would not end by itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ouassister.shadow.scripts import LOOK_S, UncontainedError

if TYPE_CHECKING:
    from ouassister.shadow.room import Room
    from ouassister.shadow.scripts import ScriptWatch

_AGAIN_S: Final = 1.0  # a program that was killed is looked at again, until it is gone
TIMED_OUT, FULL, UNCONTAINED = "timed out", "full", "uncontained"


class Watch:
    """The clock of one program.

    Args:
        timeout_s: Seconds that it has.
        scripts: Looks at the scripts of packages among what it starts.
        room: Looks at the disk.

    Attributes:
        over: Why it has to be killed; empty while it may go on.
        where: The folder whose disk is full, then.
    """

    def __init__(self, timeout_s: float, scripts: ScriptWatch, room: Room) -> None:
        now = time.monotonic()
        self._deadline = now + timeout_s
        self._scripts = scripts
        self._room = room
        self._next_script, self._next_room = now + LOOK_S, now
        self.over = ""
        self.where = ""

    def wait_s(self) -> float:
        """Seconds until the next `look` is due."""
        if self.over:
            return _AGAIN_S
        due = min(self._deadline, self._next_script, self._next_room)
        return max(0.0, due - time.monotonic())

    def look(self, first: int) -> bool:
        """Look at what is due; whether the program has to be killed.

        Args:
            first: The first process of its pid namespace.
        """
        now = time.monotonic()
        if not self.over and now >= self._next_room:
            self._next_room = now + self._room.next_look_s()
            self.check_room()
        if not self.over and now >= self._next_script:
            try:
                self._scripts.look(first)
            except UncontainedError:
                self.over = UNCONTAINED
            self._next_script = time.monotonic() + LOOK_S
        if not self.over and now >= self._deadline:
            self.over = TIMED_OUT
        return bool(self.over)

    def check_room(self, *, refused: bool = False) -> None:
        """Look at the disk now.

        Args:
            refused: A write of ours found no room.
        """
        where = self._room.full() or (self._room.left()[1] if refused else None)
        if where is not None and not self.over:
            self.over, self.where = FULL, where

    def answer(self, status: int) -> dict[str, object]:
        """What the host's side is told of a program that has ended."""
        return {
            "status": 124 if self.over else status,
            "over": self.over,
            "where": self.where,
            "expired": [
                {"package": one.package, "script": one.script, "limit_s": one.limit_s}
                for one in self._scripts.expired
            ],
        }
