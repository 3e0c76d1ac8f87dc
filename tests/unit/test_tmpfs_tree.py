"""Where the guest's tmpfs stand among the mounts of a run."""

# ruff: noqa: S108 - /tmp is the guest's

from __future__ import annotations

from ouassister.disk.layout import Layout
from ouassister.disk.layout import Place as DiskPlace
from ouassister.shadow import sandbox
from ouassister.shadow.devices.mounts import GuestDevices
from ouassister.shadow.mounts import DEVICE_NODES, Bind, BindPart, Devices, Operation, Tmpfs
from ouassister.shadow.tmpfs_handover import Place
from ouassister.shadow.trees.handover import DEV, SYS

LAYOUT = Layout(
    volumes=(),
    places=(
        DiskPlace(0, b"/", b"/", False),
        DiskPlace(1, b"/", b"/tmp/disk", False),
        DiskPlace(1, b"/", b"/home", False),
    ),
    memory=(b"/srv/empty", b"/srv/memory", b"/nfs/memory"),
    covers=(b"/nfs",),
)
MEMORY = (
    Place(0, b"/", b"/run/lock", False, True),
    Place(1, b"/", b"/run", False, False),
    Place(2, b"/part", b"/tmp", False, False),
    Place(2, b"/", b"/srv/memory", True, False),
    Place(3, b"/", b"/dev/shm", False, False),
    Place(3, b"/", b"/nfs/memory", False, False),
)


def tree(memory: tuple[Place, ...] | None) -> list[Operation]:
    return list(sandbox.tree("/s", LAYOUT, memory, package_cache=True))


def targets(operations: list[Operation]) -> list[str]:
    return [one.describe().split(" ")[-1] for one in operations]


def test_each_mount_comes_after_what_it_stands_on() -> None:
    operations = tree(MEMORY)
    order = targets(operations)
    for below, above in (
        ("/run", "(noexec)"),  # /run/lock
        ("/run", "/run/ouassister"),
        ("/run/ouassister", "/run/ouassister/bin"),
        ("/tmp", "/tmp/disk"),
        ("shm", "/dev/shm"),  # of /dev
    ):
        assert order.index(below) < order.index(above), (below, above, order)
    parts = {one.target: one for one in operations if isinstance(one, BindPart)}
    assert parts[b"/run/lock"] == BindPart("/s/tmpfs/0", b"/", b"/run/lock", False, noexec=True)
    assert parts[b"/tmp"] == BindPart("/s/tmpfs/2", b"/part", b"/tmp", False)
    assert parts[b"/srv/memory"].read_only
    assert b"/nfs/memory" not in parts  # what it stands on cannot be read
    empty = {one.target for one in operations if isinstance(one, Tmpfs)}
    assert empty == {"/sys", "/nfs", "/srv/empty", "/run/ouassister"}


def test_recorders_lie_over_what_the_guest_has() -> None:
    operations = tree(MEMORY)
    (own,) = (one for one in operations if getattr(one, "target", "") == "/run/ouassister")
    assert own == Tmpfs("/run/ouassister", exact=True)
    assert Bind("/s/tools", "/run/ouassister/bin", read_only=True) in operations
    assert not any(order == "/run/systemd/system" for order in targets(operations))


def test_without_a_hand_over_there_are_empty_ones() -> None:
    order = targets(tree(None))
    for target in ("/run", "/tmp", "/run/lock", "/srv/memory"):
        assert target in order
    assert order.index("/run") < order.index("/run/ouassister")


def test_guest_without_a_tmpfs_has_its_own_tmp_and_a_run_of_ours() -> None:
    order = targets(tree(()))
    assert "/tmp" not in order
    assert order.index("/run") < order.index("/run/lock")


def test_guests_devices_stand_where_they_were_served() -> None:
    served = frozenset((SYS, DEV))
    operations = list(sandbox.tree("/s", LAYOUT, MEMORY, served, package_cache=False))
    assert BindPart("/s/sys", b"", b"/sys") in operations
    assert GuestDevices("/s/dev", own_shm=False) in operations  # the guest's stands there
    assert not any(isinstance(one, Devices) for one in operations)
    assert operations.index(GuestDevices("/s/dev", own_shm=False)) < operations.index(
        BindPart("/s/tmpfs/3", b"/", b"/dev/shm")
    )
    without = list(sandbox.tree("/s", LAYOUT, None, served, package_cache=False))
    assert GuestDevices("/s/dev", own_shm=True) in without
    nothing = list(sandbox.tree("/s", LAYOUT, MEMORY, package_cache=False))
    assert Tmpfs("/sys", 0o555, read_only=True) in nothing
    assert Devices() in nothing
    one = GuestDevices("/s/dev", own_shm=False)
    assert one.sources() == ("/s/dev", *(f"/dev/{name}" for name in DEVICE_NODES))
    assert one.describe().startswith("mount --bind /s/dev /dev with null, zero")
