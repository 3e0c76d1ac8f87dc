"""Mounts with everything that /proc/PID/mountinfo says of them, options included.

Source: Linux v6.1 ``fs/proc_namespace.c`` (``show_mountinfo``, ``show_sb_opts``,
``show_mnt_opts``), ``fs/mount.h``, ``fs/pnode.h``, ``include/linux/mount.h`` (``MNT_*``),
``mm/shmem.c`` (``shmem_show_options``), ``fs/devpts/inode.c`` (``devpts_show_options``),
``kernel/cgroup/cgroup.c`` (``cgroup_show_options``), ``fs/hugetlbfs/inode.c``
(``hugetlbfs_show_options``), ``fs/ramfs/inode.c``, ``kernel/bpf/inode.c``,
``fs/autofs/inode.c`` (``autofs_show_options``), ``fs/ext4/super.c``
(``_ext4_show_options``). Propagation is in ``mnt_t_flags`` on newer kernels (seen in 7.3), in
``mnt_flags`` before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from drgn import Object

from ouassister.errors import UnsupportedGuestError
from ouassister.kernel.fields import has_member, labels, read_word, variable
from ouassister.kernel.modules import module_types, struct
from ouassister.kernel.mounts import read_mounts, read_namespace
from ouassister.kernel.program import guest_reads
from ouassister.model import Mount

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.kernel.program import Kernel

_MOUNT_FLAGS: Final = (
    (0x01, "nosuid"), (0x02, "nodev"), (0x04, "noexec"), (0x08, "noatime"), (0x10, "nodiratime"),
    (0x20, "relatime"), (0x80, "nosymfollow"),
)  # fmt: skip
_MNT_READONLY: Final = 0x40
_MNT_SHARED, _MNT_UNBINDABLE = 0x1000, 0x2000
_T_SHARED, _T_UNBINDABLE = 1, 2
_SB_FLAGS: Final = ((0x10, "sync"), (0x80, "dirsync"), (0x40, "mand"), (1 << 25, "lazytime"))
_SB_RDONLY: Final = 1
_NR_UNIX98_PTY_MAX: Final = 1 << 20
_EXT4_ERRORS: Final = ((0x10, 1, "continue"), (0x20, 2, "remount-ro"), (0x40, 3, "panic"))
_HZ: Final = 250  # as Debian and most build it; nobody sets this timeout but an administrator
_EXT4_DISCARD: Final = 0x40000000


@dataclass(frozen=True, slots=True)
class MountLine:
    """One mount. ``told`` is false where options of its type of file system are not known."""

    mount: Mount
    options: tuple[str, ...]  # of the mount, "ro" or "rw" first
    propagation: tuple[str, ...]
    super_options: tuple[str, ...]  # of the file system, "ro" or "rw" first
    flags: int  # how many of ``super_options`` are the kernel's own
    told: bool


class MountTables:
    """The mounts that processes see; each namespace is read once for each root in it.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._tables: dict[tuple[int, int, int], tuple[MountLine, ...]] = {}

    def of(self, task: Object) -> tuple[MountLine, ...]:
        """Describe the mounts that a ``struct task_struct`` sees, which is no zombie."""
        with guest_reads("looking for the mounts of a process"):
            root = task.fs.root
            namespace = task.nsproxy.mnt_ns.value_()
            key = (namespace, root.mnt.value_(), root.dentry.value_())
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = _read(self._kernel, task)
        return found


def _read(kernel: Kernel, task: Object) -> tuple[MountLine, ...]:
    namespace = read_namespace(kernel, task)
    described = read_mounts(kernel, namespace)
    with guest_reads("reading the options of mounts"):
        return tuple(
            _line(kernel, mount, about)
            for (_, mount), about in zip(namespace.mounts, described, strict=True)
        )


