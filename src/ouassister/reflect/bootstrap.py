"""How the applier gets into the guest and is started; and how recorded actions are carried out.

One command does it: the shell writes a stub of 2 kB, which the command itself
carries, and becomes it; the stub takes the applier from the medium (guest/stub.c). Each program
that a guest starts under TCG right after it was restored costs 0.2 s or more, most of it for
translating its code, so the short way is the one with the fewest programs. From the first
instruction to the applier's start, about, one processor: with dd, chmod and a loop for the disk in
the shell 2.8 s; the applier written by the agent, then install(1) 1.5 s; the stub written by the
agent, then chmod(1) 1.3 s; this 1.2 s.
"""

from __future__ import annotations

import secrets
import shlex
from typing import TYPE_CHECKING, Final

from ouassister.model import WRITE_FILE
from ouassister.restart.actions import side_by_side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ouassister.changeset.medium import MediumInfo
    from ouassister.model import Action

# /run is mounted noexec. The stub removes its file as soon as it runs.
_FILE: Final = "/var/lib/.ouassister-stub"
# What the shell ends with when it could not write the stub, or take the applier: the guest is as it
# was. EX_TEMPFAIL of sysexits.h; neither the stub nor the applier ends with it.
NO_STUB: Final = 75
# Of a medium that the channel brought; followed by its serial.
_CARRIED: Final = "/var/lib/.ouassister-medium-"
_CARRIED_APPLIER: Final = "/var/lib/.ouassister-applier"
_TAKE: Final = f"""umask 077
dd if="$1" of="$3" bs=4096 skip=1 count="$2" 2>/dev/null && chmod 700 "$3" || exit {NO_STUB}
shift 2; exec "$@\""""
# One of `Action`: a file in memory, under another name until it is whole.
_WRITE_FILE: Final = f"""{WRITE_FILE}() (
	umask 077; to=$1 mode=$2 owner=$3:$4; shift 4; IFS=
	printf %s "$*" | base64 -d >"$to.new" && chown "$owner" "$to.new" &&
		chmod "$mode" "$to.new" && mv -f "$to.new" "$to"
)"""
_SEED_BYTES: Final = 64  # guest/guest.c, guest_seed
# Every shell of ours has this name, and the applier the medium's serial; see `await_command`.
OURS: Final = "ouassister-reflect"


def apply_command(
    stub: bytes, serial: str, medium: MediumInfo, now_ns: int, *, carried: bool = False
) -> list[str]:
    """A command for the guest.

    Args:
        stub: The program of guest/stub.c.
        serial: The medium's; the stub and the applier wait for that disk.
        medium: What binds the applier to the medium.
        now_ns: The host's time, which the applier sets.
        carried: The medium is no disk but a file there, which the channel has brought; no stub is
            needed then.
    """
    # printf(1p): octal escapes, since NUL and others cannot stand in an argument.
    octal = "".join(f"\\{byte:03o}" for byte in stub)
    script = f"umask 077; printf '{octal}' >{_FILE} && chmod 700 {_FILE} && exec {_FILE} \"$@\""
    path = carried_path(serial)
    source, program, device = (
        (path, _CARRIED_APPLIER, path) if carried else (serial, _FILE, f"serial:{serial}")
    )
    script += f"; rm -f {_FILE}; exit {NO_STUB}"
    seconds, nanoseconds = divmod(now_ns, 1_000_000_000)
    return [
        "/bin/sh",
        "-c",
        _TAKE if carried else script,
        OURS,
        source,
        str(medium.applier_blocks),
        program,
        "apply",
        device,
        "--medium-sha256",
        medium.header_sha256,
        "--set-time",
        f"{seconds}.{nanoseconds:09d}",
        "--seed",
        "stdin",
    ]


def carried_path(serial: str) -> str:
    """Where the channel puts a medium in the guest."""
    return f"{_CARRIED}{serial}"


def uncarry_command(serial: str) -> list[str]:
    """A command for the guest: remove a medium that the channel has brought."""
    return ["/bin/rm", "-f", carried_path(serial), _CARRIED_APPLIER]


