"""The channel that the resume will use, chosen before anything is done; none is a refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ouassister.access import AGENT, PORT, ROOT, SSH, Access
from ouassister.errors import UnsupportedGuestError
from ouassister.guest_model import Subject
from ouassister.provider import ssh
from ouassister.reaching import agent, helper, links, sshd
from ouassister.shadow import sandbox
from ouassister.text import from_text, size, to_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ouassister.guest_shadow import Guest
    from ouassister.provider.management import Management

FILES: Final = "ouassister.disk.small_files"
_CARRY_LIMIT: Final = 64 << 20  # a guest agent brings about 2 MB/s
_SUBJECTS: Final = {
    AGENT: frozenset((Subject.FILES,)),
    PORT: frozenset((Subject.FILES,)),
    SSH: frozenset((Subject.FILES, Subject.NETWORK)),
}


def choose(guest: Guest) -> Access:
    """Choose the first channel of the VM that nothing known speaks against.

    Raises:
        UnsupportedGuestError: There is none; each is named with the reason.
    """
    config = guest.sleeping.config
    reasons = []
    for name in config.channels:
        if name == SSH and config.management is not None:
            access, reason = _by_ssh(guest, config.management)
        elif name == PORT:
            access, reason = _by_port(guest)
        else:
            access, reason = _by_agent(guest)
        if not reason:
            down, untold = _links(guest)
            return replace(access, carried=config.carried, links_down=down, links_untold=untold)
        reasons.append(f"{name}: {reason}")
    told = "; ".join(reasons) or "its description names none"
    raise UnsupportedGuestError(
        f"{config.name} cannot be reached at its resume: {told}",
        hint="docs/how-to/channels.md tells what each channel needs in the guest",
    )


def remarks(guest: Guest, access: Access) -> tuple[str, ...]:
    """What is to be told of a choice: links that stay down, and what was not looked at."""
    management = guest.sleeping.config.management
    told = links.notes(access)
    if access.channel == SSH and management is not None and management.user != ROOT:
        told += (
            f"whether sudo lets {management.user} run everything without a password is not looked"
            " at: the resume fails behind the closed gate if not",
        )
    return told


def refuse_too_large(vm: str, access: Access, layer_bytes: int) -> None:
    """Raise when the channel would have to bring more than it can in good time.

    Raises:
        UnsupportedGuestError: It would.
    """
    if access.carried and layer_bytes > _CARRY_LIMIT:
        raise UnsupportedGuestError(
            f"the update of {vm} has {size(layer_bytes)}, and its channel brings no more than"
            f" {size(_CARRY_LIMIT)}",
            hint="give the VM a place for a disk: docs/how-to/channels.md",
        )


def _links(guest: Guest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Devices of the gate whose links were down, and those of which memory does not tell."""
    untold = guest.sleeping.config.untold_links
    if not untold:
        return (), ()
    view = guest.sleeping.memory.look(guest.sleeping.view, frozenset((Subject.NETWORK,)))
    return links.judge(untold, view.network_devices or ())


def _by_agent(guest: Guest) -> tuple[Access, str]:
    view = guest.sleeping.memory.look(guest.sleeping.view, _SUBJECTS[AGENT])
    (text,) = _read(guest, [agent.configuration(view)])
    return Access(AGENT), agent.problem(view, text)


def _by_port(guest: Guest) -> tuple[Access, str]:
    view = guest.sleeping.memory.look(guest.sleeping.view, _SUBJECTS[PORT])
    program = helper.program(view)
    content = _read(guest, [program])[0] if program else None
    units, wanted = _names(guest, helper.UNITS), _names(guest, helper.WANTS)
    return Access(PORT), helper.problem(view, content, units, wanted)


def _by_ssh(guest: Guest, management: Management) -> tuple[Access, str]:
    view = guest.sleeping.memory.look(guest.sleeping.view, _SUBJECTS[SSH])
    names = [name for name in _names(guest, sshd.FOLDER) if sshd.HOST_KEY.fullmatch(name)]
    keys = sshd.host_keys(_read(guest, [sshd.FOLDER + b"/" + name.encode() for name in names]))
    if not keys:
        return Access(), "the guest's host keys are not to be read, so anybody could answer"
    included = [one for one in _names(guest, sshd.INCLUDED) if one.endswith(".conf")]
    text, *more = _read(
        guest,
        [sshd.CONFIGURATION, *(sshd.INCLUDED + b"/" + from_text(one) for one in included)],
    )
    name = management.user
    users, sudoers = _read(guest, [sshd.USERS, sshd.SUDOERS])
    user = sshd.user(users, name)
    reason = sshd.refused_user(user, name, sudoers)
    if user is None or reason:
        return Access(SSH, keys), reason
    authorized = _read(guest, user.authorized)
    settings = sshd.settings_of(text, more)
    offered = ssh.offered(management.identity)
    reason = sshd.problem(view, management.guest_port, settings, authorized, offered, name)
    return Access(SSH, keys), reason


def _read(guest: Guest, paths: Sequence[bytes]) -> list[bytes | None]:
    told = guest.shadow.call(FILES, "read", [_place(guest, path) for path in paths])
    return [None if text is None else from_text(text) for text in told]


def _names(guest: Guest, path: bytes) -> list[str]:
    found: list[str] = guest.shadow.call(FILES, "names", _place(guest, path))
    return found


def _place(guest: Guest, path: bytes) -> dict[str, str]:
    volume, inside = guest.sleeping.layout.locate(path)
    return {"root": sandbox.lower(volume), "path": to_text(inside)}
