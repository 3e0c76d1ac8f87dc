"""Memory mappings of a process, as /proc/PID/maps shows them.

The page of ``vsyscall`` at the end of that file belongs to no process and is left out.

Source: Linux v6.1 ``fs/proc/task_mmu.c`` (``show_map_vma``), ``include/linux/mm.h`` (``VM_*``),
``include/linux/maple_tree.h``, ``lib/maple_tree.c`` (``mte_to_node``, ``mte_node_type``,
``mas_data_end``). Mappings are in a maple tree since 524e00b36e8c ("mm: remove rb tree", v6.1), in
a list from ``mm_struct.mmap`` before 763ecb035029 ("mm: remove the vma linked list", v6.1).
``anon_name`` since 9a10064f5625 ("mm: add a field to store names for private anonymous memory",
v5.17).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from drgn import sizeof

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import VirtAddr, Vma
from ouassister.kernel.fields import Fields, has_member, offset, read_string, read_word
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.kernel.file_names import FileNames
    from ouassister.kernel.program import Kernel

_VM_READ, _VM_WRITE, _VM_EXEC, _VM_MAYSHARE = 1, 2, 4, 0x80
_MAX_VMAS: Final = 1 << 18  # vm.max_map_count is 65530 by default, and may be raised
_MAX_NODES: Final = 1 << 16
_MAX_DEPTH: Final = 32
_MINOR_BITS: Final = 20
_NODE_MASK: Final = 0xFF  # MAPLE_NODE_MASK
_LEAF_64, _RANGE_64, _ARANGE_64 = 1, 2, 3  # enum maple_type; maple_dense (0) is not for ranges
_ULONG_MAX: Final = (1 << 64) - 1
_ANON_NAME_MAX: Final = 80  # ANON_VMA_NAME_MAX_LEN


class Vmas:
    """The mappings of this kernel's processes.

    Args:
        kernel: The kernel.
        names: Names of files.
    """

    def __init__(self, kernel: Kernel, names: FileNames) -> None:
        self._kernel = kernel
        self._names = names
        self._vma = Fields(kernel, "struct vm_area_struct", "vm_start", "vm_end", "vm_flags",
                           "vm_pgoff", "vm_file", "vm_ops", "vm_private_data")  # fmt: skip
        self._file = Fields(kernel, "struct file", "f_path.mnt", "f_path.dentry", "f_inode")
        self._inode = Fields(kernel, "struct inode", "i_ino", "i_sb")
        self._mm = Fields(kernel, "struct mm_struct", "start_brk", "brk", "start_stack")
        self._known: dict[int, tuple[int, int, bytes]] = {}  # of a struct file; most have several
        self._special = kernel.symbols.address("special_mapping_vmops")
        self._special_name = Fields(kernel, "struct vm_special_mapping", "name")
        self._anon_name: tuple[int, int] | None = None
        if has_member(kernel, "struct vm_area_struct", "anon_name"):
            self._anon_name = (
                offset(kernel, "struct vm_area_struct", "anon_name"),
                offset(kernel, "struct anon_vma_name", "name"),
            )
        if has_member(kernel, "struct mm_struct", "mm_mt"):
            self._tree: _MapleLayout | None = _MapleLayout(kernel)
            self._first = offset(kernel, "struct mm_struct", "mm_mt.ma_root")
        else:
            self._tree = None
            self._first = offset(kernel, "struct mm_struct", "mmap")
            self._next = offset(kernel, "struct vm_area_struct", "vm_next")

    def read(self, mm: int) -> tuple[Vma, ...]:
        """Describe the mappings of a ``struct mm_struct *``, by address.

        Raises:
            CorruptGuestError: They overlap, are too many, or the tree contains itself.
        """
        with guest_reads("reading the mappings of a process"):
            marks = self._mm.read(mm)
            found = []
            end = 0
            for address in self._addresses(mm):
                vma = self._describe(address, marks)
                if not end <= vma.start < vma.end:
                    raise CorruptGuestError(f"the mappings of a process overlap at {end:#x}")
                end = vma.end
                found.append(vma)
            return tuple(found)

    def _addresses(self, mm: int) -> Iterator[int]:
        first = read_word(self._kernel, mm + self._first)
        if self._tree is not None:
            yield from maple_entries(self._kernel, first, self._tree)
            return
        seen = 0
        while first:
            seen += 1
            if seen > _MAX_VMAS:  # one that leads back overlaps, and is refused there
                raise CorruptGuestError(f"a process has more than {_MAX_VMAS} mappings")
            yield first
            first = read_word(self._kernel, first + self._next)

    def _describe(self, address: int, marks: tuple[int, int, int]) -> Vma:
        start, end, flags, pgoff, file, ops, private = self._vma.read(address)
        inode_number = device = place = 0
        if file:
            place = pgoff << 12
            known = self._known.get(file)
            if known is None:
                known = self._known[file] = self._of_file(file)
            inode_number, device, name = known
        else:
            name = self._purpose(address, start, end, ops, private, marks)
        return Vma(
            start=VirtAddr(start),
            end=VirtAddr(end),
            permissions=("r" if flags & _VM_READ else "-")
            + ("w" if flags & _VM_WRITE else "-")
            + ("x" if flags & _VM_EXEC else "-")
            + ("s" if flags & _VM_MAYSHARE else "p"),
            offset=place,
            major=device >> _MINOR_BITS,
            minor=device & ((1 << _MINOR_BITS) - 1),
            inode=inode_number,
            path=name,
        )

    def _of_file(self, file: int) -> tuple[int, int, bytes]:
        """Return inode, device and name of a ``struct file *``."""
        mnt, dentry, inode = self._file.read(file)
        number, sb = self._inode.read(inode)
        _, device = self._names.file_system(sb)
        return number, device, self._names.name(mnt, dentry, inode)

    def _purpose(
        self, address: int, start: int, end: int, ops: int, private: int, marks: tuple[int, ...]
    ) -> bytes:
        if ops and ops == self._special and private:
            return read_string(self._kernel, self._special_name.read(private)[0], 64)
        start_brk, brk, start_stack = marks
        if start < brk and end > start_brk:
            return b"[heap]"
        if start <= start_stack <= end:
            return b"[stack]"
        if self._anon_name is not None:
            at, within = self._anon_name
            anon = read_word(self._kernel, address + at)
            if anon:
                text = read_string(self._kernel, anon + within, _ANON_NAME_MAX)
                return b"[anon:%s]" % text
        return b""


class _MapleLayout:
    """Where pivots and slots lie in the two kinds of nodes."""

    def __init__(self, kernel: Kernel) -> None:
        self.kinds: dict[int, tuple[int, int, int, int, bool]] = {}
        for kinds, name in (((_LEAF_64, _RANGE_64), "maple_range_64"),
                            ((_ARANGE_64,), "maple_arange_64")):  # fmt: skip
            node = kernel.type(f"struct {name}")
            counts = []
            places = []
            for member in ("pivot", "slot"):
                of = node.member(member)
                length = of.type.length
                if length is None or not 0 < length <= 256:
                    raise CorruptGuestError(f"a maple tree's node has {length} entries")
                counts.append(length)
                places.append(of.offset)
            for kind in kinds:
                self.kinds[kind] = (places[0], counts[0], places[1], counts[1], kind == _LEAF_64)
        self.size: int = sizeof(kernel.type("struct maple_node"))


def maple_entries(kernel: Kernel, root: int, layout: _MapleLayout) -> Iterator[int]:
    """Yield the entries of a maple tree of ranges, in order.

    Raises:
        CorruptGuestError: It is too deep or too large, contains itself, or is of another kind.
    """
    if not _is_node(root):
        if root and not root & 3:
            yield root
        return
    seen: set[int] = set()
    count = 0
    stack = [(root, 0, _ULONG_MAX, 0)]
    while stack:
        encoded, lower, upper, depth = stack.pop()
        node = encoded & ~_NODE_MASK
        if node in seen or len(seen) >= _MAX_NODES or depth > _MAX_DEPTH:
            raise CorruptGuestError(f"a maple tree is too deep, too large, or cyclic at {node:#x}")
        seen.add(node)
        kind = (encoded >> 3) & 0xF
        if kind not in layout.kinds:
            raise CorruptGuestError(f"a maple tree has a node of kind {kind}")
        pivots_at, pivots, slots_at, slots, leaf = layout.kinds[kind]
        raw = kernel.virtual.read(VirtAddr(node), layout.size)
        bounds = struct.unpack_from(f"<{pivots}Q", raw, pivots_at)
        below = []
        for index, slot in enumerate(struct.unpack_from(f"<{slots}Q", raw, slots_at)):
            # A pivot of zero, but for the first, says that the entry before was the last.
            bound = bounds[index] if index < pivots else upper
            if (bound == 0 and index) or bound > upper:
                bound = upper
            if slot and leaf and not slot & 3:
                count += 1
                if count > _MAX_VMAS:
                    raise CorruptGuestError(f"a process has more than {_MAX_VMAS} mappings")
                yield slot
            elif slot and not leaf:
                below.append((slot, lower, bound, depth + 1))
            if bound >= upper:
                break
            lower = bound + 1
        stack.extend(reversed(below))


def _is_node(entry: int) -> bool:
    return entry & 3 == 2 and entry > 4096  # xa_is_node
