"""Which file systems on disk the guest's tree is made of, where they lie and where they stand.

All of it comes from the guest's own mount table, partitions and device-mapper tables, as its
sleeping kernel holds them: nothing is guessed from what a disk looks like.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ouassister.model import BlockDevice, GuestView, MappedDevice, Mount

_SECTOR: Final = 512
_MAX_DEPTH: Final = 8  # device-mapper devices on top of each other
_MAX_PIECES: Final = 256
# One driver serves all three (`ouassister.kernel.unflushed`), and so does ext4-view.
EXT: Final = frozenset(("ext2", "ext3", "ext4"))
READABLE: Final = EXT | {"vfat"}
# Only the host's own kernel can read these: docs/design/0009-xfs-and-btrfs.md.
HOST_KERNEL: Final = frozenset(("xfs", "btrfs"))
# Without these no program of the guest starts, or its package manager knows nothing.
_NEEDED: Final = (b"/usr/bin", b"/usr/lib", b"/etc", b"/var/lib/dpkg")
_OPTION_HINT: Final = (
    "'host_kernel_mounts = true' in the vm.toml lets this host's kernel mount a private copy of it"
)
_AUTOMOUNT: Final = "autofs"
_MEMORY: Final = frozenset(("tmpfs", "ramfs"))
# File systems of the kernel itself (fs/ of Linux 6.1): the shadow has its own, or none.
_KERNEL: Final = frozenset(
    (
        *("autofs", "binder", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs"),
        *("devpts", "devtmpfs", "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "nfsd"),
        *("proc", "pstore", "resctrl", "rpc_pipefs", "securityfs", "selinuxfs", "smackfs"),
        *("sysfs", "tracefs", "xenfs"),
    )
)
# The shadow mounts its own, whatever the guest has there.
_OWN: Final = (b"/dev", b"/proc", b"/run", b"/sys")


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of one of the guest's disks, by the guest's name for it."""

    disk: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Volume:
    """A file system on disk: its bytes in order, and how the guest knows its device.

    A subvolume of btrfs is a volume of its own: ``root`` is its path in the file system.
    """

    device: str  # "vda1", "dm-0"
    major: int
    minor: int
    fstype: str
    pieces: tuple[Piece, ...]
    root: bytes = b"/"

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(piece.size for piece in self.pieces)

    @property
    def is_ext(self) -> bool:
        """Whether its memory is laid over its disk, and ext4-view shows it."""
        return self.fstype in EXT

    @property
    def by_host_kernel(self) -> bool:
        """Whether this host's kernel mounts it."""
        return self.fstype in HOST_KERNEL


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file system, or the part of it below ``root``, stands in the guest's tree."""

    volume: int  # index
    root: bytes
    target: bytes
    read_only: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """``volumes[0]`` is the root file system; mounts are in an order to make them in.

    Attributes:
        volumes: File systems on disk.
        places: Where they stand; the first place is the root.
        memory: Where a tmpfs stands, in places that the shadow has no file system of its own for.
        covers: Where something stands that cannot be read: nothing may be written there.
        notes: What the user should know of it.
    """

    volumes: tuple[Volume, ...]
    places: tuple[Place, ...]
    memory: tuple[bytes, ...] = ()
    covers: tuple[bytes, ...] = ()
    notes: tuple[str, ...] = ()

    def locate(self, path: bytes) -> tuple[int, bytes]:
        """Say on which volume a guest path lies, and where there."""
        best = self.places[0]
        for place in self.places[1:]:  # a later one stands on an earlier one
            if path == place.target or path.startswith(place.target + b"/"):
                best = place
        inside = path.removeprefix(best.target.rstrip(b"/")).lstrip(b"/")
        return best.volume, best.root.rstrip(b"/") + b"/" + inside


def needs_devices(mounts: Iterable[Mount]) -> bool:
    """Whether `make_layout` needs the view's block and mapped devices."""
    return any(mount.block and mount.block.disk.startswith("dm-") for mount in mounts)