def seed() -> bytes:
    """What the applier's standard input has: bytes for the guest's random numbers."""
    return secrets.token_bytes(_SEED_BYTES)


def await_command() -> list[str]:
    """A command for the guest: wait until nothing that an earlier resume began runs.

    The patterns match no word of this command itself.
    """
    look = "grep -lszx -e '[o]uassister-reflect' -e 's[e]rial:oua-[0-9a-f]*'"
    look += f" -e '[/]{_CARRIED[1:]}oua-[0-9a-f]*' /proc/[0-9]*/cmdline"
    return ["/bin/sh", "-c", f"while {look} >/dev/null; do sleep 0.1; done"]


def actions_command(actions: Sequence[Action]) -> list[str]:
    """A command for the guest: do each action, print its index and exit status.

    Of a call for several units that failed, the service manager is asked for the state of each.
    """
    return ["/bin/sh", "-c", "\n".join(action_lines(actions)), OURS]


def action_lines(actions: Sequence[Action], first: int = 0) -> list[str]:
    """The shell's lines of `actions_command`; what is independent goes on side by side.

    ``first`` is the index that the first one is told with.
    """
    lines = [_WRITE_FILE] if any(one.argv[0] == WRITE_FILE for one in actions) else []
    for group in side_by_side(actions):
        some = [_action_line(first + number, actions[number]) for number in group]
        if len(some) == 1:
            lines += some
        else:  # not a plain wait: others go on meanwhile
            lines.append("jobs=")
            lines += [f'{{ {line}; }} & jobs="$jobs $!"' for line in some]
            lines.append("wait $jobs")
    return lines


def _action_line(index: int, action: Action) -> str:
    line = f"{shlex.join(action.argv)} >/dev/null 2>&1 </dev/null; "
    units = several_units(action)
    if not units:
        return f"{line}echo {index} $?"
    show = f"systemctl show -p LoadState,ActiveState,Result -- {shlex.join(units)}"
    line += f"s=$?; echo {index} $s; [ $s -eq 0 ] || {show} 2>/dev/null </dev/null"
    return f'{line} | while read -r l; do echo "{index}:$l"; done'


def several_units(action: Action) -> tuple[str, ...]:
    """The units of a call of the service manager for more than one; else none."""
    program, *words = action.argv
    plain = [word for word in words if not word.startswith("-")]
    if program not in ("systemctl", "deb-systemd-invoke") or len(plain) < 3:
        return ()
    return tuple(plain[1:])


def failed_actions(actions: Sequence[Action], output: bytes) -> tuple[str, ...]:
    """Which actions did not end with status 0; one without a status counts as failed.

    A call for several units is told with those of them that are at fault, where that is known.
    """
    statuses: dict[str, str] = {}
    states: dict[str, list[str]] = {}
    for line in output.decode("ascii", "replace").splitlines():
        index, _, status = line.partition(" ")
        if index.isdecimal() and status.isdecimal():
            statuses[index] = status
        index, colon, state = line.partition(":")
        if colon and index.isdecimal():
            states.setdefault(index, []).append(state)
    told = []
    for number, action in enumerate(actions):
        status = statuses.get(str(number), "unknown")
        if status != "0":
            units = at_fault(several_units(action), states.get(str(number), []))
            named = f" ({', '.join(units)})" if units else ""
            told.append(f"{action.shown}: status {status}{named}")
    return tuple(told)


def at_fault(units: Sequence[str], lines: Sequence[str]) -> tuple[str, ...]:
    """Units that are not loaded, have failed, or are not there though nothing ended them well.

    Args:
        units: As they were asked for.
        lines: What ``systemctl show`` printed: a block for each unit, in their order.
    """
    blocks: list[dict[str, str]] = [{}]
    for line in lines:
        key, equals, value = line.partition("=")
        if equals:
            blocks[-1][key] = value
        else:
            blocks.append({})
    if len(blocks) < len(units):
        return ()
    return tuple(
        unit
        for unit, block in zip(units, blocks, strict=False)
        if block.get("LoadState") != "loaded"
        or block.get("ActiveState") == "failed"
        or block.get("Result") not in ("success", None)
    )
