"""Namespaces of a process, as /proc/PID/ns shows them.

Source: Linux v6.1 ``include/linux/nsproxy.h``, ``include/linux/ns_common.h``,
``kernel/pid.c`` (``task_active_pid_ns``), ``kernel/user_namespace.c`` (``userns_get``: the one of
the effective credentials).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister.guest_model import Namespaces, VirtAddr
from ouassister.kernel.fields import Fields, offset, read_word
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from drgn import Object

    from ouassister.kernel.program import Kernel


class NamespaceNumbers:
    """Numbers of namespaces; each ``struct nsproxy`` is read once.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._proxy = Fields(kernel, "struct nsproxy", "cgroup_ns", "ipc_ns", "mnt_ns", "net_ns",
                             "time_ns", "uts_ns")  # fmt: skip
        self._inum = {
            name: offset(kernel, f"struct {name}", "ns.inum")
            for name in ("cgroup_namespace", "ipc_namespace", "mnt_namespace", "net",
                         "time_namespace", "uts_namespace", "pid_namespace", "user_namespace")
        }  # fmt: skip
        self._pid = Fields(kernel, "struct pid", "level")
        self._numbers = offset(kernel, "struct pid", "numbers")
        self._upid_size: int = kernel.type("struct upid").size
        self._upid_ns = offset(kernel, "struct upid", "ns")
        self._seen: dict[int, tuple[int, ...]] = {}

    def of(self, task: Object) -> Namespaces | None:
        """Return the numbers of a ``struct task_struct``'s namespaces; None for a zombie."""
        with guest_reads("reading the namespaces of a process"):
            proxy = task.nsproxy.value_()
            if not proxy:
                return None
            if proxy not in self._seen:
                self._seen[proxy] = tuple(
                    self._number(kind, at)
                    for kind, at in zip(
                        ("cgroup_namespace", "ipc_namespace", "mnt_namespace", "net",
                         "time_namespace", "uts_namespace"),
                        self._proxy.read(proxy), strict=True,
                    )
                )  # fmt: skip
            cgroup, ipc, mnt, net, time, uts = self._seen[proxy]
            pid = task.thread_pid.value_()
            (level,) = self._pid.read(pid)
            of_pid = read_word(
                self._kernel,
                pid + self._numbers + min(level, 32) * self._upid_size + self._upid_ns,
            )
            return Namespaces(
                cgroup=cgroup,
                ipc=ipc,
                mnt=mnt,
                net=net,
                pid=self._number("pid_namespace", of_pid),
                time=time,
                user=self._number("user_namespace", task.real_cred.user_ns.value_()),
                uts=uts,
            )

    def _number(self, kind: str, address: int) -> int:
        if not address:
            return 0
        raw = self._kernel.virtual.read(VirtAddr(address + self._inum[kind]), 4)
        return int.from_bytes(raw, "little")