def make_layout(view: GuestView, *, host_kernel_mounts: bool = False) -> Layout:
    """Lay out the file systems that are mounted where programs can see them.

    Args:
        view: With block and mapped devices where `needs_devices` says so.
        host_kernel_mounts: This host's kernel may mount what nothing else reads.

    Raises:
        UnsupportedGuestError: The root is on no disk, or a device has no table that can be read,
            or a file system that is needed cannot be read.
    """
    mounts = visible(view.mounts)
    readable = READABLE | HOST_KERNEL if host_kernel_mounts else READABLE
    _refuse_root(mounts[0] if mounts else None, readable)
    volumes: dict[tuple[int, int, bytes], int] = {}
    found: list[Volume] = []
    places: list[Place] = []
    memory: list[bytes] = []
    covers: list[bytes] = []
    notes: list[str] = []
    for mount in mounts:
        if any(mount.target == own or mount.target.startswith(own + b"/") for own in _OWN):
            continue
        if mount.fstype == _AUTOMOUNT:
            notes.append(
                f"{to_text(mount.target)} is mounted on demand and was not: what an update writes"
                " there is put there when it is"
            )
        if mount.fstype in _KERNEL:
            continue
        if mount.fstype in _MEMORY:
            memory.append(mount.target)
            continue
        if mount.block is None or mount.fstype not in readable or _is_loop(mount):
            covers.append(mount.target)
            notes.append(_not_read(mount, host_kernel_mounts=host_kernel_mounts))
            continue
        top = _top(mount, mounts)
        if top is None:
            covers.append(mount.target)
            notes.append(f"{to_text(mount.target)} is not read: the guest's root is a part of it")
            continue
        key = (mount.major, mount.minor, top)
        if key not in volumes:
            volumes[key] = len(found)
            found.append(replace(_volume(mount, view), root=top))
        inside = mount.root[len(top.rstrip(b"/")) :] or b"/"
        places.append(Place(volumes[key], inside, mount.target, mount.read_only))
    return Layout(tuple(found), tuple(places), tuple(memory), tuple(covers), tuple(notes))


def _refuse_root(root: Mount | None, readable: frozenset[str]) -> None:
    if root is None or root.block is None:
        # Of btrfs that lies on several disks, or whose types the kernel does not keep.
        which = " that can be told" if root is not None and root.fstype in HOST_KERNEL else ""
        raise UnsupportedGuestError(f"the guest's root file system is not on a disk{which}")
    whole = root.root == b"/"
    if root.fstype in readable and (whole or root.fstype in HOST_KERNEL):
        return
    what = root.fstype if whole else f"{to_text(root.root)} of {root.fstype}"
    raise UnsupportedGuestError(
        f"the guest's root file system is {what}, not ext4",
        hint=_OPTION_HINT if root.fstype in HOST_KERNEL else None,
    )


def _not_read(mount: Mount, *, host_kernel_mounts: bool) -> str:
    """Say that a file system is not read.

    Raises:
        UnsupportedGuestError: Nothing works without it.
    """
    what = f"{to_text(mount.target)} ({mount.fstype} on {to_text(mount.source)})"
    offer = mount.fstype in HOST_KERNEL and not host_kernel_mounts and mount.block is not None
    below = mount.target + b"/"
    if any(path == mount.target or path.startswith(below) for path in _NEEDED):
        raise UnsupportedGuestError(
            f"{what} is needed and cannot be read", hint=_OPTION_HINT if offer else None
        )
    return f"{what} is not read: an update that writes there fails" + (
        f"; {_OPTION_HINT}" if offer else ""
    )


def _top(mount: Mount, mounts: tuple[Mount, ...]) -> bytes | None:
    """The part of a file system that is one volume with a mounted part of it.

    What one of them shows of another is the same files, so that they share a union: parts that lie
    in one another are one volume. The root must be the top of its own; what the root is but a part
    of has no place.
    """
    if mount.fstype not in HOST_KERNEL:
        return b"/"
    same = (mount.major, mount.minor)
    roots = [one.root for one in mounts if (one.major, one.minor) == same]
    root = mounts[0]
    if same == (root.major, root.minor):
        if _is_below(root.root, mount.root) and root.root != mount.root:
            return None
        roots = [one for one in roots if one == root.root or not _is_below(root.root, one)]
    return min((one for one in roots if _is_below(mount.root, one)), key=len)


def _is_below(path: bytes, top: bytes) -> bool:
    return path == top or path.startswith(top.rstrip(b"/") + b"/")


