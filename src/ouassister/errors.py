"""The whole error tree.

::

    OUassisterError
    ├── InternalError               1   our own bug
    ├── UsageError                  2   the call's words are off
    │   └── HostNotReadyError       2   a host tool or kernel feature is missing
    ├── NothingPendingError        10   there is nothing to apply
    ├── StateError                 20   the saved VM is not in a state we can update
    │   ├── RunningVMError         20   the VM runs, or nobody can tell
    │   ├── NotSuspendedError      20   there is no saved memory
    │   ├── TruncatedStateError    20   the save file ends early
    │   ├── PageAbsentError        20   a byte of memory was never saved
    │   ├── CorruptGuestError      20   guest memory contradicts itself
    │   ├── QemuLostError          20   QEMU ended while it was needed
    │   ├── QemuRefusedError       20   QEMU answered a command with an error
    │   ├── RollbackRefusedError   20   the last update cannot be taken back
    │   └── ChannelError           20   no program can be run in the guest, or its end is unknown
    │       └── AgentError         20   the guest agent failed or speaks nonsense
    │           └── AgentEndedError  20   … or ended before it answered
    ├── StaleError                 21   made for another suspension of this VM
    │   ├── ConflictError          21   paths of the guest changed since it was suspended
    │   └── TamperedError          21   a stored plan or change set is not what was made
    ├── LockedError                22   another run or an updater holds the lock
    ├── UnsupportedError           23   a guest or format that is in no table
    │   ├── UnsupportedStateError  23   … of the save file: field, offset, value
    │   └── UnsupportedGuestError  23   … of the guest
    ├── RepositoryError            30   network or repository
    │   └── PackageNotFoundError   30   no repository has the package
    ├── UpdaterError               31   the guest's updater failed
    │   ├── NoSolutionError        31   … finds no set of packages that fits
    │   ├── StagingNeededError     31   a package cannot be emulated, and may not be staged
    │   └── WorkDiskFullError      31   no room for the work folder
    ├── DeadlineError              32   a time limit ran out
    ├── ApplyError                 40   reflection failed and was undone
    ├── GateClosedError            41   reflection failed, the gate stays closed
    ├── GateOpenedError            41   … and was opened all the same, by policy
    └── InterruptedRunError       143   ended by SIGINT or SIGTERM

A class exists when a caller acts differently. ``code`` is stable; scripts may match it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Impact = Literal["untouched", "partly applied", "unknown"]


class OUassisterError(Exception):
    """Base of all errors that reach a user.

    Args:
        message: One sentence: the cause, with the value that shows it.
        hint: One sentence: the next step. The class has a default.
        context: What was being done, outermost first.
    """

    code: ClassVar[str]
    exit_status: ClassVar[int]
    default_hint: ClassVar[str]
    impact: ClassVar[Impact] = "untouched"

    def __init__(self, message: str, *, hint: str | None = None, context: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint
        self.context = context


def from_code(code: str, message: str, hint: str | None = None) -> OUassisterError:
    """Make the error that ``code`` stands for, out of what another process said of it."""
    for kind in globals().values():
        if (
            isinstance(kind, type)
            and issubclass(kind, OUassisterError)
            and vars(kind).get("code") == code
            and kind.__init__ is OUassisterError.__init__
        ):
            return kind(message, hint=hint)
    return InternalError(f"{message} [{code}]")


class InternalError(OUassisterError):
    """A defect of OUassister itself."""

    code = "internal"
    exit_status = 1
    default_hint = "this is a defect of ouassister: please report it with the lines above"
    impact: ClassVar[Impact] = "unknown"


class UsageError(OUassisterError):
    """The call's words are off."""

    code = "usage"
    exit_status = 2
    default_hint = "see 'ouassister --help'"


class HostNotReadyError(UsageError):
    """The host lacks a tool or a kernel feature."""

    code = "host-not-ready"
    default_hint = "'ouassister doctor' names what is missing and how to get it"