def _line(kernel: Kernel, mount: Object, about: Mount) -> MountLine:
    flags = mount.mnt.mnt_flags.value_()
    sb = mount.mnt.mnt_sb.read_()
    own = ["ro" if flags & _MNT_READONLY else "rw"]
    own += [name for bit, name in _MOUNT_FLAGS if flags & bit]
    sb_flags = sb.s_flags.value_()
    of_super = ["ro" if sb_flags & _SB_RDONLY else "rw"]
    of_super += [name for bit, name in _SB_FLAGS if sb_flags & bit]
    show = _OPTIONS.get(about.fstype)
    extra = show(kernel, sb) if show is not None else ()
    return MountLine(
        mount=dataclasses.replace(about, read_only=bool(flags & _MNT_READONLY)),
        options=tuple(own),
        propagation=_propagation(kernel, mount, flags),
        super_options=(*of_super, *(extra or ())),
        flags=len(of_super),
        told=extra is not None and (show is not None or about.fstype in _PLAIN),
    )


def _propagation(kernel: Kernel, mount: Object, flags: int) -> tuple[str, ...]:
    if has_member(kernel, "struct mount", "mnt_t_flags"):
        of_tree = mount.mnt_t_flags.value_()
        shared, unbindable = of_tree & _T_SHARED, of_tree & _T_UNBINDABLE
    else:
        shared, unbindable = flags & _MNT_SHARED, flags & _MNT_UNBINDABLE
    found = [f"shared:{mount.mnt_group_id.value_()}"] if shared else []
    master = mount.mnt_master.read_()
    if master:
        found.append(f"master:{master.mnt_group_id.value_()}")
    if unbindable:
        found.append("unbindable")
    return tuple(found)


# --- options of types of file systems --------------------------------------------------------
# None: the type is not described by this kernel (a module that is not loaded).


def _tmpfs(kernel: Kernel, sb: Object) -> tuple[str, ...]:
    info = _info(kernel, sb, "struct shmem_sb_info")
    total = read_word(kernel, variable(kernel, "_totalram_pages"))
    found = []
    blocks, inodes = info.max_blocks.value_(), info.max_inodes.value_()
    if blocks != total // 2:
        found.append(f"size={blocks * 4}k")
    if inodes != total // 2:
        found.append(f"nr_inodes={inodes}")
    if info.mode.value_() != 0o1777:
        found.append(f"mode={info.mode.value_():03o}")
    found += _owner(info)
    if info.full_inums.value_():  # not there without CONFIG_TMPFS_INODE64
        found.append("inode64")
    return tuple(found)


def _ramfs(kernel: Kernel, sb: Object) -> tuple[str, ...]:
    mode = _info(kernel, sb, "struct ramfs_fs_info").mount_opts.mode.value_()
    return () if mode == 0o755 else (f"mode={mode:o}",)


def _bpf(_kernel: Kernel, sb: Object) -> tuple[str, ...]:
    mode = sb.s_root.d_inode.i_mode.value_() & 0o6777
    return () if mode == 0o777 else (f"mode={mode:o}",)


def _devpts(kernel: Kernel, sb: Object) -> tuple[str, ...]:
    options = _info(kernel, sb, "struct pts_fs_info").mount_opts
    found = []
    for name in ("uid", "gid"):
        if getattr(options, f"set{name}").value_():
            found.append(f"{name}={getattr(options, name).val.value_()}")
    found.append(f"mode={options.mode.value_():03o}")
    found.append(f"ptmxmode={options.ptmxmode.value_():03o}")
    if options.max.value_() < _NR_UNIX98_PTY_MAX:
        found.append(f"max={options.max.value_()}")
    return tuple(found)


def _cgroup2(kernel: Kernel, _sb: Object) -> tuple[str, ...]:
    kind = kernel.type("struct cgroup_root")
    root = _object(kernel, kind, variable(kernel, "cgrp_dfl_root"))
    flags = root.flags.value_()
    bits = labels(kernel.prog.constant("CGRP_ROOT_NS_DELEGATE").type_)  # it has no name
    found = []
    for name, enumerator in (("nsdelegate", "CGRP_ROOT_NS_DELEGATE"),
                             ("favordynmods", "CGRP_ROOT_FAVOR_DYNMODS"),
                             ("memory_localevents", "CGRP_ROOT_MEMORY_LOCAL_EVENTS"),
                             ("memory_recursiveprot", "CGRP_ROOT_MEMORY_RECURSIVE_PROT"),
                             ("memory_hugetlb_accounting", "CGRP_ROOT_MEMORY_HUGETLB_ACCOUNTING"),
                             ("pids_localevents", "CGRP_ROOT_PIDS_LOCAL_EVENTS")):  # fmt: skip
        if flags & bits.get(enumerator, 0):  # not every kernel has every option
            found.append(name)
    return tuple(found)


