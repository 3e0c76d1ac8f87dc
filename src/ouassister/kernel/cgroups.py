"""Control groups of a process, and the systemd unit that a path means.

Source: Linux v6.1 ``include/linux/cgroup-defs.h`` (``struct css_set``, ``struct cgroup_root``),
``kernel/cgroup/cgroup.c`` (``proc_cgroup_show``), ``include/linux/kernfs.h``; the parent of a
``kernfs_node`` is ``__parent`` since 633488947ef6 ("kernfs: Use RCU to access
kernfs_node::parent.", v6.15). systemd v252 ``src/basic/cgroup-util.c`` (``cg_path_get_unit``,
``cg_path_get_user_unit``, ``cg_unescape``), ``src/basic/unit-name.c`` (``unit_name_is_valid``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import Cgroup
from ouassister.kernel import walk
from ouassister.kernel.fields import Fields, has_member, offset, read_string, read_word
from ouassister.kernel.program import guest_reads
from ouassister.text import to_text

if TYPE_CHECKING:
    from drgn import Object

    from ouassister.kernel.program import Kernel

_MAX_DEPTH: Final = 512
_MAX_HIERARCHIES: Final = 256
_MAX_SUBSYSTEMS: Final = 32
_NAME_MAX: Final = 255
_UNIT_NAME_MAX: Final = 256
_TYPES: Final = b"service|mount|swap|socket|target|device|automount|timer|path|slice|scope"
_CHARS: Final = rb"[0-9A-Za-z:\-_.\\]"
_UNIT: Final = re.compile(
    rb"(?P<name>%s+)(?P<at>@[0-9A-Za-z:\-_.\\@]+)?\.(?:%s)" % (_CHARS, _TYPES)
)
_USER_MANAGER: Final = re.compile(rb"user@\d+\.service")
_SESSION: Final = re.compile(rb"session-[0-9A-Za-z]+\.scope")


class Cgroups:
    """The control groups of this kernel's processes; each ``struct css_set`` is read once.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._set = Fields(kernel, "struct css_set", "dfl_cgrp")
        self._links = offset(kernel, "struct css_set", "cgrp_links")
        self._link = Fields(kernel, "struct cgrp_cset_link", "cgrp")
        self._link_node = offset(kernel, "struct cgrp_cset_link", "cgrp_link")
        self._cgroup = Fields(kernel, "struct cgroup", "kn", "root")
        self._root = Fields(kernel, "struct cgroup_root", "subsys_mask", "hierarchy_id", "name")
        parent = "__parent" if has_member(kernel, "struct kernfs_node", "__parent") else "parent"
        self._node = Fields(kernel, "struct kernfs_node", parent, "name")
        self._sets: dict[int, tuple[Cgroup, ...]] = {}

    def of(self, task: Object) -> tuple[Cgroup, ...]:
        """Return where a ``struct task_struct`` is in each hierarchy, the unified one first."""
        with guest_reads("reading the control groups of a process"):
            css_set = task.cgroups.value_()
            found = self._sets.get(css_set)
            if found is None:
                found = self._sets[css_set] = self._read(css_set)
            return found

    def _read(self, css_set: int) -> tuple[Cgroup, ...]:
        (default,) = self._set.read(css_set)
        found = {}
        for node in walk.list_nodes(self._kernel, css_set + self._links, _MAX_HIERARCHIES):
            (cgroup,) = self._link.read(node - self._link_node)
            kn, root = self._cgroup.read(cgroup)
            mask, hierarchy, name = self._root.read(root)
            if cgroup == default:
                hierarchy = 0
            controllers = [] if cgroup == default else self._controllers(mask)
            text = name.partition(b"\0")[0]
            if text:
                controllers.append("name=" + to_text(text))
            found[hierarchy] = Cgroup(hierarchy, ",".join(controllers), self._path(kn))
        return tuple(found[key] for key in sorted(found))

    def _controllers(self, mask: int) -> list[str]:
        table = self._kernel.symbols.address("cgroup_subsys")
        if table is None or not mask:
            return []
        legacy = offset(self._kernel, "struct cgroup_subsys", "legacy_name")
        names = []
        for index in range(_MAX_SUBSYSTEMS):
            if mask >> index & 1:
                subsystem = read_word(self._kernel, table + index * 8)
                pointer = read_word(self._kernel, subsystem + legacy)
                names.append(to_text(read_string(self._kernel, pointer, 64)))
        return names

    def _path(self, node: int) -> bytes:
        parts: list[bytes] = []
        for _ in range(_MAX_DEPTH):
            parent, name = self._node.read(node)
            if not parent:
                return b"/" + b"/".join(reversed(parts))
            parts.append(read_string(self._kernel, name, _NAME_MAX))
            node = parent
        raise CorruptGuestError(f"a control group lies more than {_MAX_DEPTH} levels deep")


def unit_of(path: bytes) -> bytes:
    """Return the unit of the system's manager that a cgroup path means; empty for none."""
    _, rest = _skip_slices(path)
    unit = _decode(rest[0]) if rest else b""
    return b"" if unit.endswith(b".slice") else unit


def user_unit_of(path: bytes) -> bytes:
    """Return the unit of a user's manager that a cgroup path means; empty for none."""
    _, rest = _skip_slices(path)
    if not rest or not (_USER_MANAGER.fullmatch(rest[0]) or _SESSION.fullmatch(rest[0])):
        return b""
    return unit_of(b"/".join(rest[1:]))


def slice_of(path: bytes) -> bytes:
    """Return the innermost of the leading slices; ``-.slice`` when there is none."""
    slices, _ = _skip_slices(path)
    return slices[-1] if slices else b"-.slice"


def _skip_slices(path: bytes) -> tuple[list[bytes], list[bytes]]:
    parts = [part for part in path.split(b"/") if part]
    for index, part in enumerate(parts):
        if not (part.endswith(b".slice") and b"@" not in part and _decode(part)):
            return [_decode(one) for one in parts[:index]], parts[index:]
    return [_decode(one) for one in parts], []


def _decode(part: bytes) -> bytes:
    """Undo the escaping of names that the kernel's own files would clash with; empty if no unit."""
    unit = part.removeprefix(b"_")
    return unit if len(unit) < _UNIT_NAME_MAX and _UNIT.fullmatch(unit) else b""
