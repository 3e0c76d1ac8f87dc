"""Which daemons of the sleeping guest the scripts have stopped, in name: nobody listens for them.

The stand-in of the service manager writes down each call before it answers. So whoever was told
that a unit is stopped, and then calls its daemon, finds it written here. In the running guest the
daemon would have ended by then, and would answer nobody either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.shadow.events import END, MAX_RECORDS, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.shadow.servicemanager.state import Daemon

_VERBS: Final = {
    "stop": True,
    "start": False,
    "restart": False,
    "reload-or-restart": False,
}


class Stopped:
    """The daemons of one shadow.

    Args:
        daemons: Where they listen, as memory tells.
        records: Of the stand-in; there need not be any.
    """

    def __init__(self, daemons: Iterable[Daemon], records: str) -> None:
        self._units = {one.address.encode("utf-8", "surrogateescape"): one.units for one in daemons}
        self._records = Path(records)
        self._read = 0
        self._rest = b""
        self._stopped: set[str] = set()

    def nobody_listens(self, address: bytes) -> bool:
        """Tell whether all units that listen at an address have been stopped since, in name.

        Args:
            address: As in `GuestFacts.listeners`.
        """
        units = self._units.get(address)
        if not units:
            return False  # nobody knows whose it is
        self._follow()
        return self._stopped.issuperset(units)

    def _follow(self) -> None:
        """Read what was written since the last time."""
        try:
            with self._records.open("rb") as file:
                file.seek(self._read)
                new = file.read(MAX_RECORDS)
        except FileNotFoundError:
            return
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            if line + b"\n" == END:  # the next program's stand-in knows nothing of this one's
                self._stopped.clear()
            else:
                self._take(json.loads(line))

    def _take(self, event: dict[str, object]) -> None:
        words = event["words"]
        if event["outcome"] != Outcome.DEFERRED or not isinstance(words, list):
            return
        _program, *plain = (word for word in words if not word.startswith("-"))
        if plain and (stops := _VERBS.get(plain[0])) is not None:
            change = self._stopped.update if stops else self._stopped.difference_update
            change(plain[1:])