class NothingPendingError(OUassisterError):
    """There is no change set to apply."""

    code = "nothing-pending"
    exit_status = 10
    default_hint = "run 'ouassister update' first, or resume the VM as usual"


class StateError(OUassisterError):
    """The saved VM is not in a state that can be updated."""

    code = "state"
    exit_status = 20
    default_hint = "resume the VM and save it again"


class RunningVMError(StateError):
    """The VM runs; its disk belongs to it."""

    code = "state-running"
    default_hint = "suspend the VM to a save file first"


class NotSuspendedError(StateError):
    """There is no saved memory."""

    code = "state-not-suspended"
    default_hint = "suspend the VM to a save file first ('ouassister suspend', or QMP 'migrate')"


class TruncatedStateError(StateError):
    """The save file ends before its own end marker."""

    code = "state-truncated"
    default_hint = "restore the save file from a backup; a VM started from this one would cold-boot"


class PageAbsentError(StateError, LookupError):
    """A byte of guest memory was never saved.

    Attributes:
        address: The first such physical address.
    """

    code = "state-page-absent"

    def __init__(self, address: int, **kwargs: str) -> None:
        super().__init__(f"page absent from the save: {address:#018x}", **kwargs)
        self.address = address


class CorruptGuestError(StateError):
    """Guest memory contradicts itself, or exceeds a bound."""

    code = "state-corrupt-guest"
    default_hint = "resume the VM and look at its kernel log; then save it again"


class QemuLostError(StateError):
    """QEMU ended, or hung up, while it was needed."""

    code = "state-qemu-lost"
    default_hint = "QEMU's log beside the vm.toml tells why it ended"


class QemuRefusedError(StateError):
    """QEMU answered a command with an error.

    Attributes:
        error_class: QMP's class of the error, such as ``GenericError`` or ``DeviceNotFound``.
    """

    code = "state-qemu-refused"
    default_hint = "the reason is QEMU's own; its log lies beside the vm.toml"

    def __init__(self, command: str, error_class: str, reason: str) -> None:
        super().__init__(f"QEMU refused {command}: {reason}")
        self.error_class = error_class


class RollbackRefusedError(StateError):
    """The last update cannot be taken back, or not without loss; nothing was done.

    Attributes:
        paths: Those that are not as the update left them, each with what is different.
    """

    code = "rollback-refused"
    default_hint = "nothing of the guest was changed; the message names what is in the way"

    def __init__(
        self, message: str, paths: tuple[tuple[str, str], ...] = (), **kwargs: str
    ) -> None:
        super().__init__(message, **kwargs)
        self.paths = paths


class ChannelError(StateError):
    """No program can be run in the guest, or nobody knows what became of one."""

    code = "state-channel"
    default_hint = "check that sshd runs in the guest and takes the key for root"


class AgentError(ChannelError):
    """The guest agent answered with an error, or not in its protocol."""

    code = "state-agent"
    default_hint = "check that qemu-guest-agent runs in the guest and allows guest-exec"


class AgentEndedError(AgentError):
    """The guest agent ended before it answered; whether it did what it was asked is not known."""

    code = "state-agent-ended"
    default_hint = "the same command again, once qemu-guest-agent runs in the guest"


class StaleError(OUassisterError):
    """Made for another suspension of this VM."""

    code = "stale"
    exit_status = 21
    default_hint = "run 'ouassister update' again: it plans afresh for the VM as it sleeps now"


class ConflictError(StaleError):
    """Paths of the guest are not as they were when it was suspended; nothing was changed.

    Attributes:
        paths: Those that the guest's applier told of, each with what is different.
    """

    code = "conflict"
    default_hint = (
        "the VM runs with its links down: suspend it and update it anew; with --on-conflict stage,"
        " 'update' and 'resume' have the guest's own dpkg install what conflicts"
    )

    def __init__(
        self, message: str, paths: tuple[tuple[str, str], ...] = (), **kwargs: str
    ) -> None:
        super().__init__(message, **kwargs)
        self.paths = paths


