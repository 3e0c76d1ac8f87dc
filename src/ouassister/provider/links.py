"""Links of the gate: the address by which the guest knows each device, and who closed it.

A save does not tell QEMU's user whether a link was up; the guest's memory does, for the device with
that address. But a gate that was closed and never opened looks the same there, so what a run behind
a closed gate would open is written beside the ``vm.toml`` as long as it is closed.

Source: QEMU v7.2.0 net/net.c (``qemu_macaddr_default_if_unset``, ``qemu_macaddr_get_free``),
softmmu/vl.c (``qemu_create_cli_devices``).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import StateError
from ouassister.provider.cmdline import devices, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_CARD: Final = re.compile(
    r"virtio-net(-pci|-device|-ccw)?(-(non-)?transitional)?|e1000.*|igb|rtl8139|ne2k_.*|vmxnet3|"
    r"pcnet|i825.*|usb-net|tulip|sungem|sunhme"
)
_FIRST: Final = 0x56
_LAST: Final = 0xFE
_PREFIX: Final = "52:54:00:12:34:"
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_ELSEWHERE: Final = frozenset(("nic", "net"))  # cards of these come first, in an order of QEMU's
_LIMIT: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Link:
    """A link whose state at the suspension nobody has declared.

    Attributes:
        device: The id of its device.
        mac: The device's address, in lower case; "" where the command does not tell it.
        closed: Our gate closed it, and has not opened it since.
    """

    device: str
    mac: str
    closed: bool


def addresses(command: Sequence[str]) -> dict[str, str]:
    """The address of each network device that has an id, by the command; "" when not known.

    QEMU makes the devices in their order, and knows of no address that comes later.
    """
    options = words(command)
    known = not any(name in _ELSEWHERE for name, _values in options)
    known = known and not any(word.startswith("{") for word in command)  # made after all others
    found: dict[str, str] = {}
    taken: set[str] = set()
    for card in (one for one in devices(options) if _is_card(one)):
        mac = card.get("mac", "").replace("-", ":").lower()
        if not mac and known:
            mac = _free(taken)
        taken.add(mac)
        if "id" in card:
            found[card["id"]] = mac if _MAC.fullmatch(mac) else ""
    return found


def write_closed(path: Path, opened_by_gate: Iterable[str]) -> None:
    """Keep which devices' links a closed gate would open; none: it is open, or opens none."""
    if not (found := sorted(opened_by_gate)):
        path.unlink(missing_ok=True)
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(found) + "\n", encoding="utf-8")
    part.rename(path)


def read_closed(path: Path) -> tuple[str, ...]:
    """Which devices' links a closed gate would open; none when no gate was left closed.

    Raises:
        StateError: The file cannot be read, or says something else.
    """
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_LIMIT))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise _odd(path) from error
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _odd(path)
    return tuple(value)


def _odd(path: Path) -> StateError:
    return StateError(
        f"{path} does not say which links were closed by the gate",
        hint="say in vm.toml which links were down (net.stays_down), and remove this file",
    )


def _is_card(device: dict[str, str]) -> bool:
    return "mac" in device or _CARD.fullmatch(device.get("driver", "")) is not None


def _free(taken: set[str]) -> str:
    """The address that QEMU gives next."""
    for number in range(_FIRST, _LAST + 1):
        if (mac := f"{_PREFIX}{number:02x}") not in taken:
            return mac
    return ""
