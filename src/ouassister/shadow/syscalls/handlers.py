"""Who answers a system call that the filter hands over, for each row of the table."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from ouassister.errors import InternalError
from ouassister.shadow.syscalls import (
    caller,
    daemons,
    files,
    scheduling,
    signals,
    sockets,
    statfs,
    system,
    uts,
)
from ouassister.shadow.syscalls.context import Answerer, Context, NotTheGuestsError
from ouassister.shadow.syscalls.notify import Call, Handler, Pass, Result
from ouassister.shadow.syscalls.records import DENIED, UNKNOWN, Journal, Recorder
from ouassister.shadow.syscalls.table import NOTIFIED, TABLE, Answer, GuestPid, Row

if TYPE_CHECKING:
    from ouassister.shadow.syscalls.facts import GuestFacts
    from ouassister.shadow.syscalls.stopped import Stopped

_INIT: Final = 1  # the guest's, and the shadow's, which has no filter


class Handlers:
    """The handlers of one shadow.

    Args:
        context: What they share.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._native = {row.x86_64: row for row in TABLE}
        self._compat = {row.i386: row for row in TABLE}
        for row in TABLE:
            if row.answer in NOTIFIED - {Answer.DENIED} and row.name not in _ANSWERERS:
                raise InternalError(f"nobody answers the system call {row.name}")

    def find(self, call: Call) -> Handler:
        """See `notify.Table`."""
        row = (self._compat if call.compat else self._native).get(call.number)
        if row is None:
            return self._unknown
        answerer = _ANSWERERS.get(row.name)
        if answerer is None:
            return lambda listener, call: self._deny(row, listener, call)
        if any(isinstance(one, GuestPid) for one in row.when):
            return lambda listener, call: self._about_pid(answerer, listener, call)
        return lambda listener, call: answerer(self.context, listener, call)

    def close(self) -> None:
        """End what was started for them."""
        self.context.stand_ins.close()

    def _about_pid(self, answerer: Answerer, listener: int, call: Call) -> Result:
        if caller.look(listener, call).nested:
            return Pass.CONTINUE  # numbers of a pid namespace of its own
        try:
            return answerer(self.context, listener, call)
        except NotTheGuestsError:
            return Pass.CONTINUE

    def _deny(self, row: Row, listener: int, call: Call) -> Result:
        args: list[int | bytes | str] = [call.unsigned(one.arg) for one in row.when]
        if any(isinstance(one, GuestPid) for one in row.when):
            known = {_INIT, *self.context.processes}
            if known.isdisjoint(args) or caller.look(listener, call).nested:
                return Pass.CONTINUE
        self.context.journal.note(call, row.name, DENIED, args)
        raise OSError(row.errno, row.note)

    def _unknown(self, _listener: int, call: Call) -> Result:
        abi = "i386" if call.compat else "x86_64"
        self.context.journal.note(call, f"{abi} {call.number}", UNKNOWN, [])
        raise OSError(errno.ENOSYS, "in no table")


def handlers(facts: GuestFacts, recorder: Recorder, stopped: Stopped | None = None) -> Handlers:
    """Make the handlers of one shadow.

    Args:
        facts: The guest.
        recorder: Takes what is written down.
        stopped: Knows which daemons the scripts have stopped; none, without it.
    """
    return Handlers(Context(facts, Journal(recorder), stopped))


_ANSWERERS: Final[dict[str, Answerer]] = {
    **uts.ANSWERERS,
    **system.ANSWERERS,
    **signals.ANSWERERS,
    **scheduling.ANSWERERS,
    **files.ANSWERERS,
    **sockets.ANSWERERS,
    **daemons.ANSWERERS,
    **statfs.ANSWERERS,
}
