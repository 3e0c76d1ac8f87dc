"""How programs are run in a guest, whichever way the words travel.

The guest is a hostile peer: what it answers is bounded, and every wait has a deadline. A channel
that is lost in the middle of a program says so by an error; whoever needs to know what became of
the program looks a second time (reflect/second_look.py), for an update may restart what the channel
talks to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of each output stream, as qemu-ga keeps it (GUEST_EXEC_MAX_OUTPUT, qga/commands.c).
OUTPUT_LIMIT: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a program in the guest left behind; ``exit_status`` is -SIGNAL when it was killed."""

    exit_status: int
    stdout: bytes
    stderr: bytes
    truncated: bool


class Channel(ABC):
    """One way into a guest; one program at a time, as root."""

    name: ClassVar[str]

    @abstractmethod
    def ping(self, *, timeout_s: float = 5.0) -> None:
        """Return when the guest answers.

        Raises:
            ChannelError: It cannot be asked.
            DeadlineError: No answer in ``timeout_s``.
        """

    @abstractmethod
    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float,
        most_s: float = 0.1,
    ) -> ExecResult:
        """Run a program in the guest to its end.

        Args:
            argv: Its words; none has more than 128 KiB (``MAX_ARG_STRLEN``).
            stdin: What its standard input has.
            timeout_s: From now to its end.
            most_s: Where it has to be looked for, how seldom at most.

        Raises:
            ChannelError: It did not start, or nobody knows what became of it.
            DeadlineError: It still runs after ``timeout_s``; it is not killed.
        """

    @abstractmethod
    def write_file(self, path: str, content: bytes, *, timeout_s: float = 30.0) -> None:
        """Write a file in the guest that nobody but root can read or write.

        Raises:
            ChannelError: It is not there as a whole.
        """

    @abstractmethod
    def close(self) -> None:
        """Hang up. Closing twice is fine."""
