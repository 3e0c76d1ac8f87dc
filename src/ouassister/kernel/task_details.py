"""What more there is to know of a process than its name.

Source: Linux v6.1 ``include/linux/sched.h`` (``struct task_struct``),
``include/linux/sched/signal.h`` (``thread_head``), ``include/linux/cred.h``,
``include/linux/fs_struct.h``.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import GuestPid, TaskDetail, VirtAddr
from ouassister.kernel import walk
from ouassister.kernel.cgroups import Cgroups, slice_of, unit_of, user_unit_of
from ouassister.kernel.fields import Fields, offset
from ouassister.kernel.namespaces import NamespaceNumbers
from ouassister.kernel.program import guest_reads
from ouassister.text import to_text

if TYPE_CHECKING:
    from drgn import Object

    from ouassister.kernel.file_names import FileNames
    from ouassister.kernel.program import Kernel

_MAX_THREADS: Final = 1 << 17
_NGROUPS_MAX: Final = 65536


class TaskDetails:
    """Details of this kernel's processes.

    Args:
        kernel: The kernel.
        names: Names of files.
    """

    def __init__(self, kernel: Kernel, names: FileNames) -> None:
        self._kernel = kernel
        self._names = names
        self._namespaces = NamespaceNumbers(kernel)
        self._cgroups = Cgroups(kernel)
        self._task = Fields(kernel, "struct task_struct", "pid", "tgid", "real_cred", "fs",
                            "signal")  # fmt: skip
        self._cred = Fields(kernel, "struct cred", "gid.val", "euid.val", "egid.val", "group_info")
        self._fs = Fields(kernel, "struct fs_struct", "root.mnt", "root.dentry", "pwd.mnt",
                          "pwd.dentry")  # fmt: skip
        self._groups = Fields(kernel, "struct group_info", "ngroups")
        self._first_group = offset(kernel, "struct group_info", "gid")
        self._head = offset(kernel, "struct signal_struct", "thread_head")
        self._node = offset(kernel, "struct task_struct", "thread_node")
        self._pid = Fields(kernel, "struct task_struct", "pid")

    def of(self, task: Object) -> TaskDetail:
        """Describe a ``struct task_struct`` that leads its thread group.

        Raises:
            CorruptGuestError: A list does not end, or a count is absurd.
        """
        with guest_reads("reading the details of a process"):
            _, tgid, cred, fs, signal = self._task.read(task.address_)
            gid, euid, egid, groups = self._cred.read(cred)
            cwd = root = None
            if fs:  # a zombie has none
                root_mnt, root_dentry, cwd_mnt, cwd_dentry = self._fs.read(fs)
                root = self._names.path(root_mnt, root_dentry)
                cwd = self._names.path(cwd_mnt, cwd_dentry)
            cgroups = self._cgroups.of(task)
            path = cgroups[0].path if cgroups else b"/"
            for one in cgroups:  # systemd's own hierarchy, where there is one
                if one.controllers == "name=systemd":
                    path = one.path
            return TaskDetail(
                tgid=GuestPid(tgid),
                threads=tuple(
                    GuestPid(self._pid.read(node - self._node)[0])
                    for node in walk.list_nodes(self._kernel, signal + self._head, _MAX_THREADS)
                ),
                gid=gid,
                euid=euid,
                egid=egid,
                groups=self._supplementary(groups),
                cwd=cwd,
                root=root,
                namespaces=self._namespaces.of(task),
                cgroups=cgroups,
                unit=to_text(unit_of(path)),
                user_unit=to_text(user_unit_of(path)),
                slice=to_text(slice_of(path)),
            )

    def _supplementary(self, groups: int) -> tuple[int, ...]:
        (count,) = self._groups.read(groups)
        if not 0 <= count <= _NGROUPS_MAX:
            raise CorruptGuestError(f"a process is in {count} groups")
        raw = self._kernel.virtual.read(VirtAddr(groups + self._first_group), count * 4)
        return struct.unpack(f"<{count}I", raw)
