"""Bounded walks over the kernel's lists and trees.

A guest is hostile: lists may be cyclic, endless or lead nowhere. Every walk here ends: each
node is visited once at most, and no more nodes than a limit.

Source: Linux ``include/linux/types.h`` (``list_head``, ``hlist_head``), ``rbtree_types.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drgn import Object

    from ouassister.kernel.program import Kernel

MAX_NODES: Final = 1 << 17


def list_nodes(kernel: Kernel, head: int, limit: int = MAX_NODES) -> Iterator[int]:
    """Yield the addresses of the ``list_head`` nodes behind a head.

    Raises:
        CorruptGuestError: The list does not come back to its head.
    """
    seen = {head}
    node = kernel.prog.read_u64(head)
    while node != head:
        _visit(seen, node, limit, "list")
        following = kernel.prog.read_u64(node)
        yield node
        node = following


def hlist_nodes(kernel: Kernel, head: int, limit: int = MAX_NODES) -> Iterator[int]:
    """Yield the addresses of the ``hlist_node`` nodes behind a head.

    Raises:
        CorruptGuestError: The list does not end.
    """
    seen: set[int] = set()
    node = kernel.prog.read_u64(head)
    while node:
        _visit(seen, node, limit, "hash list")
        following = kernel.prog.read_u64(node)
        yield node
        node = following


def rbtree_nodes(root: Object, limit: int = MAX_NODES) -> Iterator[int]:
    """Yield the addresses of the ``rb_node`` nodes of a tree, in order.

    Raises:
        CorruptGuestError: The tree contains itself.
    """
    seen: set[int] = set()
    stack: list[Object] = []
    node = root.rb_node.read_()
    while stack or node:
        while node:
            _visit(seen, node.value_(), limit, "tree")
            stack.append(node)
            node = node.rb_left.read_()
        node = stack.pop()
        yield node.value_()
        node = node.rb_right.read_()


def _visit(seen: set[int], node: int, limit: int, what: str) -> None:
    if node in seen:
        raise CorruptGuestError(f"a {what} of the kernel contains itself at {node:#x}")
    if len(seen) > limit:
        raise CorruptGuestError(f"a {what} of the kernel has more than {limit} nodes")
    seen.add(node)