class TamperedError(StaleError):
    """A stored plan or change set is not the one that was made."""

    code = "tampered"
    default_hint = "discard it ('ouassister discard') and update again; find out who wrote there"


class LockedError(OUassisterError):
    """Another run, or an updater of the guest, holds a lock."""

    code = "locked"
    exit_status = 22
    default_hint = "wait for it to end and try again"


class UnsupportedError(OUassisterError):
    """A guest or a format that no table lists as supported."""

    code = "unsupported"
    exit_status = 23
    default_hint = "'ouassister support' lists what is supported"


class UnsupportedStateError(UnsupportedError):
    """A save file with something unseen in it.

    Args:
        field: What was being read, by the format's own name.
        offset: Its offset in the file, in bytes.
        value: What stood there.
        reason: Why it is refused; one clause.
    """

    code = "unsupported-state"

    def __init__(
        self, field: str, offset: int, value: object, reason: str = "not seen before", **kwargs: str
    ) -> None:
        super().__init__(f"{field} at offset {offset:#x} is {value!r}: {reason}", **kwargs)
        self.field = field
        self.offset = offset
        self.value = value


class UnsupportedGuestError(UnsupportedError):
    """A guest whose kernel, file system or package manager is not supported."""

    code = "unsupported-guest"


class RepositoryError(OUassisterError):
    """The network or a repository did not deliver."""

    code = "repository"
    exit_status = 30
    default_hint = "check the mirrors named and run the same command again; downloads are kept"


class PackageNotFoundError(RepositoryError):
    """No repository of the guest has the package that was asked for."""

    code = "package-not-found"
    default_hint = "check the name; the guest's own sources.list decides what there is"


class UpdaterError(OUassisterError):
    """The guest's own updater failed in the shadow."""

    code = "updater-failed"
    exit_status = 31
    default_hint = "the updater's output is in the run's log; nothing of the VM was changed"


class NoSolutionError(UpdaterError):
    """The guest's updater finds no solution; ``broken`` are packages that lack what they need."""

    code = "no-solution"
    default_hint = "the guest's own sources.list, holds and pins decide what can be installed"

    def __init__(self, message: str, broken: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.broken = broken


class StagingNeededError(UpdaterError):
    """A package cannot be emulated, and the user does not want it to be staged."""

    code = "needs-staging"
    default_hint = "without --no-staging, the guest's own dpkg installs it behind the closed gate"


class WorkDiskFullError(UpdaterError):
    """The host has no room for the work folder."""

    code = "work-disk-full"
    default_hint = "free space there, or point OUASSISTER_HOME to a larger disk"


class DeadlineError(OUassisterError):
    """A time limit ran out."""

    code = "deadline"
    exit_status = 32
    default_hint = "raise the limit, or look at what hangs in the run's log"


class ApplyError(OUassisterError):
    """Reflection failed; everything it had done was undone."""

    code = "apply-undone"
    exit_status = 40
    default_hint = "the guest is as it was suspended; the report names the cause"


class GateClosedError(OUassisterError):
    """Reflection failed and needs a person; the network link stays down."""

    code = "gate-closed"
    exit_status = 41
    default_hint = "look at the guest's console; 'ouassister resume' takes up where it stopped"
    impact: ClassVar[Impact] = "unknown"


class GateOpenedError(OUassisterError):
    """Reflection failed and needs a person; the network link is up, as the user had asked for.

    By ``--on-failure``, or by ``--gate exposed``: what failed came after the gate then.
    """

    code = "gate-opened"
    exit_status = 41
    default_hint = "'ouassister resume' closes the links and takes up where it stopped"
    impact: ClassVar[Impact] = "unknown"


class InterruptedRunError(OUassisterError):
    """Ended by SIGINT or SIGTERM, and cleaned up."""

    code = "interrupted"
    exit_status = 143
    default_hint = "run the same command again; finished downloads are kept"
