"""What the tree of a shadow is made of: fixed places, and the mounts of one run.

The stage is a private tmpfs laid over a folder that every Linux host has; it exists in the mount
namespace of the shadow only and goes away with its last process.
"""

from __future__ import annotations

from typing import Final

from ouassister.shadow.mounts import Bind, Devices, Folder, Operation, Resolver, Tmpfs

STAGES: Final = ("/mnt", "/media", "/srv", "/opt")  # FHS 3.0: always there, never needed here

EXPORT: Final = "export/root"  # the guest's root file system as one file, served by QEMU
LOWER: Final = "lower"  # … mounted
MERGED: Final = "merged"  # … with the union layer over it
WORK: Final = "work"  # the run's folder on the host: union layer, output
UPPER: Final = "work/upper"
OVERLAY_WORK: Final = "work/overlay"
EXCERPT: Final = "work/excerpt"  # of the package lists, for the run itself
CACHE: Final = "cache"  # kept between runs: package lists and archives
TOOLS: Final = "tools"  # recorders
RESOLVER: Final = "resolv.conf"

EVENTS: Final = "work/events"  # what recorders wrote
FIRST_PID: Final = 4_000_000  # above every pid of a guest (PID_MAX_LIMIT is 4194304)
SEARCH_PATH: Final = (
    "/run/ouassister/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)


def tree(stage: str, *, network: bool, package_cache: bool) -> tuple[Operation, ...]:
    """Mounts of one run, in order.

    Args:
        stage: Where the stage lies on the host.
        network: The host's network is visible; its resolver goes along.
        package_cache: apt's lists and cache are the kept ones instead of the guest's.
    """
    operations: list[Operation] = [
        Tmpfs("/sys", 0o555, read_only=True),  # the host's would be a lie
        Devices(),
        Tmpfs("/run"),
        Tmpfs("/tmp", 0o1777),  # noqa: S108 - the guest's own folder
        Folder("/run/lock", 0o1777),
        Folder("/run/systemd/system"),  # sd_booted(3): scripts act as on a running system
        Folder("/run/ouassister/bin"),
        Bind(f"{stage}/{TOOLS}", "/run/ouassister/bin", read_only=True),
        Folder("/run/ouassister/log"),
        Bind(f"{stage}/{EVENTS}", "/run/ouassister/log"),
    ]
    if package_cache:
        operations += [
            Bind(f"{stage}/{CACHE}/lists", "/var/lib/apt/lists"),
            Folder("/run/ouassister/lists"),
            Bind(f"{stage}/{EXCERPT}", "/run/ouassister/lists"),
            Bind(f"{stage}/{CACHE}/apt", "/var/cache/apt"),
        ]
    if network:
        operations.append(Resolver(f"{stage}/{RESOLVER}"))
    return tuple(operations)
