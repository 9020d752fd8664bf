"""A radix tree over token ids, with values at some of its nodes.

An edge is a bytes object with four bytes per token, so a few calls that run in C compare 32,768 tokens. A node without
a value exists only if two paths diverge at it, or if it is the end of an inserted path. All other nodes are merged.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Generic, TypeVar

V = TypeVar("V")

TOKEN_BYTES = 4  # of an id in a path
NODE_BYTES = 512  # estimate for a node without its edge: the object, its dict, its entries in dicts of the caller


def pack_ids(ids: Sequence[int]) -> bytes:
    """A path: token ids as bytes."""
    return array("I", ids).tobytes()


class RadixNode(Generic[V]):
    """The node after `length` tokens; `edge` holds the tokens after its parent."""

    __slots__ = ("children", "edge", "length", "parent", "value")

    def __init__(self, parent: RadixNode[V] | None, edge: bytes, length: int) -> None:
        self.parent, self.edge, self.length = parent, edge, length
        self.children: dict[bytes, RadixNode[V]] = {}  # by the first token of their edges
        self.value: V | None = None

    @property
    def path(self) -> bytes:
        """All tokens from the root to this node."""
        edges = []
        node: RadixNode[V] | None = self
        while node is not None:
            edges.append(node.edge)
            node = node.parent
        return b"".join(reversed(edges))

    @property
    def ancestor_with_value(self) -> RadixNode[V] | None:
        """The nearest ancestor that has a value."""
        node = self.parent
        while node is not None and node.value is None:
            node = node.parent
        return node


class RadixTree(Generic[V]):
    """A radix tree. Callers set the value of a node from `get_or_insert`, and call `prune` after removing a value."""

    def __init__(self) -> None:
        self.root: RadixNode[V] = RadixNode(None, b"", 0)
        self.nbytes = NODE_BYTES
        """Bytes of all edges and nodes, without the values."""

    def match(self, path: bytes) -> tuple[list[RadixNode[V]], int]:
        """The nodes along `path`, and how many of its tokens are in the tree (the last edge may match in part)."""
        nodes: list[RadixNode[V]] = []
        node, position = self.root, 0
        while (child := node.children.get(path[position : position + TOKEN_BYTES])) is not None:
            common = _common_bytes(child.edge, path, position)
            position += common
            if common < len(child.edge):
                break
            nodes.append(child)
            node = child
        return nodes, position // TOKEN_BYTES

    def get_or_insert(self, path: bytes) -> RadixNode[V]:
        """The node at the end of `path`, which is created if needed."""
        node, position = self.root, 0
        while position < len(path):
            child = node.children.get(path[position : position + TOKEN_BYTES])
            if child is None:
                return self._append(node, path[position:])
            common = _common_bytes(child.edge, path, position)
            node = child if common == len(child.edge) else self._split(child, common)
            position += common
        return node

    def insert(self, path: bytes) -> RadixNode[V] | None:
        """Insert `path` without a value. Returns its new leaf, or None if the tree contains the path already."""
        _, length = self.match(path)
        return self.get_or_insert(path) if length * TOKEN_BYTES < len(path) else None

    def prune(self, node: RadixNode[V]) -> None:
        """Remove or merge a node that has no value any more, and its parent if that becomes redundant."""
        parent = node.parent
        if parent is None or node.value is not None:
            return
        if not node.children:
            del parent.children[node.edge[:TOKEN_BYTES]]
            self.nbytes -= NODE_BYTES + len(node.edge)
            node = parent
        if len(node.children) == 1 and node.value is None and node.parent is not None:
            self._merge(node)

    def _append(self, node: RadixNode[V], rest: bytes) -> RadixNode[V]:
        """Add tokens after a node that has no child for them. A leaf without a value is extended instead."""
        self.nbytes += len(rest)
        if node.value is None and not node.children and node.parent is not None:
            node.edge += rest
            node.length += len(rest) // TOKEN_BYTES
            return node
        child = RadixNode(node, rest, node.length + len(rest) // TOKEN_BYTES)
        node.children[rest[:TOKEN_BYTES]] = child
        self.nbytes += NODE_BYTES
        return child

    def _split(self, node: RadixNode[V], common: int) -> RadixNode[V]:
        """Insert a new node into the edge to `node`. `node` stays the same object, because callers refer to it."""
        parent = node.parent
        assert parent is not None and 0 < common < len(node.edge)
        upper = RadixNode(parent, node.edge[:common], parent.length + common // TOKEN_BYTES)
        parent.children[upper.edge[:TOKEN_BYTES]] = upper
        node.parent, node.edge = upper, node.edge[common:]
        upper.children[node.edge[:TOKEN_BYTES]] = node
        self.nbytes += NODE_BYTES
        return upper

    def _merge(self, node: RadixNode[V]) -> None:
        """Give the edge of a node without a value to its only child."""
        parent, (child,) = node.parent, node.children.values()
        assert parent is not None
        child.parent, child.edge = parent, node.edge + child.edge
        parent.children[child.edge[:TOKEN_BYTES]] = child
        self.nbytes -= NODE_BYTES


def _common_bytes(edge: bytes, path: bytes, begin: int) -> int:
    """How many bytes of `edge`, in whole tokens, equal those of `path` from `begin` on."""
    if path.startswith(edge, begin):
        return len(edge)
    low, high = 0, min(len(edge), len(path) - begin) // TOKEN_BYTES
    while low < high:  # at least `low` and at most `high` tokens are equal
        middle = (low + high + 1) // 2
        if path.startswith(edge[low * TOKEN_BYTES : middle * TOKEN_BYTES], begin + low * TOKEN_BYTES):
            low = middle
        else:
            high = middle - 1
    return low * TOKEN_BYTES
