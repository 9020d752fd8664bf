"""States of tiny sizes whose numbers follow from the ids they have read, and what must hold within a cache."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor

from fledge.engine.prefix_cache.cache import PrefixCache
from fledge.engine.prefix_cache.disk_store import Snapshot
from fledge.engine.prefix_cache.radix_tree import NODE_BYTES, TOKEN_BYTES, RadixNode
from fledge.models.state import State, WkvState


def state_of(ids: Sequence[int]) -> State:
    """The state after these ids."""
    draw = torch.Generator().manual_seed(int.from_bytes(sha256(repr(list(ids)).encode()).digest()[:4], "big"))
    shapes = ((2, 1, 7), (2, 1, 3, 5, 4), (2, 1, 7))
    att_shift, wkv, ffn_shift = (torch.randn(shape, generator=draw) for shape in shapes)
    wkv[0, 0, 0, 0, :3] = torch.tensor([float("nan"), -0.0, 1e-42])  # what a careless copy changes
    return WkvState(att_shift, wkv, ffn_shift)


def logits_of(ids: Sequence[int]) -> Tensor:
    """The scores of the token after these ids."""
    return state_of([*ids, 1]).tensors()["ffn_shift"].flatten()[:11].clone()


BYTES = Snapshot(state_of([1]), None).nbytes


def same(state: State | None, ids: Sequence[int]) -> bool:
    """Whether a state is to the bit the one after these ids."""
    return state is not None and equal_bits(state, state_of(ids))


def equal_bits(one: State, other: State) -> bool:
    """Whether two states are the same to the bit."""
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return type(one) is type(other) and all(
        a.dtype is b.dtype is torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs
    )


def check(cache: PrefixCache) -> None:
    """The tree is as small as it can be, the books list what can go, and every byte is counted."""
    size, leavable, snapshots = 0, set(), 0
    for tree in cache._trees.values():
        assert tree.root.children and tree.root.value is None
        counted = 0
        todo: list[RadixNode[Snapshot]] = [tree.root]
        while todo:
            node = todo.pop()
            counted += NODE_BYTES + len(node.edge)
            for head, child in node.children.items():
                assert child.parent is node and child.edge[:TOKEN_BYTES] == head
                assert (
                    child.length == node.length + len(child.edge) // TOKEN_BYTES and len(child.edge) % TOKEN_BYTES == 0
                )
            todo += node.children.values()
            if node.value is not None:
                snapshots += 1
                size += node.value.nbytes
            if node.value is not None or not node.children:
                leavable.add(node)
            assert node is tree.root or node.value is not None or len(node.children) != 1
        assert counted == tree.nbytes
        size += counted
    assert {*cache._recent, *cache._passed} == leavable
    assert len(cache._recent) + len(cache._passed) == len(leavable)
    assert (cache.stats.bytes, cache.stats.snapshots) == (size, snapshots)
    assert size <= cache._memory_bytes
