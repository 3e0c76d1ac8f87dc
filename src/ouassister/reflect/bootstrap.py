"""How the applier gets into the guest and is started; and how recorded actions are carried out.

The short way needs one program of the guest: the agent writes the applier to a file and starts
chmod(1), which makes it executable. Where the agent may not write files, the guest's shell takes
the applier from the medium, which costs it some more programs. Measured under TCG, each program
started in the guest costs 0.2 s, most of it for translating its code.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ouassister.changeset.medium import MediumInfo
    from ouassister.model import Action

# /run is mounted noexec. The applier removes its file as soon as it runs.
DELIVERED: Final = "/var/lib/.ouassister-applier"
MAKE_EXECUTABLE: Final = ("/bin/chmod", "700", DELIVERED)
# $1 serial of the medium's disk, $2 blocks of the applier, the rest its arguments. A disk is found
# by the serial that its driver shows in sysfs: udev's links come later.
_FROM_MEDIUM: Final = r"""
serial=$1 blocks=$2; shift 2
tries=0
while :; do
    for file in /sys/block/*/serial; do
        found=
        read -r found <"$file" || :
        [ "$found" = "$serial" ] || continue
        device=${file%/serial}; device=/dev/${device##*/}
        [ -b "$device" ] && break 2
    done
    tries=$((tries + 1))
    [ $tries -lt 1500 ] || { echo "the change set's disk did not appear" >&2; exit 69; }
    sleep 0.02
done
umask 077
applier=/var/lib/.ouassister-applier
dd if="$device" of="$applier" bs=4096 skip=1 count="$blocks" 2>/dev/null || exit 74
chmod 700 "$applier" || exit 74
exec "$applier" "$@"
"""


def applier_arguments(serial: str, medium: MediumInfo, now_ns: int) -> list[str]:
    """The applier's own arguments; it waits for the disk with that serial."""
    seconds, nanoseconds = divmod(now_ns, 1_000_000_000)
    return [
        "apply",
        f"serial:{serial}",
        "--medium-sha256",
        medium.header_sha256,
        "--set-time",
        f"{seconds}.{nanoseconds:09d}",
        "--remove",
        DELIVERED,
    ]


def from_medium_command(serial: str, medium: MediumInfo, arguments: Sequence[str]) -> list[str]:
    """Arguments for the guest agent: wait for the disk, take the applier from it, run it."""
    words = ["/bin/sh", "-c", _FROM_MEDIUM, "ouassister", serial, str(medium.applier_blocks)]
    return [*words, *arguments]


def actions_command(actions: Sequence[Action]) -> list[str]:
    """Arguments for the guest agent: do each action, print its index and exit status."""
    lines = [
        f"{shlex.join(action.argv)} >/dev/null 2>&1 </dev/null; echo {index} $?"
        for index, action in enumerate(actions)
    ]
    return ["/bin/sh", "-c", "\n".join(lines)]


def failed_actions(actions: Sequence[Action], output: bytes) -> tuple[str, ...]:
    """Which actions did not end with status 0; one without a status counts as failed."""
    statuses: dict[str, str] = {}
    for line in output.decode("ascii", "replace").splitlines():
        index, _, status = line.partition(" ")
        if index.isdecimal() and status.isdecimal():
            statuses[index] = status
    return tuple(
        f"{' '.join(action.argv)}: status {statuses.get(str(index), 'unknown')}"
        for index, action in enumerate(actions)
        if statuses.get(str(index)) != "0"
    )
