"""Small states whose values depend on the ids that they have read, and the invariants of a PrefixCache."""

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
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(repr(list(ids)).encode()).digest()[:4], "big"))
    shapes = ((2, 1, 7), (2, 1, 3, 5, 4), (2, 1, 7))
    att_shift, wkv, ffn_shift = (torch.randn(shape, generator=generator) for shape in shapes)
    wkv[0, 0, 0, 0, :3] = torch.tensor([float("nan"), -0.0, 1e-42])  # values that a conversion would change
    return WkvState(att_shift, wkv, ffn_shift)


def logits_of(ids: Sequence[int]) -> Tensor:
    """The logits of the token after these ids."""
    return state_of([*ids, 1]).tensors()["ffn_shift"].flatten()[:11].clone()


BYTES = Snapshot(state_of([1]), None).nbytes


def same(state: State | None, ids: Sequence[int]) -> bool:
    """Whether a state has exactly the bits of the state after these ids."""
    return state is not None and equal_bits(state, state_of(ids))


def equal_bits(one: State, other: State) -> bool:
    """Whether two states have the same bits."""
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return type(one) is type(other) and all(
        a.dtype is b.dtype is torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs
    )


def check(cache: PrefixCache) -> None:
    """Check that the trees have no superfluous node, that all evictable nodes are listed, and every byte is counted."""
    size, evictable, snapshots = 0, set(), 0
    for tree in cache._trees.values():
        assert tree.root.children and tree.root.value is None
        tree_bytes = 0
        pending: list[RadixNode[Snapshot]] = [tree.root]
        while pending:
            node = pending.pop()
            tree_bytes += NODE_BYTES + len(node.edge)
            for first_token, child in node.children.items():
                assert child.parent is node and child.edge[:TOKEN_BYTES] == first_token
                assert (
                    child.length == node.length + len(child.edge) // TOKEN_BYTES and len(child.edge) % TOKEN_BYTES == 0
                )
            pending += node.children.values()
            if node.value is not None:
                snapshots += 1
                size += node.value.nbytes
            if node.value is not None or not node.children:
                evictable.add(node)
            assert node is tree.root or node.value is not None or len(node.children) != 1
        assert tree_bytes == tree.nbytes
        size += tree_bytes
    assert {*cache._recent, *cache._redundant} == evictable
    assert len(cache._recent) + len(cache._redundant) == len(evictable)
    assert (cache.stats.bytes, cache.stats.snapshots) == (size, snapshots)
    assert size <= cache._memory_bytes
