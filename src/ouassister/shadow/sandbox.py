"""What the tree of a shadow is made of: fixed places, and the mounts of one run.

The stage is a private tmpfs laid over a folder that every Linux host has; it exists in the mount
namespace of the shadow only and goes away with its last process.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ouassister.disk.storage import volume_name
from ouassister.shadow.devices.mounts import GuestDevices
from ouassister.shadow.mounts import Bind, BindPart, Devices, Folder, Operation, Tmpfs
from ouassister.shadow.trees.handover import DEV, SYS

if TYPE_CHECKING:
    from ouassister.disk.layout import Layout
    from ouassister.shadow.tmpfs_handover import Place

STAGES: Final = ("/mnt", "/media", "/srv", "/opt")  # FHS 3.0: always there, never needed here

EXPORTS: Final = "export"  # each of the guest's file systems as one file, served by QEMU
WORK: Final = "work"  # the run's folder on the host: union layers, output
UNFLUSHED: Final = "work/unflushed"  # see ouassister.disk.handover
EXCERPT: Final = "work/excerpt"  # of the package lists, for the run itself
MEMORY: Final = "work/tmpfs"  # see ouassister.shadow.tmpfs_handover
TMPFS: Final = "tmpfs"  # where each of them is mounted once for all programs
TOLD: Final = "work"  # see ouassister.shadow.told
OWN_FOLDER: Final = b"/run/ouassister"  # what the shadow itself has in the tree
CACHE: Final = "cache"  # kept between runs: package lists and archives
KEPT: Final = "kept"  # in the cache; see ouassister.shadow.keep
TOOLS: Final = "tools"  # recorders

LOG: Final = "work/log"  # what scripts of ours write in the tree
FIRST_PID: Final = 4_000_000  # above every pid of a guest (PID_MAX_LIMIT is 4194304)
SEARCH_PATH: Final = (
    "/run/ouassister/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)


def export(volume: int) -> str:
    """The file that a volume is served as."""
    return f"{EXPORTS}/{volume_name(volume)}"


def unflushed(volume: int) -> str:
    """What the guest's memory holds of it and its disk does not."""
    return f"{UNFLUSHED}/{volume_name(volume)}"


def lower(volume: int) -> str:
    """Where it is mounted."""
    return f"lower/{volume}"


def upper(volume: int) -> str:
    """Its union layer."""
    return f"{WORK}/upper/{volume}"


def overlay_work(volume: int) -> str:
    """What overlayfs needs beside it."""
    return f"{WORK}/overlay/{volume}"


def merged(volume: int) -> str:
    """Where it is mounted with the union layer over it."""
    return f"merged/{volume}"


def tree(
    stage: str,
    layout: Layout,
    memory: tuple[Place, ...] | None = None,
    served: frozenset[str] = frozenset(),
    *,
    package_cache: bool,
) -> tuple[Operation, ...]:
    """Mounts of one run, in order; the root is there already.

    Args:
        stage: Where the stage lies on the host.
        layout: Where the guest's file systems stand.
        memory: Where its tmpfs stand that were made again; None when none was, and programs get
            an empty /run and /tmp.
        served: Which of /sys and /dev are the guest's; otherwise the first is empty, and the second
            has what every program needs.
        package_cache: apt's lists and cache are the kept ones instead of the guest's.
    """
    shared = any(place.target == b"/dev/shm" for place in memory or ())
    standing = [
        *_guest_mounts(stage, layout, memory or ()),
        # The host's /sys would be a lie.
        BindPart(f"{stage}/{SYS}", b"", b"/sys")
        if SYS in served
        else Tmpfs("/sys", 0o555, read_only=True),
        GuestDevices(f"{stage}/{DEV}", own_shm=not shared) if DEV in served else Devices(),
    ]
    empty: tuple[Folder, ...] = ()
    if memory is None:
        standing.append(Tmpfs("/tmp", 0o1777))  # noqa: S108 - the guest's own folder
    if not any(place.target == b"/run" for place in memory or ()):
        standing.append(Tmpfs("/run"))
        empty = (
            Folder("/run/lock", 0o1777),
            Folder("/run/ouassister"),
        )
    # What stands on another comes after it.
    standing.sort(key=lambda one: os.fsencode(one.target).rstrip(b"/").count(b"/"))
    operations: list[Operation] = [
        *standing,
        *empty,
        Tmpfs("/run/ouassister", exact=True),  # over what the guest may have of that name
        Folder("/run/ouassister/bin"),
        Bind(f"{stage}/{TOOLS}", "/run/ouassister/bin", read_only=True),
        Folder("/run/ouassister/log"),
        Bind(f"{stage}/{LOG}", "/run/ouassister/log"),
    ]
    if package_cache:
        operations += [
            Bind(f"{stage}/{CACHE}/lists", "/var/lib/apt/lists"),
            Folder("/run/ouassister/lists"),
            Bind(f"{stage}/{EXCERPT}", "/run/ouassister/lists"),
            Bind(f"{stage}/{CACHE}/apt", "/var/cache/apt"),
        ]
    return tuple(operations)


def _guest_mounts(
    stage: str, layout: Layout, memory: tuple[Place, ...]
) -> list[BindPart | Tmpfs | Devices | GuestDevices]:
    """What the guest has mounted, in any order."""
    operations: list[BindPart | Tmpfs | Devices | GuestDevices] = [
        BindPart(f"{stage}/{merged(place.volume)}", place.root, place.target, place.read_only)
        for place in layout.places[1:]
    ]
    operations += [
        BindPart(
            f"{stage}/{TMPFS}/{place.number}",
            place.root,
            place.target,
            place.read_only,
            noexec=place.noexec,
        )
        for place in memory
        if not _is_below(place.target, layout.covers)
    ]
    made = {place.target for place in memory}
    operations += [
        Tmpfs(os.fsdecode(target), 0o1777)
        for target in layout.memory
        if target not in made and not _is_below(target, layout.covers)
    ]
    operations += [Tmpfs(os.fsdecode(target), 0o555, read_only=True) for target in layout.covers]
    return operations


def _is_below(target: bytes, covers: tuple[bytes, ...]) -> bool:
    """Whether a mount point is not there, since it is on a file system that cannot be read."""
    return any(target.startswith(cover.rstrip(b"/") + b"/") for cover in covers)