def _hugetlbfs(kernel: Kernel, sb: Object) -> tuple[str, ...]:
    info = _info(kernel, sb, "struct hugetlbfs_sb_info")
    found = _owner(info)
    if info.mode.value_() != 0o755:
        found.append(f"mode={info.mode.value_():o}")
    size = 4096 << info.hstate.order.value_()
    found.append(f"pagesize={size >> 20}M" if size >= 1 << 20 else f"pagesize={size >> 10}K")
    return tuple(found)


def _autofs(kernel: Kernel, sb: Object) -> tuple[str, ...] | None:
    kind = kernel.types.struct("autofs_sb_info")
    if kind is None:
        try:
            kind = struct(module_types(kernel, "autofs4"), "autofs_sb_info")
        except UnsupportedGuestError:
            return None
    info = _object(kernel, kind, sb.s_fs_info.value_())
    kinds = {1: "indirect", 2: "direct", 4: "offset"}  # include/uapi/linux/auto_fs.h
    pipe = info.pipe.read_()
    group = info.oz_pgrp.read_()
    level = group.numbers[0].nr.value_() if group else 0
    found = [
        f"fd={info.pipefd.value_()}",
        *_owner(_object(kernel, kernel.type("struct inode"), sb.s_root.d_inode.value_()), "i_"),
        f"pgrp={level}",
        f"timeout={info.exp_timeout.value_() // _HZ}",
        f"minproto={info.min_proto.value_()}",
        f"maxproto={info.max_proto.value_()}",
        kinds.get(info.type.value_(), "indirect"),
        f"pipe_ino={pipe.f_inode.i_ino.value_()}" if pipe else "pipe_ino=-1",
    ]
    return tuple(found)


def _ext4(kernel: Kernel, sb: Object) -> tuple[str, ...] | None:
    """Show how errors are met, and discard; other options that an administrator may set are not."""
    if kernel.types.struct("ext4_sb_info") is None:
        return None
    info = _info(kernel, sb, "struct ext4_sb_info")
    options = info.s_mount_opt.value_()
    default = info.s_es.s_errors.value_()
    found = []
    for bit, number, name in _EXT4_ERRORS:
        if options & bit and default != number:
            found.append(f"errors={name}")
    if options & _EXT4_DISCARD:
        found.append("discard")
    return tuple(found)


_OPTIONS: Final[dict[str, Callable[[Any, Any], tuple[str, ...] | None]]] = {
    "tmpfs": _tmpfs,
    "devtmpfs": _tmpfs,
    "devpts": _devpts,
    "cgroup2": _cgroup2,
    "hugetlbfs": _hugetlbfs,
    "autofs": _autofs,
    "bpf": _bpf,
    "ramfs": _ramfs,
    "ext4": _ext4,
}
# Types that show no options by default.
_PLAIN: Final = frozenset(
    ("proc", "sysfs", "mqueue", "debugfs", "tracefs", "securityfs", "configfs", "fusectl",
     "pstore", "binfmt_misc", "efivarfs", "rpc_pipefs", "nfsd", "squashfs")
)  # fmt: skip


def _owner(info: Object, prefix: str = "") -> list[str]:
    found = []
    for name in ("uid", "gid"):
        number = getattr(info, prefix + name).val.value_()
        if number:
            found.append(f"{name}={number}")
    return found


def _info(kernel: Kernel, sb: Object, kind: str) -> Object:
    return _object(kernel, kernel.type(kind), sb.s_fs_info.value_())


def _object(kernel: Kernel, kind: Any, address: int) -> Object:  # noqa: ANN401 - a type of drgn
    return Object(kernel.prog, kind, address=address)
