"""What renderers of attributes are given: the tree, the kernel, and structures that may lack parts.

Kernels differ in members, rarely in meaning. A structure is read with the members that it has; an
attribute that needs another one is not told (`UntoldError`), and all others are.

Source: Linux v6.1 ``include/linux/device.h`` (``struct device``), ``include/linux/kobject.h``.
"""

from __future__ import annotations

import functools
import stat
from typing import TYPE_CHECKING, Any, Final

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.kernel.fields import Fields, has_member, offset, read_string
from ouassister.kernel.kernfs import path_of
from ouassister.kernel.program import guest_reads
from ouassister.kernel.rodata import find_texts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ouassister.kernel.kernfs import KernfsNode
    from ouassister.kernel.program import Kernel

MAX_TEXT: Final = 4095  # what fits into a page, behind which sysfs cuts
# What functions print since some kernel between v6.12 and v7.3, for which no type changed.
PARTITION_UUID: Final = b"PARTUUID=%s"  # part_uevent
PRODUCT_FAMILY: Final = b"pfa"  # get_modalias
_MAX_CONTENTS: Final = 16 << 20  # of all files
_SUBSYSTEM: Final = b"subsystem"


class UntoldError(LookupError):
    """Memory of this kernel does not tell an attribute."""


class Values(dict[str, Any]):
    """Members of one structure, by name."""

    def __missing__(self, name: str) -> Any:  # noqa: ANN401 - never returns
        """Say that this kernel's structure has no such member."""
        raise UntoldError(name)


class Structure:
    """Those of some members that a structure has.

    Args:
        kernel: The kernel.
        kind: The structure.
        names: Members, with dots.
    """

    def __init__(self, kernel: Kernel, kind: str, *names: str) -> None:
        self._names = tuple(name for name in names if _has(kernel, kind, name))
        self._fields = Fields(kernel, kind, *self._names) if self._names else None

    def read(self, address: int) -> Values:
        """Read them.

        Raises:
            UntoldError: The structure is not there.
        """
        if not address:
            raise UntoldError("nothing")
        if self._fields is None:
            return Values()
        return Values(zip(self._names, self._fields.read(address), strict=True))


def _has(kernel: Kernel, kind: str, name: str) -> bool:
    try:
        with guest_reads(f"looking for a member of {kind}"):
            if "." not in name:
                return has_member(kernel, kind, name)
            offset(kernel, kind, name)
    except UnsupportedGuestError:
        return False
    return True


class Look:
    """One guest's sysfs, to be filled.

    Args:
        kernel: The kernel.
        nodes: Its tree.

    Attributes:
        kernel: The kernel.
        nodes: The tree.
        below: Indices of what is in a folder, by name; for each index of a folder.
        contents: What was rendered, by index.
    """

    def __init__(self, kernel: Kernel, nodes: list[KernfsNode]) -> None:
        self.kernel = kernel
        self.nodes = nodes
        self.contents: dict[int, bytes] = {}
        self._left = _MAX_CONTENTS
        self.below: dict[int, dict[bytes, int]] = {
            index: {} for index, node in enumerate(nodes) if stat.S_ISDIR(node.mode)
        }
        for index, node in enumerate(nodes):
            if index:
                self.below[node.parent][node.name] = index

    def find(self, path: bytes, start: int = 0) -> int | None:
        """Return the index of a path below a folder; no link is followed."""
        at = start
        for name in path.split(b"/"):
            found = self.below.get(at, {}).get(name)
            if found is None:
                return None
            at = found
        return at

    def path(self, index: int) -> bytes:
        """Return the path of a node."""
        return path_of(self.nodes, index)

    def give(self, folder: int, name: bytes, content: bytes) -> None:
        """Set what a file contains; one that is not there is not made."""
        index = self.find(name, folder)
        if index is not None and stat.S_ISREG(self.nodes[index].mode):
            self.set(index, content[:MAX_TEXT])

    def set(self, index: int, content: bytes) -> None:
        """Set what a file contains.

        Raises:
            CorruptGuestError: All of them contain too much.
        """
        self._left -= len(content)
        if self._left < 0:
            raise CorruptGuestError("files below /sys contain more than they can")
        self.contents[index] = content

    def subsystem(self, folder: int) -> bytes | None:
        """Return ``/bus/pci`` or ``/class/net`` of a device's folder; None for other folders."""
        link = self.below[folder].get(_SUBSYSTEM)
        target = None if link is None else self.nodes[link].target
        return None if target is None else self.path(target)

    def device(self, folder: int) -> int:
        """Return the address of the ``struct device`` that a folder belongs to."""
        return self.nodes[folder].private - self._kobject

    @functools.cached_property
    def _kobject(self) -> int:
        return offset(self.kernel, "struct device", "kobj")

    @functools.cached_property
    def _device(self) -> Structure:
        return Structure(self.kernel, "struct device", "parent", "type", "bus", "driver",
                         "driver_data", "devt", "class", "numa_node", "coherent_dma_mask",
                         "fwnode")  # fmt: skip

    def common(self, folder: int) -> Values:
        """Read what all devices have."""
        return self._device.read(self.device(folder))

    def knows(self, text: bytes) -> bool:
        """Tell whether the kernel's functions know one of the words below.

        Raises:
            UntoldError: That cannot be found out.
        """
        try:
            return text in self._words
        except (UnsupportedGuestError, PageAbsentError) as error:
            raise UntoldError(error.message) from error

    @functools.cached_property
    def _words(self) -> frozenset[bytes]:
        return find_texts(self.kernel, (PARTITION_UUID, PRODUCT_FAMILY))

    def text(self, address: int, limit: int = 256) -> bytes:
        """Read a string of the kernel.

        Raises:
            UntoldError: There is none.
        """
        if not address:
            raise UntoldError("a string")
        return read_string(self.kernel, address, limit)


def number(value: int) -> bytes:
    """Render a number as most attributes do."""
    return b"%d\n" % value


def line(text: bytes) -> bytes:
    """Render a text as most attributes do."""
    return text + b"\n"


def signed(value: int, bits: int = 32) -> int:
    """Read an unsigned number as a signed one."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def cpu_list(numbers: Mapping[int, object] | list[int]) -> bytes:
    """Render numbers as bitmap_print_to_pagebuf() lists them: ``0-3,7``."""
    parts: list[list[int]] = []
    for one in sorted(numbers):
        if parts and parts[-1][1] == one - 1:
            parts[-1][1] = one
        else:
            parts.append([one, one])
    words = (b"%d" % a if a == b else b"%d-%d" % (a, b) for a, b in parts)
    return b",".join(words) + b"\n"
