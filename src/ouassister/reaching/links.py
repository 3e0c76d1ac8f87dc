"""Which links were down when the guest fell asleep? By its memory, for each device of the gate.

What its driver has last said counts: a link that was cut in the last moment before the suspension,
without the guest having noticed, looks up. A guest that is hostile can say what it likes, which
gets it no more than a gate that opens; whoever keeps a link closed against a guest declares it.

Source: Linux v6.1 ``drivers/net/virtio_net.c`` (``virtnet_config_changed_work``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ouassister.access import Access
    from ouassister.guest_model import NetworkDevice
    from ouassister.provider.links import Link

_IFF_UP: Final = 1


def judge(
    links: Sequence[Link], devices: Sequence[NetworkDevice]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Devices whose links were down, and those of which nothing tells it.

    Where our own gate was closed when the guest fell asleep, what the gate would have opened was
    up; unless one of these is up, so that somebody has set the links since.
    """
    told = [(link, _carrier(link, devices)) for link in links]
    ours = not any(link.closed and carrier for link, carrier in told)
    down: list[str] = []
    untold: list[str] = []
    for link, carrier in told:
        if carrier or (link.closed and ours):
            continue
        (untold if carrier is None else down).append(link.device)
    return tuple(down), tuple(untold)


def notes(access: Access) -> tuple[str, ...]:
    """What is told of the links that were judged."""
    return (
        *(
            f"{device}: its link was down when the guest fell asleep, and stays down"
            for device in access.links_down
        ),
        *(
            f"{device}: memory does not tell whether its link was up, so it is opened"
            " (net.stays_down says it)"
            for device in access.links_untold
        ),
    )


def _carrier(link: Link, devices: Sequence[NetworkDevice]) -> bool | None:
    """Whether a link was up; None where memory does not tell."""
    found = [one for one in devices if link.mac and one.permanent_address == link.mac]
    if len(found) != 1:
        return None
    (device,) = found
    # Most drivers say nothing of a device that is not up.
    return None if not device.carrier and not device.flags & _IFF_UP else device.carrier
