"""A radix tree over token ids: which prefixes have been seen, and what is kept at some of them.

An edge is bytes, four a token, so 32,768 tokens are compared by a few calls that run in C. A node without a value is
there because two paths part at it, or because a path ends there that was only learned; every other one is merged
away, so the tree is as small as what it says. Not here: what the values are and which of them have to go.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Generic, TypeVar

V = TypeVar("V")

TOKEN_BYTES = 4  # bytes of an id in a path
NODE_BYTES = 512  # bytes a node is counted with beside its edge: the object, its dict, its places in the caller's books


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as a path."""
    return array("I", ids).tobytes()


class RadixNode(Generic[V]):
    """The place after `length` tokens; `edge` holds those since the parent."""

    __slots__ = ("children", "edge", "length", "parent", "value")

    def __init__(self, parent: RadixNode[V] | None, edge: bytes, length: int) -> None:
        self.parent, self.edge, self.length = parent, edge, length
        self.children: dict[bytes, RadixNode[V]] = {}  # by the first token of their edges
        self.value: V | None = None

    @property
    def path(self) -> bytes:
        """All tokens from the root to here."""
        edges = []
        node: RadixNode[V] | None = self
        while node is not None:
            edges.append(node.edge)
            node = node.parent
        return b"".join(reversed(edges))

    @property
    def nearest_ancestor_with_value(self) -> RadixNode[V] | None:
        """The nearest node with a value on the way back to the root."""
        node = self.parent
        while node is not None and node.value is None:
            node = node.parent
        return node


class RadixTree(Generic[V]):
    """One tree. Whoever takes a node's value away calls `prune`; whoever calls `add` gives the node a value."""

    def __init__(self) -> None:
        self.root: RadixNode[V] = RadixNode(None, b"", 0)
        self.nbytes = NODE_BYTES
        """Bytes of all edges and nodes; values are the caller's to count."""

    def match(self, path: bytes) -> tuple[list[RadixNode[V]], int]:
        """The nodes on the way along `path`, and the tokens of it that the tree knows (the last edge may end later)."""
        nodes: list[RadixNode[V]] = []
        node, place = self.root, 0
        while (child := node.children.get(path[place : place + TOKEN_BYTES])) is not None:
            agreed = _agreement(child.edge, path, place)
            place += agreed
            if agreed < len(child.edge):
                break
            nodes.append(child)
            node = child
        return nodes, place // TOKEN_BYTES

    def get_or_insert(self, path: bytes) -> RadixNode[V]:
        """The node at the end of `path`, made where there was none."""
        node, place = self.root, 0
        while place < len(path):
            child = node.children.get(path[place : place + TOKEN_BYTES])
            if child is None:
                return self._append(node, path[place:])
            agreed = _agreement(child.edge, path, place)
            node = child if agreed == len(child.edge) else self._split(child, agreed)
            place += agreed
        return node

    def insert(self, path: bytes) -> RadixNode[V] | None:
        """See that the tree knows `path`; the leaf made for it, or None where it was known."""
        _, known = self.match(path)
        return self.get_or_insert(path) if known * TOKEN_BYTES < len(path) else None

    def prune(self, node: RadixNode[V]) -> None:
        """Remove or merge a node that has lost its value, and its parent where that is then of no use."""
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
        """Go on from a node by tokens of which none is known. A learned path simply becomes longer."""
        self.nbytes += len(rest)
        if node.value is None and not node.children and node.parent is not None:
            node.edge += rest
            node.length += len(rest) // TOKEN_BYTES
            return node
        child = RadixNode(node, rest, node.length + len(rest) // TOKEN_BYTES)
        node.children[rest[:TOKEN_BYTES]] = child
        self.nbytes += NODE_BYTES
        return child

    def _split(self, node: RadixNode[V], agreed: int) -> RadixNode[V]:
        """A new node inside the edge to `node`, which itself stays the object it is, as others refer to it."""
        parent = node.parent
        assert parent is not None and 0 < agreed < len(node.edge)
        upper = RadixNode(parent, node.edge[:agreed], parent.length + agreed // TOKEN_BYTES)
        parent.children[upper.edge[:TOKEN_BYTES]] = upper
        node.parent, node.edge = upper, node.edge[agreed:]
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


def _agreement(edge: bytes, path: bytes, begin: int) -> int:
    """Bytes of `edge`, whole tokens, that stand in `path` from `begin` on."""
    if path.startswith(edge, begin):
        return len(edge)
    low, high = 0, min(len(edge), len(path) - begin) // TOKEN_BYTES
    while low < high:  # the first `low` tokens agree, and no more than the first `high`
        middle = (low + high + 1) // 2
        if path.startswith(edge[low * TOKEN_BYTES : middle * TOKEN_BYTES], begin + low * TOKEN_BYTES):
            low = middle
        else:
            high = middle - 1
    return low * TOKEN_BYTES
