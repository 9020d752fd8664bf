"""The prefix cache: the states after prefixes of former prompts, so that a prompt is read from where it leaves them.

An RWKV state has one size however much it has read, so a snapshot is a value to be kept under the ids that led to it.
For each prompt the engine asks, in this order: `find`, where to go on from; `places`, where to take snapshots on the
way; `learn`, so that the next prompt sees how far it shares this one; then `put` for each place. Asked in another
order, `places` would find the prompt in the tree already and miss where it leaves known ground.

Snapshots, paths and nodes together stay within `memory` bytes; what waits to be written is for the disk to bound. What
goes first: a snapshot at a multiple of `every` that the same prompt has passed, so that one long prompt displaces
little; then the least recently used, paths that were only learned among them. A hit refreshes what was hit and nothing
before it: what lies behind is of use only to prompts that part there, and those refresh it themselves. What has to go
moves to the disk, if there is one.

Spaces are separate trees: nothing of one is seen from another. Called from one thread; nothing raises because of a
disk. A state is kept on the device it comes from, and comes back from the disk on the CPU. Not here: the tree
(radix.py), the disk (snapshots.py), and any model.
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
"""Tokens below which going on from a longer snapshot is not worth a file or a snapshot of its own: the few
milliseconds and megabytes it takes compare with reading these tokens along with all the others."""


class PrefixMatch(NamedTuple):
    """What is known of a prompt."""

    length: int  # tokens that `state` has read; 0 on a miss
    state: State | None
    logits: Tensor | None  # (V,) float32, of the token after, where they were kept
    shared_length: int  # leading tokens that have been seen in another prompt


@dataclass(frozen=True)
class CacheStats:
    """Counts since the beginning, and what is there now."""

    hits: int
    misses: int
    tokens_saved: int
    snapshots: int  # in memory
    bytes: int
    disk_snapshots: int  # of all models in the folder, as the limit is on all
    disk_bytes: int
    evictions: int  # snapshots that had to leave the memory


class PrefixCache:
    """Snapshots in memory and, where `disk` is given, on it. Whoever made `disk` closes it, after `flush`."""

    def __init__(
        self,
        *,
        memory_bytes: int,
        disk: DiskCache | None = None,
        snapshot_interval: int = 512,
        min_gain: int = MIN_GAIN,
    ) -> None:
        """memory: bytes. every: tokens from one snapshot to the next where nothing else asks for one. gain: as GAIN."""
        assert memory_bytes >= 0 and snapshot_interval > 0 and min_gain > 0
        self._memory_bytes, self._disk, self._snapshot_interval, self._min_gain = (
            memory_bytes,
            disk,
            snapshot_interval,
            min_gain,
        )
        self._trees: dict[str, RadixTree[Snapshot]] = {}
        # Every node with a snapshot, and every leaf without, is in one of these, with its space, the next to go first.
        self._passed: OrderedDict[RadixNode[Snapshot], str] = OrderedDict()
        self._recent: OrderedDict[RadixNode[Snapshot], str] = OrderedDict()
        self._bytes = self._snapshots = 0
        self._hits = self._misses = self._tokens_saved = self._evictions = 0

    def match_prefix(self, namespace: str, ids: Sequence[int]) -> PrefixMatch:
        """The longest snapshot that is a prefix of `ids`; all of them only with logits, as something must be read."""
        path = pack_ids(ids)
        nodes, shared = self._match(namespace, path)
        node = next((node for node in reversed(nodes) if _usable(node, len(ids))), None)
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
        """Where to take snapshots while reading `ids` on from `start`: rising, after `start`, none that is there.

        marks: places worth one for their own sake, ends of messages say. To them come the multiples of `every`, the
        place where `ids` leave known ground, so that the next such prompt goes on from there, and the end.
        """
        path, end = pack_ids(ids), len(ids)
        nodes, shared = self._match(namespace, path)
        wanted = {end, *message_ends, *range(0, end, self._snapshot_interval)}
        if shared - start >= self._min_gain:
            wanted.add(shared)
        wanted = {place for place in wanted if start < place <= end}
        there = {node.length for node in nodes if _usable(node, end)}
        if self._disk is not None:
            on_disk = self._disk.find_lengths(namespace, path, wanted - there)
            there.update(place for place, logits in on_disk.items() if place < end or logits)
        return tuple(sorted(wanted - there))

    def insert_prompt(self, namespace: str, ids: Sequence[int]) -> None:
        """Remember that a prompt went this way, without a snapshot."""
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
        """Keep the state of one sequence after `ids`, which the caller gives away and never writes again.

        Where there is one already, only logits that it lacked are taken.
        """
        assert len(ids) > 0 and state.batch == 1
        node = self._insert(namespace, pack_ids(ids), Snapshot(state, logits))
        above = None if node is None else node.nearest_ancestor_with_value
        if (
            above is not None
            and above.length % self._snapshot_interval == 0
            and len(above.children) == 1
            and above in self._recent
        ):
            self._passed[above] = self._recent.pop(above)
        self._evict()

    def clear(self, namespace: str | None = None) -> None:
        """Forget everything, or everything of one space, on the disk too."""
        for book in (self._passed, self._recent):
            for node in [node for node, owner in book.items() if namespace in (None, owner)]:
                del book[node]
                if node.value is not None:
                    self._snapshots -= 1
                    self._bytes -= node.value.nbytes
        for owner in [owner for owner in self._trees if namespace in (None, owner)]:
            self._bytes -= self._trees.pop(owner).nbytes
        if self._disk is not None:
            self._disk.clear(namespace)

    def flush(self) -> None:
        """Write every snapshot to the disk and wait until that is done. They stay in memory as well."""
        if self._disk is not None:
            for book in (self._passed, self._recent):
                for node, namespace in book.items():
                    if node.value is not None:
                        self._disk.put(namespace, node.path, node.value, wait=True)
            self._disk.wait_idle()

    @property
    def stats(self) -> CacheStats:
        """The figures of this moment."""
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

    def _fits(self, path: bytes, more: int) -> bool:
        """Whether there is room for a path with `more` bytes at its end, were nothing else there."""
        return 2 * NODE_BYTES + len(path) + more <= self._memory_bytes

    def _insert(self, namespace: str, path: bytes, snapshot: Snapshot) -> RadixNode[Snapshot] | None:
        """Put a snapshot into the tree; None where it is too large for the memory and went to the disk.

        `_trim` follows, when the caller has settled what goes first.
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
        """Make a node the last to go."""
        self._passed.pop(node, None)
        self._recent[node] = namespace
        self._recent.move_to_end(node)

    def _evict(self) -> None:
        """Let go of what is next to go until the rest is within the memory."""
        while self._bytes > self._memory_bytes:
            node, namespace = (self._passed or self._recent).popitem(last=False)
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


def _usable(node: RadixNode[Snapshot], end: int) -> bool:
    """Whether there is a snapshot at a node that a prompt of `end` tokens can go on from."""
    return node.value is not None and (node.length < end or node.value.logits is not None)
