"""All tmpfs with what is in them, within a bound: what is needed to make them again.

How many pages a file has, and whether some are swapped out, its inode tells: a database's shared
memory of many gigabytes is left out without a look at its pages.

Source: Linux v6.1 ``include/linux/shmem_fs.h`` (``struct shmem_inode_info``, ``struct
shmem_sb_info``), ``mm/shmem.c`` (``shmem_recalc_inode``), ``include/linux/mount.h``
(``MNT_NOEXEC``).
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from drgn import Object

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.guest_model import TmpfsContent, TmpfsFile, TmpfsNode
from ouassister.kernel.fields import Fields, offset
from ouassister.kernel.page_frames import PAGE_SIZE
from ouassister.kernel.program import guest_reads
from ouassister.kernel.tmpfs import Where

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ouassister.kernel.program import Kernel
    from ouassister.kernel.tmpfs import TmpfsReader

MAX_BYTES: Final = 64 << 20
MAX_NODES: Final = 1 << 16
_MNT_NOEXEC: Final = 0x04
_PROBLEMS: Final = (UnsupportedGuestError, CorruptGuestError, PageAbsentError)


@dataclass(frozen=True, slots=True)
class Mounted:
    """One tmpfs of the guest.

    Attributes:
        target: The first place where it is mounted.
        sb: ``struct super_block *``.
        mounts: ``struct mount`` of every place.
    """

    target: bytes
    sb: Object
    mounts: tuple[Object, ...]


@dataclass(slots=True)
class _Tree:
    """What is known of one of them so far."""

    mounted: Mounted
    nodes: list[TmpfsNode]
    inodes: dict[bytes, Object]  # of regular files, by their first names
    hard_links: list[tuple[bytes, bytes]]
    left_out: list[tuple[bytes, str]]
    limits: tuple[int, int] = (0, 0)


class TmpfsContents:
    """Reads what is in all tmpfs of one kernel.

    Args:
        kernel: The kernel.
        reader: Its tmpfs.
        max_bytes: What files may have in all; beyond it the largest are left out.
        max_nodes: How many files there may be in all; a tmpfs with more is empty.

    Raises:
        UnsupportedGuestError: This kernel lays them out otherwise.
    """

    def __init__(
        self,
        kernel: Kernel,
        reader: TmpfsReader,
        *,
        max_bytes: int = MAX_BYTES,
        max_nodes: int = MAX_NODES,
    ) -> None:
        self._reader = reader
        self._max_bytes = max_bytes
        self._nodes_left = max_nodes
        with guest_reads("reading the layout of tmpfs"):
            self._limits = Fields(kernel, "struct shmem_sb_info", "max_blocks", "max_inodes")
            self._info = Fields(kernel, "struct shmem_inode_info", "swapped", "vfs_inode.i_mapping")
            self._vfs_inode = offset(kernel, "struct shmem_inode_info", "vfs_inode")
            self._mapping = Fields(kernel, "struct inode", "i_mapping")
            self._pages = Fields(kernel, "struct address_space", "nrpages")

    def read(self, all_mounted: Iterable[Mounted]) -> tuple[TmpfsContent, ...]:
        """Read them all; one that contradicts itself is left out by name."""
        # What programs need most, before others have used up the bound.
        order = sorted(all_mounted, key=lambda mounted: mounted.target != b"/run")
        trees = [self._tree(mounted) for mounted in order]
        wanted = self._choose(trees)
        return tuple(self._made(tree, wanted[number]) for number, tree in enumerate(trees))

    def _made(self, tree: _Tree, wanted: Mapping[bytes, int]) -> TmpfsContent:
        files = tuple(self._files(tree, wanted))
        mounted = tree.mounted
        with guest_reads("reading the mounts of a tmpfs"):
            return TmpfsContent(
                tmpfs=self._reader.tree(mounted.target, mounted.sb, tree.nodes, ()),
                size_bytes=tree.limits[0],
                inodes=tree.limits[1],
                noexec=tuple(
                    mount.mnt_id.value_()
                    for mount in mounted.mounts
                    if mount.mnt.mnt_flags.value_() & _MNT_NOEXEC
                ),
                hard_links=tuple(tree.hard_links),
                files=files,
                left_out=tuple(tree.left_out),
            )

    def _tree(self, mounted: Mounted) -> _Tree:
        tree = _Tree(mounted, [], {}, [], [])
        try:
            self._look(tree)
        except _PROBLEMS as error:
            tree = _Tree(mounted, [], {}, [], [(b"", error.message)], tree.limits)
        return tree

    def _look(self, tree: _Tree) -> None:
        """Describe all files; of a file with several names the first in order is the one."""
        sb = tree.mounted.sb
        ram = self._reader.is_ramfs(sb)
        with guest_reads("reading the limits of a tmpfs"):
            if not ram:
                blocks, inodes = self._limits.read(sb.s_fs_info.value_())
                tree.limits = (blocks * PAGE_SIZE, inodes)
            found = list(islice(self._reader.inodes(sb.s_root.read_()), self._nodes_left + 1))
        if len(found) > self._nodes_left:
            tree.left_out.append((b"", f"it has more than {self._nodes_left} files"))
            return
        self._nodes_left -= len(found)
        first: dict[int, bytes] = {}
        unread: list[str] = []
        # A directory right before what is in it, as whoever makes the tree again needs it.
        for path, inode in sorted(found, key=lambda one: one[0].split(b"/")):
            try:
                node = self._reader.describe(path, inode, unread, attributes=not ram, counted=False)
            except _PROBLEMS as error:
                tree.left_out.append((path, error.message))
                continue
            tree.nodes.append(node)
            if stat.S_ISDIR(node.mode):
                continue
            name = first.setdefault(inode.value_(), path)
            if name != path:
                tree.hard_links.append((path, name))
            elif stat.S_ISREG(node.mode):
                tree.inodes[path] = inode
            elif stat.S_ISLNK(node.mode) and node.target is None:
                tree.left_out.append((path, f"where it leads to is {_where(node)}"))
        tree.left_out += [
            (b"", what) for what in unread if what.startswith("attributes of ")
        ]  # what is said of a symbolic link is above

    def _choose(self, trees: Sequence[_Tree]) -> list[dict[bytes, int]]:
        """Say which files are read, the small ones first, and how many pages each has."""
        sizes = []
        wanted: list[dict[bytes, int]] = [{} for _ in trees]
        for number, tree in enumerate(trees):
            ram = self._reader.is_ramfs(tree.mounted.sb)
            for path, inode in tree.inodes.items():
                try:
                    pages, swapped = self._pages_of(inode, ram=ram)
                except _PROBLEMS as error:
                    tree.left_out.append((path, error.message))
                    continue
                if swapped:
                    tree.left_out.append((path, f"{swapped} pages are {Where.SWAPPED}"))
                else:
                    sizes.append((pages * PAGE_SIZE, number, path))
        left = self._max_bytes
        for size, number, path in sorted(sizes):
            left -= size
            if left < 0:
                trees[number].left_out.append((path, f"{size >> 10} KiB are too much"))
            else:
                wanted[number][path] = size // PAGE_SIZE
        return wanted

    def _pages_of(self, inode: Object, *, ram: bool) -> tuple[int, int]:
        """How many pages a file has in memory, and how many are swapped out."""
        with guest_reads("reading the size of a file in tmpfs"):
            if ram:
                swapped, (mapping,) = 0, self._mapping.read(inode.value_())
            else:
                swapped, mapping = self._info.read(inode.value_() - self._vfs_inode)
            (pages,) = self._pages.read(mapping)
        return pages, swapped

    def _files(self, tree: _Tree, wanted: Mapping[bytes, int]) -> Iterable[TmpfsFile]:
        for path, inode in tree.inodes.items():
            if path not in wanted:
                continue
            try:
                yield TmpfsFile(path, self._content(inode, wanted[path]))
            except _PROBLEMS as error:
                tree.left_out.append((path, error.message))

    def _content(self, inode: Object, pages: int) -> tuple[tuple[int, bytes], ...]:
        """Return the runs of a file.

        Raises:
            CorruptGuestError: A page is not here, though its inode says so.
        """
        runs: list[tuple[int, list[bytes]]] = []
        end = -1
        for extent in self._reader.content(inode):
            if not isinstance(extent.data, bytes):
                raise CorruptGuestError(f"a page is {extent.data}")
            pages -= 1
            if pages < 0:
                raise CorruptGuestError("it has more pages than its inode says")
            if extent.position == end:
                runs[-1][1].append(extent.data)
            else:
                runs.append((extent.position, [extent.data]))
            end = extent.position + len(extent.data)
        return tuple((position, b"".join(parts)) for position, parts in runs)


def _where(node: TmpfsNode) -> Where:
    return Where.SWAPPED if node.swapped else Where.ABSENT
