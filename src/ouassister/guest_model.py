"""Frozen records of what a guest's kernel knows beyond the basics; data only.

`ouassister.model` has the rest, and re-exports these.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

PhysAddr = NewType("PhysAddr", int)
VirtAddr = NewType("VirtAddr", int)
GuestPid = NewType("GuestPid", int)
HostPid = NewType("HostPid", int)


@dataclass(frozen=True, slots=True)
class Namespaces:
    """Inode numbers of a process's namespaces, as /proc/PID/ns shows them; 0: told by none."""

    cgroup: int
    ipc: int
    mnt: int
    net: int
    pid: int
    time: int
    user: int
    uts: int


@dataclass(frozen=True, slots=True)
class Cgroup:
    """Where a process is in one cgroup hierarchy, as a line of /proc/PID/cgroup tells it."""

    hierarchy: int  # 0 is the unified one (version 2)
    controllers: str  # "", "cpu,cpuacct", "name=systemd"
    path: bytes


@dataclass(frozen=True, slots=True)
class TaskDetail:
    """What more there is to know of a process. Units are systemd's, ``""`` when in none."""

    tgid: GuestPid
    threads: tuple[GuestPid, ...]
    gid: int
    euid: int
    egid: int
    groups: tuple[int, ...]
    cwd: bytes | None
    root: bytes | None
    namespaces: Namespaces | None  # a zombie has none
    cgroups: tuple[Cgroup, ...]
    unit: str
    user_unit: str
    slice: str


@dataclass(frozen=True, slots=True)
class Vma:
    """A line of /proc/PID/maps. ``path`` is empty, a path, or a name such as ``[heap]``."""

    start: VirtAddr
    end: VirtAddr
    permissions: str  # "r-xp"
    offset: int
    major: int
    minor: int
    inode: int
    path: bytes


@dataclass(frozen=True, slots=True)
class ProcessMaps:
    """The mappings of one process, by address."""

    pid: GuestPid
    vmas: tuple[Vma, ...]


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file descriptor. ``path`` is as /proc/PID/fd shows it, ``socket:[7]`` included.

    ``deleted`` is true for a file that has no name on its file system any more. A socket has its
    address family (``AF_*``; -1 where there is none), and, connected to a Unix socket that has a
    name, that name.
    """

    fd: int
    path: bytes
    flags: int  # O_*, O_CLOEXEC included, as /proc/PID/fdinfo has them
    readable: bool
    writable: bool
    position: int
    major: int
    minor: int
    inode: int
    mode: int
    deleted: bool
    family: int = -1
    peer: bytes = b""


@dataclass(frozen=True, slots=True)
class ProcessFiles:
    """The open files of one process, by descriptor."""

    pid: GuestPid
    files: tuple[OpenFile, ...]


@dataclass(frozen=True, slots=True)
class HeldLock:
    """A line of /proc/locks: any lock that some process holds, with its file.

    ``end`` is None for "to the end of the file". ``pid`` is -1 for a lock that belongs to an open
    file (OFD).
    """

    kind: str  # "posix", "ofd", "flock", "lease", "delegation"
    write: bool
    pid: GuestPid
    path: bytes
    major: int
    minor: int
    inode: int
    start: int
    end: int | None


@dataclass(frozen=True, slots=True)
class SuperBlock:
    """A mounted file system, whether or not init sees it."""

    fstype: str
    id: str  # the kernel's short name, such as "vda1"
    uuid: str  # "" when it has none
    major: int
    minor: int
    magic: int
    block_size: int
    read_only: bool
    frozen: bool
    disk: str  # the name of the disk that it is on, or on a partition of; "" for none


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """A disk or a partition.

    ``sysfs`` is its path below /sys, which leads through the buses (PCI address, SCSI target).
    """

    name: str
    major: int
    minor: int
    disk: str  # the whole disk's name
    partition: int  # 0: the whole disk
    start: int
    size: int
    read_only: bool
    partition_uuid: str
    partition_label: str
    sysfs: bytes


@dataclass(frozen=True, slots=True)
class MappedLeg:
    """A device below a device-mapper target. ``start`` is None when the target does not tell."""

    device: str
    start: int | None


@dataclass(frozen=True, slots=True)
class MappedRange:
    """A target of a device-mapper table. ``below`` has a device and a start for each leg.

    Several legs are stripes or mirrors. Starts are known for linear, striped and crypt targets.
    """

    start: int
    size: int
    target: str
    below: tuple[MappedLeg, ...]


@dataclass(frozen=True, slots=True)
class MappedDevice:
    """A device-mapper device: LVM's logical volumes, dm-crypt, multipath."""

    device: str  # "dm-0"
    name: str  # "vg-root"
    uuid: str
    ranges: tuple[MappedRange, ...]


