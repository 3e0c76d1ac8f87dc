"""Frozen records that pass between the steps of the spine; data only.

Guest paths are absolute ``bytes``. Times are nanoseconds since the epoch unless a name says
otherwise; sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ouassister.access import Access as Access
from ouassister.guest_model import BlockDevice as BlockDevice
from ouassister.guest_model import Cgroup as Cgroup
from ouassister.guest_model import GuestPid as GuestPid
from ouassister.guest_model import HeldLock as HeldLock
from ouassister.guest_model import HostPid as HostPid
from ouassister.guest_model import MappedDevice as MappedDevice
from ouassister.guest_model import MappedLeg as MappedLeg
from ouassister.guest_model import MappedRange as MappedRange
from ouassister.guest_model import Module as Module
from ouassister.guest_model import Namespaces as Namespaces
from ouassister.guest_model import NetworkDevice as NetworkDevice
from ouassister.guest_model import OpenFile as OpenFile
from ouassister.guest_model import PhysAddr as PhysAddr
from ouassister.guest_model import ProcessFiles as ProcessFiles
from ouassister.guest_model import ProcessMaps as ProcessMaps
from ouassister.guest_model import Socket as Socket
from ouassister.guest_model import Sockets as Sockets
from ouassister.guest_model import Subject as Subject
from ouassister.guest_model import SuperBlock as SuperBlock
from ouassister.guest_model import SwapArea as SwapArea
from ouassister.guest_model import Sysctl as Sysctl
from ouassister.guest_model import TaskDetail as TaskDetail
from ouassister.guest_model import Tmpfs as Tmpfs
from ouassister.guest_model import TmpfsContent as TmpfsContent
from ouassister.guest_model import TmpfsNode as TmpfsNode
from ouassister.guest_model import VirtAddr as VirtAddr
from ouassister.guest_model import Vma as Vma
from ouassister.partial_model import Portions as Portions
from ouassister.restart_model import WRITE_FILE as WRITE_FILE
from ouassister.restart_model import Action as Action
from ouassister.restart_model import Exposed as Exposed
from ouassister.restart_model import Restart as Restart
from ouassister.restart_model import Verdict as Verdict

# --- state: the saved VM -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileStamp:
    """One host file as it was when looked at.

    ``sample_sha256`` covers the size and 64 blocks of 4 KiB at even distances, so that a file
    whose times were put back is still told apart when it differs there.
    """

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    sample_sha256: str


@dataclass(frozen=True, slots=True)
class Fence:
    """Binds what is made to one suspension: the save file and every disk with its backing files."""

    save: FileStamp
    disks: tuple[FileStamp, ...]


# --- kernel: the guest as its kernel knows it ----------------------------------------------


@dataclass(frozen=True, slots=True)
class Uts:
    """``struct new_utsname`` of the guest's initial namespace."""

    sysname: str
    nodename: str
    release: str
    version: str
    machine: str
    domainname: str


@dataclass(frozen=True, slots=True)
class Task:
    """One process (thread group leader). Kernel threads have no ``exe``."""

    pid: GuestPid
    parent: GuestPid
    comm: bytes
    state: str
    uid: int
    exe: bytes | None
    cmdline: tuple[bytes, ...]
    start_ns: int  # since boot
    kernel_thread: bool
    detail: TaskDetail | None = None  # when it was asked for


