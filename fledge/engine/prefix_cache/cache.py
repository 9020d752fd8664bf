"""`PrefixCache`: states after the prefixes of earlier prompts, so that the engine computes only the rest of a prompt.

A recurrent state has a fixed size, so a snapshot is a value that is stored under the ids that led to it. For each
prompt the engine calls, in this order: `match_prefix` (where to continue), `plan_snapshots` (where to take snapshots),
`insert_prompt` (so that later prompts know how much they share with this one), then `put` for each snapshot. In another
order `plan_snapshots` would find the prompt itself in the tree and miss the position where it diverges.

Snapshots, paths and nodes together use at most `memory_bytes`. Eviction starts with snapshots at multiples of
`snapshot_interval` that a longer snapshot of the same prompt has made redundant, so a long prompt displaces little.
Then the least recently used snapshots and paths are evicted. A hit refreshes only the snapshot that it uses: shorter
ones are useful only to prompts that diverge there, and those refresh them. Evicted snapshots move to the disk, if there
is one.

Namespaces are separate trees: a prompt never matches one of another namespace. The cache is used by one thread, and
no method raises an error of the disk. A state stays on its device; from the disk it is loaded to the CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fledge.engine.prefix_cache.disk_cache import DiskCache
from fledge.engine.prefix_cache.disk_store import Snapshot
from fledge.engine.prefix_cache.radix_tree import NODE_BYTES, TOKEN_BYTES, RadixNode, RadixTree, pack_ids
from fledge.models.state import State

MIN_GAIN = 16
"""A longer snapshot is loaded from a file, or taken, only if it saves this many tokens: the few milliseconds and
megabytes
that it costs are comparable to computing these tokens together with the others."""


class PrefixMatch(NamedTuple):
    """The longest usable prefix of a prompt."""

    length: int  # tokens that `state` has read; 0 on a miss
    state: State | None
    logits: Tensor | None  # (V,) float32, of the next token, if they were stored
    shared_length: int  # leading tokens that an earlier prompt has too


@dataclass(frozen=True)
class CacheStats:
    """Counters since the cache was created, and its current content."""

    hits: int
    misses: int
    tokens_saved: int
    snapshots: int  # in memory
    bytes: int
    disk_snapshots: int  # of all models in the folder, because the limit applies to all
    disk_bytes: int
    evictions: int  # snapshots evicted from memory


class PrefixCache:
    """Snapshots in memory and, if `disk` is given, on disk. The caller closes `disk`, after `flush`."""

    def __init__(
        self,
        *,
        memory_bytes: int,
        disk: DiskCache | None = None,
        snapshot_interval: int = 512,
        min_gain: int = MIN_GAIN,
    ) -> None:
        """snapshot_interval: tokens between regular snapshots of a prompt. min_gain: see MIN_GAIN."""
        assert memory_bytes >= 0 and snapshot_interval > 0 and min_gain > 0
        self._memory_bytes, self._disk = memory_bytes, disk
        self._snapshot_interval, self._min_gain = snapshot_interval, min_gain
        self._trees: dict[str, RadixTree[Snapshot]] = {}
        # Every node with a snapshot, and every leaf without one, is in one of these, with its namespace, in the order
        # of eviction. All redundant ones are evicted first.
        self._redundant: OrderedDict[RadixNode[Snapshot], str] = OrderedDict()
        self._recent: OrderedDict[RadixNode[Snapshot], str] = OrderedDict()
        self._bytes = self._snapshots = 0
        self._hits = self._misses = self._tokens_saved = self._evictions = 0

    def match_prefix(self, namespace: str, ids: Sequence[int]) -> PrefixMatch:
        """The longest snapshot that is a prefix of `ids`. A snapshot of all ids is used only if it has logits."""
        path = pack_ids(ids)
        nodes, shared = self._match(namespace, path)
        node = next((node for node in reversed(nodes) if _is_usable(node, len(ids))), None)
        length, snapshot = (0, None) if node is None else (node.length, node.value)
        stored = None if self._disk is None else self._disk.find_longest(namespace, path, length + self._min_gain)
        if stored is not None:
            length, snapshot = stored
            self._insert(namespace, path[: length * TOKEN_BYTES], snapshot)
            self._evict()
        elif node is not None:
            self._touch(node, namespace)
        self._hits += snapshot is not None
        self._misses += snapshot is None
        self._tokens_saved += length
        state, logits = (None, None) if snapshot is None else snapshot
        return PrefixMatch(length, state, logits, max(shared, length))

    def plan_snapshots(
        self, namespace: str, ids: Sequence[int], start: int, message_ends: Sequence[int]
    ) -> tuple[int, ...]:
        """The lengths at which to take snapshots while computing `ids` from `start` on: ascending, only missing ones.

        These are the ends of messages, the multiples of `snapshot_interval`, the position where `ids` diverge from
        earlier prompts, which the next such prompt can continue from, and the end.
        """
        path, end = pack_ids(ids), len(ids)
        nodes, shared = self._match(namespace, path)
        positions = {end, *message_ends, *range(0, end, self._snapshot_interval)}
        if shared - start >= self._min_gain:
            positions.add(shared)
        positions = {position for position in positions if start < position <= end}
        existing = {node.length for node in nodes if _is_usable(node, end)}
        if self._disk is not None:
            on_disk = self._disk.find_lengths(namespace, path, positions - existing)
            existing.update(position for position, has_logits in on_disk.items() if position < end or has_logits)
        return tuple(sorted(positions - existing))

    def insert_prompt(self, namespace: str, ids: Sequence[int]) -> None:
        """Record the path of a prompt, without a snapshot."""
        path = pack_ids(ids)
        if path and self._fits(path, 0):
            tree = self._tree(namespace)
            self._bytes -= tree.nbytes
            leaf = tree.insert(path)
            self._bytes += tree.nbytes
            if leaf is not None:
                self._touch(leaf, namespace)
            self._evict()

    def put(self, namespace: str, ids: Sequence[int], state: State, logits: Tensor | None = None) -> None:
        """Store the state of one sequence after `ids`. The caller must not write to it afterwards.

        If there is a snapshot of these ids, only missing logits are added to it.
        """
        assert len(ids) > 0 and state.batch == 1
        node = self._insert(namespace, pack_ids(ids), Snapshot(state, logits))
        shorter = None if node is None else node.ancestor_with_value
        is_regular = shorter is not None and shorter.length % self._snapshot_interval == 0
        if shorter is not None and is_regular and len(shorter.children) == 1 and shorter in self._recent:
            self._redundant[shorter] = self._recent.pop(shorter)
        self._evict()

    def clear(self, namespace: str | None = None) -> None:
        """Delete everything, or everything of one namespace, on the disk too."""
        for nodes in (self._redundant, self._recent):
            for node in [node for node, owner in nodes.items() if namespace in (None, owner)]:
                del nodes[node]
                if node.value is not None:
                    self._snapshots -= 1
                    self._bytes -= node.value.nbytes
        for owner in [owner for owner in self._trees if namespace in (None, owner)]:
            self._bytes -= self._trees.pop(owner).nbytes
        if self._disk is not None:
            self._disk.clear(namespace)

    def flush(self) -> None:
        """Write all snapshots to the disk and wait until they are written. They stay in memory."""
        if self._disk is not None:
            for nodes in (self._redundant, self._recent):
                for node, namespace in nodes.items():
                    if node.value is not None:
                        self._disk.put(namespace, node.path, node.value, wait=True)
            self._disk.wait_idle()

    @property
    def stats(self) -> CacheStats:
        """The current statistics."""
        return CacheStats(
            hits=self._hits,
            misses=self._misses,
            tokens_saved=self._tokens_saved,
            snapshots=self._snapshots,
            bytes=self._bytes,
            disk_snapshots=0 if self._disk is None else len(self._disk),
            disk_bytes=0 if self._disk is None else self._disk.nbytes,
            evictions=self._evictions,
        )

    def _match(self, namespace: str, path: bytes) -> tuple[list[RadixNode[Snapshot]], int]:
        tree = self._trees.get(namespace)
        return ([], 0) if tree is None else tree.match(path)

    def _tree(self, namespace: str) -> RadixTree[Snapshot]:
        tree = self._trees.get(namespace)
        if tree is None:
            tree = self._trees[namespace] = RadixTree()
            self._bytes += tree.nbytes
        return tree

    def _fits(self, path: bytes, value_bytes: int) -> bool:
        """Whether an empty cache could hold a path with a value of this size."""
        return 2 * NODE_BYTES + len(path) + value_bytes <= self._memory_bytes

    def _insert(self, namespace: str, path: bytes, snapshot: Snapshot) -> RadixNode[Snapshot] | None:
        """Add a snapshot to the tree. Returns None if it is too large for the memory and was given to the disk.

        The caller calls `_evict` after it has updated the order of eviction.
        """
        if not self._fits(path, snapshot.nbytes):
            if self._disk is not None:
                self._disk.put(namespace, path, snapshot)
            return None
        tree = self._tree(namespace)
        self._bytes -= tree.nbytes
        node = tree.get_or_insert(path)
        self._bytes += tree.nbytes
        if node.value is None:
            self._snapshots += 1
        elif node.value.logits is None and snapshot.logits is not None:
            self._bytes -= node.value.nbytes
            snapshot = Snapshot(node.value.state, snapshot.logits)
        else:
            self._bytes -= node.value.nbytes
            snapshot = node.value
        node.value = snapshot
        self._bytes += snapshot.nbytes
        self._touch(node, namespace)
        return node

    def _touch(self, node: RadixNode[Snapshot], namespace: str) -> None:
        """Make a node the most recently used one."""
        self._redundant.pop(node, None)
        self._recent[node] = namespace
        self._recent.move_to_end(node)

    def _evict(self) -> None:
        """Evict nodes until the rest fits into the memory."""
        while self._bytes > self._memory_bytes:
            node, namespace = (self._redundant or self._recent).popitem(last=False)
            if node.value is not None:
                if self._disk is not None:
                    self._disk.put(namespace, node.path, node.value)
                self._bytes -= node.value.nbytes
                self._snapshots -= 1
                self._evictions += 1
                node.value = None
            tree = self._trees[namespace]
            self._bytes -= tree.nbytes
            tree.prune(node)
            self._bytes += tree.nbytes
            if not tree.root.children:
                self._bytes -= self._trees.pop(namespace).nbytes


def _is_usable(node: RadixNode[Snapshot], end: int) -> bool:
    """Whether a node has a snapshot that a prompt of `end` tokens can continue from."""
    return node.value is not None and (node.length < end or node.value.logits is not None)