def visible(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    """Order mounts so that each comes after what it stands on, without those that are covered.

    A mount on the same place as another has that one as its parent, and covers it with all that
    is mounted below it (mount_namespaces(7); ``fs/namespace.c``, ``attach_mnt``).

    Raises:
        CorruptGuestError: The mounts are no tree.
    """
    all_mounts = tuple(mounts)
    numbers = {mount.number for mount in all_mounts}
    below: dict[int, list[Mount]] = {}
    tops = []
    for mount in all_mounts:
        if mount.parent in numbers and mount.parent != mount.number:
            below.setdefault(mount.parent, []).append(mount)
        else:
            tops.append(mount)
    roots = [mount for mount in tops if mount.target == b"/"]
    ordered: list[Mount] = []
    left = [_uppermost(roots[-1], below)] if roots else []
    while left:
        mount = left.pop(0)
        ordered.append(mount)
        if len(ordered) > len(all_mounts):
            raise CorruptGuestError("the guest's mounts are no tree")
        left += [_uppermost(child, below) for child in below.get(mount.number, ())]
    return tuple(ordered)


def _uppermost(mount: Mount, below: Mapping[int, list[Mount]]) -> Mount:
    for _ in range(len(below) + 1):
        covers = [child for child in below.get(mount.number, ()) if child.target == mount.target]
        if not covers:
            return mount
        mount = covers[-1]
    raise CorruptGuestError("the guest's mounts are no tree")


def _is_loop(mount: Mount) -> bool:
    return mount.block is not None and mount.block.disk.startswith("loop")


def _volume(mount: Mount, view: GuestView) -> Volume:
    block = mount.block
    assert block is not None  # noqa: S101 - the caller chose so
    name = block.disk
    if b"/" in mount.source:  # btrfs has "none" there since Linux 6.8
        name = to_text(mount.source.rpartition(b"/")[2]) or block.disk
    pieces = _resolve(block.disk, block.start, block.size, _Tables(view), 0)
    if len(pieces) > _MAX_PIECES:
        raise UnsupportedGuestError(f"{block.disk} is made of {len(pieces)} pieces")
    return Volume(name, mount.major, mount.minor, mount.fstype, _join(pieces))


class _Tables:
    """Block devices by name."""

    def __init__(self, view: GuestView) -> None:
        self.devices: dict[str, BlockDevice] = {one.name: one for one in view.block_devices or ()}
        self.mapped: dict[str, MappedDevice] = {
            one.device: one for one in view.mapped_devices or ()
        }


def _resolve(name: str, start: int, size: int, tables: _Tables, depth: int) -> list[Piece]:
    """Follow a range of a device down to disks."""
    if depth > _MAX_DEPTH:
        raise CorruptGuestError(f"{name} stands on {depth} devices")
    if not name.startswith(("dm-", "md", "loop", "zram", "nbd", "rbd", "bcache")):
        device = tables.devices.get(name)
        if device is not None and device.partition:
            return [Piece(device.disk, device.start + start, size)]
        return [Piece(name, start, size)]
    mapped = tables.mapped.get(name)
    if mapped is None:
        raise UnsupportedGuestError(f"the guest's {name} cannot be followed to a disk")
    pieces: list[Piece] = []
    reached = start
    for part in sorted(mapped.ranges, key=lambda part: part.start):
        first, last = max(reached, part.start), min(start + size, part.start + part.size)
        if first >= last:
            continue
        leg = part.below[0] if len(part.below) == 1 else None
        if part.target != "linear" or leg is None or leg.start is None:
            raise UnsupportedGuestError(
                f"the guest's {mapped.name} ({name}) is of type {part.target}, not linear"
            )
        if first != reached:
            break
        offset = leg.start + first - part.start
        pieces += _resolve(leg.device, offset, last - first, tables, depth + 1)
        reached = last
    if reached != start + size:
        raise CorruptGuestError(f"the table of the guest's {name} has a hole")
    return pieces


def _join(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Make one of neighbours."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and last.disk == piece.disk and last.start + last.size == piece.start:
            joined[-1] = Piece(last.disk, last.start, last.size + piece.size)
        else:
            joined.append(piece)
        if piece.start % _SECTOR or piece.size % _SECTOR or piece.size <= 0:
            raise CorruptGuestError(f"a piece of {piece.disk} is not made of sectors")
    return tuple(joined)