@dataclass(frozen=True, slots=True)
class BlockRange:
    """The part of a disk that a block device is, as the guest's kernel knows it."""

    disk: str  # the whole disk's name in the guest, "vda"
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount of init's namespace. ``block`` is None for a file system without a disk.

    ``root`` is the part of the file system that is mounted: not "/" for bind mounts and
    subvolumes. ``number`` and ``parent`` are as in /proc/1/mountinfo.
    """

    source: bytes
    target: bytes
    fstype: str
    major: int
    minor: int
    read_only: bool
    block: BlockRange | None = None
    root: bytes = b"/"
    number: int = 0
    parent: int = 0


@dataclass(frozen=True, slots=True)
class GuestView:
    """What the sleeping kernel knows. Everything in it comes from the save file alone."""

    uts: Uts
    boot_id: str  # as /proc/sys/kernel/random/boot_id prints it; "" when not found
    suspended_at_s: int  # guest wall clock, seconds since the epoch
    uptime_s: int
    cpus: int
    memory_bytes: int
    tasks: tuple[Task, ...]
    mounts: tuple[Mount, ...]
    degraded: tuple[str, ...] = ()  # what this kernel does not tell, by name
    # None: not asked for (see Subject), or named in ``degraded``.
    maps: tuple[ProcessMaps, ...] | None = None
    files: tuple[ProcessFiles, ...] | None = None
    held_locks: tuple[HeldLock, ...] | None = None
    superblocks: tuple[SuperBlock, ...] | None = None
    block_devices: tuple[BlockDevice, ...] | None = None
    mapped_devices: tuple[MappedDevice, ...] | None = None
    network_devices: tuple[NetworkDevice, ...] | None = None
    sockets: Sockets | None = None
    modules: tuple[Module, ...] | None = None
    swaps: tuple[SwapArea, ...] | None = None
    sysctls: tuple[Sysctl, ...] | None = None
    tmpfs: tuple[Tmpfs, ...] | None = None
    tmpfs_content: tuple[TmpfsContent, ...] | None = None


# --- packages: plan and run ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackageChange:
    """One package that changes. ``old`` is empty for a new one, ``new`` for a removed one."""

    name: str
    architecture: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Archive:
    """One archive, fetched or to be fetched. ``digest`` is ``ALGORITHM:hex``, as the index says."""

    package: str
    url: str
    file_name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; no packages means a full upgrade."""

    install: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A package that was asked for or pending and is not in the change set, and why."""

    package: str
    reason: str


class Mode(StrEnum):
    """By whom a package is installed."""

    EMULATED = "emulated"  # by the guest's updater, on the host, while the guest sleeps
    STAGED = "staged"  # by the guest's own dpkg, after the resume, behind the closed gate


@dataclass(frozen=True, slots=True)
class PackageMode:
    """How a package of an update is installed; staged ones say why."""

    name: str
    architecture: str
    mode: Mode
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an update would do; nothing has run. ``plan_id`` hashes everything else.

    ``predicted`` names changes that will perhaps be staged: a guess, by what is known without
    running anything.
    """

    plan_id: str
    vm: str
    fence: Fence
    request: Request
    changes: tuple[PackageChange, ...]
    archives: tuple[Archive, ...]
    left_out: tuple[LeftOut, ...]
    download_bytes: int
    predicted: tuple[PackageMode, ...] = ()
    channel: str = ""  # that the resume will use
    notes: tuple[str, ...] = ()  # what is to be told of the channel and of the links


class Kind(StrEnum):
    """What an entry of a change set leaves at its path."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    HARDLINK = "hardlink"  # to ``target``, an earlier entry of this change set
    FIFO = "fifo"
    CHAR = "char"
    BLOCK = "block"
    DELETE = "delete"  # nothing: the path is removed, with all that is below it


@dataclass(frozen=True, slots=True)
class Expected:
    """What must stand at a path before it is touched; the guest must not have changed it.

    ``mode`` holds type and permission bits. Directories are compared by inode and mode alone,
    except below a deletion, where their times tell whether an entry came or went.
    """

    inode: int
    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One path that the update changed.

    ``expected`` is None when nothing may stand at the path. ``below`` lists what must be below a
    deleted directory. ``same``: the guest has it but for its time, and the layer has it not.
    ``holes``: bytes of a sparse file that are whole blocks of zeros; the layer has them.
    """

    path: bytes
    kind: Kind
    expected: Expected | None
    mode: int = 0  # permission bits, with setuid, setgid and sticky
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    sha256: str = ""
    offset: int = 0  # of a file's bytes in the layer
    target: bytes = b""  # of a symlink or hard link
    major: int = 0
    minor: int = 0
    xattrs: tuple[tuple[str, bytes], ...] = ()
    below: tuple[tuple[bytes, Expected], ...] = ()
    same: bool = False
    holes: int = 0


@dataclass(frozen=True, slots=True)
class Staged:
    """A package that the guest's own dpkg installs, or removes when ``new`` is empty.

    ``file`` is its archive's name in ``Changeset.staging_folder``, where it is an entry as any
    other. ``requested`` tells that somebody asked for it by name.
    """

    name: str
    architecture: str
    old: str
    new: str
    file: str
    size: int
    sha256: str
    requested: bool
    reason: str


class StepKind(StrEnum):
    """What one call of dpkg does."""

    INSTALL = "install"
    UNPACK = "unpack"
    CONFIGURE = "configure"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class StagedStep:
    """One call of dpkg in the guest; ``packages`` are indexes of ``Changeset.staged``."""

    kind: StepKind
    packages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """The one guest that a change set may be applied to."""

    boot_id: str
    machine_id: str


