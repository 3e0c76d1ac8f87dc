"""What is done about each unit that runs replaced files.

The lists follow what needrestart(1) ships as its defaults, by what a restart would take along:
buses whose clients do not come back, sessions of people, networks (a client of DHCP would wait for
minutes behind the closed gate), engines whose containers end with them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ouassister.model import Restart, Verdict
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ouassister.model import Exposed
    from ouassister.restart.uses import ProcessUse

_AGENT: Final = "qemu-guest-agent.service"
_ADVISED: Final = (
    (r"dbus(-broker)?\.service", "programs on the bus do not come back to a new one"),
    (r"systemd-logind\.service", "sessions are tied to it"),
    (r"(user|user-runtime-dir)@\d+\.service", "it is a person's session"),
    (r"session-[^.]+\.scope", "it is a person's session"),
    (r"(getty|serial-getty|autovt|container-getty|console-getty)(@.*)?\.service",
     "somebody may be at that terminal"),
    (r"(gdm3?|sddm|lightdm|lxdm|xdm|kdm|slim|nodm|wdm|greetd|display-manager)\.service",
     "desktop sessions end with it"),
    (r"(docker|containerd|crio|podman|lxc|lxd|incus|libvirtd|virtqemud|virtlogd|machined)"
     r"\.service", "containers or machines may end with it"),
    (r"(networking|network|ifup@.*|ifplugd|NetworkManager|ModemManager|wicd|connman"
     r"|wpa_supplicant(@.*)?|openvpn(-client|-server)?(@.*)?|wg-quick@.*|tinc(@.*)?|quagga|frr|bird6?"
     r"|(strong|libre|open)swan(-starter)?|ipsec|bluetooth)\.service",
     "it would set up networks while the links are down"),
    (r"(docker|crio|cri-containerd|libpod|lxc|machine)-.*\.scope", "it is a container"),
    (r".*\.scope", "nothing knows how to start it again"),
    (r"init\.scope", "the service manager executes itself again by its own package's script"),
)  # fmt: skip
_PATTERNS: Final = tuple((re.compile(pattern), why) for pattern, why in _ADVISED)
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.@\\-]{1,255}\.(service|scope)")


def decide(
    exposed: Iterable[tuple[ProcessUse, Exposed]], excluded: Mapping[str, str]
) -> tuple[Restart, ...]:
    """Gather exposed processes by unit, and say what is done about each.

    Args:
        exposed: See `ouassister.restart.exposed`.
        excluded: Units that the guest's administrator keeps from being restarted, and the rule.

    Returns:
        In the order of the units' names; processes of no unit come last.
    """
    groups: dict[tuple[str, bool, str], list[Exposed]] = {}
    for use, one in exposed:
        key = (use.unit, use.apart, use.user_unit)
        groups.setdefault(key, []).append(one)
    return tuple(
        _decide(unit, user_unit, tuple(processes), excluded, apart=apart)
        for (unit, apart, user_unit), processes in sorted(
            groups.items(), key=lambda item: (not item[0][0], item[0])
        )
    )


def _decide(
    unit: str,
    user_unit: str,
    processes: tuple[Exposed, ...],
    excluded: Mapping[str, str],
    *,
    apart: bool,
) -> Restart:
    verdict, why = Verdict.RESTART, "it runs replaced files"
    if apart:
        verdict, why = Verdict.APART, "it is in a container or a sandbox of its own"
    elif not unit:
        verdict, why = Verdict.ADVISE, "it belongs to no unit"
    elif not _UNIT.fullmatch(unit):
        verdict, why = Verdict.ADVISE, f"its unit has an odd name: {to_text(unit.encode())}"
    elif unit in excluded:
        verdict, why = (
            Verdict.EXCLUDED,
            f"needrestart's configuration excludes it: {excluded[unit]}",
        )
    elif unit == _AGENT:
        verdict, why = Verdict.LATER, "the resume talks to it"
    else:
        for pattern, reason in _PATTERNS:
            if pattern.fullmatch(unit):
                verdict, why = Verdict.ADVISE, reason
                break
    if user_unit and verdict is Verdict.ADVISE:
        why = f"{why} ({user_unit})"
    return Restart(unit, verdict, why, processes)