@dataclass(frozen=True, slots=True)
class NetworkDevice:
    """A network device of init's namespace.

    ``carrier`` is what its driver has last said of the link; many say nothing of a device that is
    not up. ``permanent_address`` is the hardware's own; "" for a device that is none.
    """

    name: str
    index: int
    kind: str  # "" for hardware, "bridge", "vlan", ...
    flags: int  # IFF_*
    mtu: int
    operstate: str
    hardware_address: str
    addresses: tuple[str, ...]  # with prefix length
    permanent_address: str = ""
    carrier: bool = True


@dataclass(frozen=True, slots=True)
class Socket:
    """A socket of init's network namespace that others can reach: listening, or bound.

    ``address`` is an IP address or a path; an abstract one starts with ``@``.
    """

    protocol: str  # "tcp", "tcp6", "udp", "udp6", "unix-stream", "unix-dgram", "unix-seqpacket"
    address: bytes
    port: int
    listening: bool
    uid: int
    inode: int  # names it in ``OpenFile.path``


@dataclass(frozen=True, slots=True)
class Sockets:
    """Sockets of init's network namespace."""

    bound: tuple[Socket, ...]
    established: int  # TCP connections


@dataclass(frozen=True, slots=True)
class Module:
    """A loaded module, as lsmod shows it."""

    name: str
    size: int
    references: int
    used_by: tuple[str, ...]
    state: str  # "live", "coming", "going", "unformed"
    taints: int


@dataclass(frozen=True, slots=True)
class SwapArea:
    """A line of /proc/swaps."""

    path: bytes
    partition: bool
    size: int
    used: int
    priority: int


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A value below /proc/sys; ``value`` is None when ``why`` it cannot be told."""

    name: str  # "net.ipv4.ip_forward"; a dot within a component is a slash
    value: bytes | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class TmpfsNode:
    """A file of a tmpfs; ``path`` starts at its root. ``swapped`` and ``absent`` count pages.

    Extended attributes include POSIX ACLs, encoded as getxattr(2) returns them.
    """

    path: bytes
    inode: int
    mode: int
    uid: int
    gid: int
    links: int
    size: int
    major: int
    minor: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    target: bytes | None  # of a symbolic link
    xattrs: tuple[tuple[bytes, bytes], ...]
    swapped: int
    absent: int


@dataclass(frozen=True, slots=True)
class Tmpfs:
    """What one tmpfs contains; ``unread`` names what could not be told, and why."""

    target: bytes
    major: int
    minor: int
    nodes: tuple[TmpfsNode, ...]
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TmpfsFile:
    """What a regular file of a tmpfs contains: runs of bytes, each with its position.

    ``path`` is its first name. What lies between runs is a hole, which reads as zeros.
    """

    path: bytes
    runs: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class TmpfsContent:
    """A tmpfs with all that is in it, so that it can be made again.

    Pages are not counted in its nodes. A regular file that is not among ``files`` is among
    ``left_out``, with the reason.

    Attributes:
        tmpfs: Its files; those that a bound forbids to read are missing.
        size_bytes: Its limit; 0 for none.
        inodes: Its limit; 0 for none.
        noexec: Numbers of its mounts that no program can be started from.
        hard_links: Further names of a file, each with the first one.
        files: What is in them.
        left_out: What is not known of it: a path, or none, and why.
    """

    tmpfs: Tmpfs
    size_bytes: int
    inodes: int
    noexec: tuple[int, ...]
    hard_links: tuple[tuple[bytes, bytes], ...]
    files: tuple[TmpfsFile, ...]
    left_out: tuple[tuple[bytes, str], ...]


class Subject(StrEnum):
    """What a `GuestView` contains only when it is asked for."""

    TASKS = "tasks"
    MAPS = "maps"
    FILES = "files"
    LOCKS = "locks"
    FILE_SYSTEMS = "file-systems"
    BLOCK_DEVICES = "block-devices"
    NETWORK = "network"
    MODULES = "modules"
    SWAP = "swap"
    SYSCTLS = "sysctls"
    TMPFS = "tmpfs"
    TMPFS_CONTENT = "tmpfs-content"