@dataclass(frozen=True, slots=True)
class Changeset:
    """Immutable; ``changeset_id`` is the SHA-256 of the manifest without it.

    Every byte of the layer is covered: each file by its entry's SHA-256, the whole by
    ``layer_sha256``. ``out_of_reach`` has units of the actions that nobody on a network reaches.
    ``instead_of`` is the id of the one that this one stands in for when that meets a conflict, and
    ``portions`` what of that belongs to which package.
    """

    changeset_id: str
    vm: str
    created_at_s: int
    fence: Fence
    identity: Identity
    changes: tuple[PackageChange, ...]
    left_out: tuple[LeftOut, ...]
    entries: tuple[Entry, ...]
    actions: tuple[Action, ...]
    lock_paths: tuple[bytes, ...]  # the package manager's locks, in its own order
    layer_sha256: str
    layer_size: int
    reboot_needed: bool
    filtered: tuple[bytes, ...]  # changed in the shadow and left out on purpose
    notes: tuple[str, ...] = field(default=())
    restarts: tuple[Restart, ...] = field(default=())
    staged: tuple[Staged, ...] = field(default=())
    staged_steps: tuple[StagedStep, ...] = field(default=())  # in the order of the guest's apt
    staging_folder: bytes = b""
    access: Access = field(default=Access())
    out_of_reach: tuple[str, ...] = ()
    instead_of: str = ""
    portions: Portions | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """One step of a run and how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What an update did while the VM slept.

    ``changeset_id`` is empty when there was nothing to do. ``offline_s`` is everything but
    fetching lists and archives, which is ``download_s``.
    """

    vm: str
    plan_id: str
    changeset_id: str
    changes: tuple[PackageChange, ...]
    left_out: tuple[LeftOut, ...]
    files: int
    deletions: int
    layer_bytes: int
    actions: tuple[Action, ...]
    filtered: tuple[bytes, ...]
    reboot_needed: bool
    restarts: tuple[Restart, ...]
    notes: tuple[str, ...]
    phases: tuple[Phase, ...]
    offline_s: float
    download_s: float
    modes: tuple[PackageMode, ...] = ()  # of each change
    channel: str = ""  # that the resume will use
    fallback_id: str = ""  # what a resume may use instead when paths conflict
    fallback_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StagedState:
    """What the guest's dpkg says of a staged package once it was installed."""

    name: str
    architecture: str
    version: str
    status: str


class Gate(StrEnum):
    """What is done before the links go up; the files always are."""

    FULL = "full"  # everything
    EXPOSED = "exposed"  # the end of what is old and can be reached; the rest goes on


@dataclass(frozen=True, slots=True)
class Differing:
    """A path of the guest that is not as it was left, or as it was expected; and how."""

    path: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """What a resume did.

    ``online_s`` runs from the guest's first instruction to the open gate, ``settled_s`` to the end
    of what followed it (`Gate`). ``verified`` lists what was checked in the guest, and nothing
    else. ``fell_back`` are packages that the guest's own dpkg installed since paths conflicted.
    """

    vm: str
    changeset_id: str
    result: str
    files: int
    bytes: int
    failed_actions: tuple[str, ...]
    verified: tuple[str, ...]
    reboot_needed: bool
    notes: tuple[str, ...]
    phases: tuple[Phase, ...]
    guest_phases: tuple[Phase, ...]
    restore_s: float
    online_s: float
    staged: tuple[StagedState, ...] = ()
    gate: Gate = Gate.FULL
    settled_s: float = 0.0
    conflicts: tuple[Differing, ...] = ()
    fell_back: tuple[PackageMode, ...] = ()


@dataclass(frozen=True, slots=True)
class RollbackReport:
    """What a rollback did.

    ``files`` counts entries of the change set that were taken back, ``left`` has the paths that
    were not. ``closed_s`` runs from closing the links to opening them.
    """

    vm: str
    changeset_id: str
    result: str
    files: int
    left: tuple[Differing, ...]
    changes: tuple[PackageChange, ...]  # from what was old to what was new; both are back
    failed_actions: tuple[str, ...]
    notes: tuple[str, ...]
    phases: tuple[Phase, ...]
    guest_phases: tuple[Phase, ...]
    closed_s: float
