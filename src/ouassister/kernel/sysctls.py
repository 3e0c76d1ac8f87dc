"""Values below /proc/sys, found by walking the tables that modules registered.

What kind of value an entry has, only the function that prints it tells (``proc_handler``). The
plain ones are known; for the others the value is not told, and why is.

Source: Linux v6.1 ``fs/proc/proc_sysctl.c`` (``sysctl_table_root``), ``include/linux/sysctl.h``,
``kernel/sysctl.c`` (``proc_do*``), ``kernel/utsname_sysctl.c``. The number of entries of a table
is ``ctl_table_size`` since e7b2cdf4d9e5 ("sysctl: Add ctl_table_size to ctl_table_header", v6.6).
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.guest_model import Sysctl, VirtAddr
from ouassister.kernel.fields import Fields, has_member, offset, read_string, variable
from ouassister.kernel.program import guest_reads
from ouassister.kernel.sysctl_handlers import HANDLERS, VARIABLES, Kind
from ouassister.kernel.time import read_clocks
from ouassister.memory import NotMappedError
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.program import Kernel

_MAX_ENTRIES: Final = 1 << 16
_MAX_DEPTH: Final = 12
_MAX_VALUE: Final = 4096
_S_IFMT, _S_IFDIR, _S_IFLNK = 0o170000, 0o040000, 0o120000

_SIZES: Final = {
    Kind.INT: 4, Kind.UINT: 4, Kind.LONG: 8, Kind.U8: 1,
    Kind.JIFFIES: 4, Kind.MS_JIFFIES: 4, Kind.USER_JIFFIES: 4,
}  # fmt: skip
_SIGNED: Final = (Kind.INT, Kind.JIFFIES, Kind.MS_JIFFIES, Kind.USER_JIFFIES)
_PER_SECOND: Final = {Kind.JIFFIES: 1, Kind.MS_JIFFIES: 1000, Kind.USER_JIFFIES: 100}
_HZ: Final = (100, 250, 300, 1000)  # kernel/Kconfig.hz
_SECOND: Final = 1_000_000_000
# Tables that a namespace of init has for itself, beside the network's: variable, type, member.
# ipc: 1f5c135ee509 ("ipc: Store ipc sysctls in the ipc namespace", v5.19), before in the common
# ones; pid: v6.14.
_SETS: Final = (
    ("init_user_ns", "user_namespace", "set"),
    ("init_ipc_ns", "ipc_namespace", "ipc_set"),
    ("init_ipc_ns", "ipc_namespace", "mq_set"),
    ("init_pid_ns", "pid_namespace", "set"),
)
SYMBOLS: Final = (
    *HANDLERS, *(name for name, _, _ in VARIABLES.values()), "sysctl_table_root", "init_net",
    "jiffies_64", *(name for name, _, _ in _SETS),
)  # fmt: skip


class Sysctls:
    """The tables of one kernel.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._left = _MAX_ENTRIES
        kernel.symbols.learn(SYMBOLS)
        self._handlers: dict[int, Kind] = {
            address: kind
            for name, kind in HANDLERS.items()
            if (address := kernel.symbols.address(name)) is not None
        }
        self._ticks: int | None = None
        with guest_reads("reading the layout of sysctl"):
            self._node = Fields(kernel, "struct rb_node", "rb_right", "rb_left")
            self._ctl_node = Fields(kernel, "struct ctl_node", "header")
            self._node_size: int = kernel.type("struct ctl_node").size or 0
            self._header = Fields(kernel, "struct ctl_table_header", "ctl_table", "node")
            self._table = Fields(kernel, "struct ctl_table", "procname", "data", "maxlen", "mode",
                                 "proc_handler")  # fmt: skip
            self._table_size: int = kernel.type("struct ctl_table").size or 0
            self._root = offset(kernel, "struct ctl_dir", "root")
            self._dir_header = offset(kernel, "struct ctl_dir", "header")
            self._node_rb = offset(kernel, "struct ctl_node", "node")

    def read(self) -> tuple[Sysctl, ...]:
        """Describe each value that init would see, by name.

        Raises:
            CorruptGuestError: A table is cyclic, or there are too many.
        """
        kernel = self._kernel
        found: dict[str, Sysctl] = {}
        with guest_reads("reading the tables of sysctl"):
            tops = [
                variable(kernel, "sysctl_table_root")
                + offset(kernel, "struct ctl_table_root", "default_set.dir"),
                variable(kernel, "init_net") + offset(kernel, "struct net", "sysctls.dir"),
            ]
            for name, kind, member in _SETS:
                if has_member(kernel, f"struct {kind}", member):
                    tops.append(
                        variable(kernel, name) + offset(kernel, f"struct {kind}", f"{member}.dir")
                    )
            for top in tops:
                for one in self._directory(top, "", 0, set()):
                    found.setdefault(one.name, one)
        return tuple(found[name] for name in sorted(found))

    def _directory(
        self, directory: int, prefix: str, depth: int, seen: set[int]
    ) -> Iterator[Sysctl]:
        if depth > _MAX_DEPTH or directory in seen:
            raise CorruptGuestError("the tables of sysctl are too deep, or contain themselves")
        seen.add(directory)
        for node in self._nodes(directory + self._root):
            (header,) = self._ctl_node.read(node)
            tables, nodes = self._header.read(header)
            index, rest = divmod(node - nodes, self._node_size)
            if rest or not 0 <= index < _MAX_ENTRIES:
                raise CorruptGuestError(f"a sysctl entry at {node:#x} belongs to no table")
            name, data, size, mode, handler = self._table.read(tables + index * self._table_size)
            text = to_text(read_string(self._kernel, name, 256)).replace(".", "/")
            if mode & _S_IFMT == _S_IFDIR:
                below = header - self._dir_header
                yield from self._directory(below, f"{prefix}{text}.", depth + 1, seen)
            elif mode & _S_IFMT != _S_IFLNK and mode & 0o444:  # links lead to init_net's set
                yield self._entry(prefix + text, data, size, handler)

    def _nodes(self, root: int) -> Iterator[int]:
        """Yield the ``struct ctl_node`` of a directory, each once."""
        stack = [int.from_bytes(self._kernel.virtual.read(VirtAddr(root), 8), "little")]
        while stack:
            node = stack.pop()
            if not node:
                continue
            self._left -= 1
            if self._left < 0:
                raise CorruptGuestError(f"sysctl has more than {_MAX_ENTRIES} entries")
            stack += self._node.read(node)
            yield node - self._node_rb

    def _entry(self, name: str, data: int, size: int, handler: int) -> Sysctl:
        kind = self._handlers.get(handler)
        if name in VARIABLES:
            variable_name, kind, size = VARIABLES[name]
            data = self._kernel.symbols.address(variable_name) or 0
        if kind is None or not data:
            return Sysctl(name, None, "computed when it is read")
        try:
            return Sysctl(name, self._value(kind, data, size))
        except UnsupportedGuestError as error:
            return Sysctl(name, None, error.message)
        except (NotMappedError, PageAbsentError) as error:
            return Sysctl(name, None, str(error))

    def _value(self, kind: Kind, data: int, size: int) -> bytes:
        if kind is Kind.UUID:
            return str(uuid.UUID(bytes=self._kernel.virtual.read(VirtAddr(data), 16))).encode()
        if not 0 < size <= _MAX_VALUE:
            raise UnsupportedGuestError(f"it has {size} bytes")
        raw = self._kernel.virtual.read(VirtAddr(data), size)
        if kind is Kind.U8 and size == _SIZES[Kind.INT]:
            kind = Kind.INT  # as these were before they became smaller (v5.13 to v5.14)
        if kind is Kind.BOOL:  # its table may give it the size of an int (proc_dobool)
            return b"%d" % (raw[0] != 0)
        if kind is Kind.STRING:
            return raw.partition(b"\0")[0]
        width = _SIZES[kind]
        if size % width:
            raise UnsupportedGuestError(f"it has {size} bytes, not a multiple of {width}")
        numbers = [
            int.from_bytes(raw[at : at + width], "little", signed=kind in _SIGNED)
            for at in range(0, size, width)
        ]
        if kind in _PER_SECOND:
            numbers = [int(one * _PER_SECOND[kind] / self._ticks_per_second()) for one in numbers]
        return b"\t".join(b"%d" % number for number in numbers)

    def _ticks_per_second(self) -> int:
        """Return CONFIG_HZ, which no kernel keeps, from what its clocks have counted.

        ``jiffies_64`` starts at INITIAL_JIFFIES, five minutes before 32 bits overflow.

        Raises:
            UnsupportedGuestError: The clocks fit no frequency, or several.
        """
        if self._ticks is None:
            raw = self._kernel.virtual.read(VirtAddr(variable(self._kernel, "jiffies_64")), 8)
            counted = int.from_bytes(raw, "little") - (1 << 32)
            clocks = read_clocks(self._kernel)
            seconds = clocks.realtime_s - (clocks.realtime_offset_ns or 0) / _SECOND - 300
            fitting = [
                hz for hz in _HZ if abs(counted - seconds * hz) < 2 * hz + abs(counted) / 100
            ]
            if len(fitting) != 1:
                raise UnsupportedGuestError("how long a tick is cannot be told")
            self._ticks = fitting[0]
        return self._ticks
