"""Random operations on two tokens and two namespaces: the cache against a linear search in a dictionary."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefixes import BYTES, check, logits_of, same, state_of

from fledge.engine.prefix_cache.cache import PrefixCache, PrefixMatch
from fledge.engine.prefix_cache.disk_cache import DiskCache
from fledge.engine.prefix_cache.radix_tree import NODE_BYTES

AMPLE = 1 << 24

Ids = tuple[int, ...]


class Step(NamedTuple):
    operation: str
    namespace: str
    ids: Ids
    logits: bool


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["put", "put", "put", "match", "match", "insert", "plan", "clear", "reopen"]),
        st.sampled_from(["a", "b"]),
        st.lists(st.sampled_from([3, 70_000]), min_size=1, max_size=9).map(tuple),
        st.booleans(),
    ),
    max_size=40,
)


def shared_length(one: Ids, other: Ids) -> int:
    """The number of leading ids that two prompts share."""
    pairs = zip(one, other, strict=False)
    return next((position for position, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class DictCache:
    """A cache without limits, as simple as possible."""

    def __init__(self) -> None:
        self.snapshots: dict[tuple[str, Ids], bool] = {}
        self.paths: list[tuple[str, Ids]] = []

    def find(self, namespace: str, ids: Ids) -> tuple[int, bool, int]:
        """The length of the match, whether it has logits, and the shared length."""
        usable = [0]
        for (owner, prefix), logits in self.snapshots.items():
            if owner == namespace and ids[: len(prefix)] == prefix and (len(prefix) < len(ids) or logits):
                usable.append(len(prefix))
        length = max(usable)
        shared = max((shared_length(ids, path) for owner, path in self.paths if owner == namespace), default=0)
        return length, self.snapshots.get((namespace, ids[:length]), False), shared

    def apply(self, step: Step) -> None:
        if step.operation == "put":
            self.snapshots[step.namespace, step.ids] = (
                self.snapshots.get((step.namespace, step.ids), False) or step.logits
            )
        if step.operation in ("put", "insert"):
            self.paths.append((step.namespace, step.ids))
        if step.operation == "clear" and len(step.ids) > 7:
            self.snapshots = {key: logits for key, logits in self.snapshots.items() if key[0] != step.namespace}
            self.paths = [pair for pair in self.paths if pair[0] != step.namespace]


def apply(cache: PrefixCache, step: Step) -> None:
    if step.operation == "put":
        cache.put(step.namespace, list(step.ids), state_of(step.ids), logits_of(step.ids) if step.logits else None)
    elif step.operation == "insert":
        cache.insert_prompt(step.namespace, list(step.ids))
    elif step.operation == "clear" and len(step.ids) > 7:
        cache.clear(step.namespace)


def is_correct(hit: PrefixMatch, ids: Ids) -> bool:
    """Whether the match belongs to its prefix of the ids."""
    if hit.length == 0:
        return hit.state is None and hit.logits is None
    has_right_logits = hit.logits is None or hit.logits.equal(logits_of(ids[: hit.length]))
    return has_right_logits and same(hit.state, ids[: hit.length]) and (hit.length < len(ids) or hit.logits is not None)


def expected_plan(
    plain: DictCache, step: Step, start: int, message_ends: Sequence[int], interval: int
) -> tuple[int, ...]:
    shared = plain.find(step.namespace, step.ids)[2]
    positions = []
    for position in range(start + 1, len(step.ids) + 1):
        has_logits = plain.snapshots.get((step.namespace, step.ids[:position]))
        if (position in (*message_ends, shared, len(step.ids)) or position % interval == 0) and (
            has_logits is None or (position == len(step.ids) and not has_logits)
        ):
            positions.append(position)
    return tuple(positions)


@given(STEPS)
def test_with_enough_memory_the_cache_equals_the_dictionary(steps: list[Step]) -> None:
    cache, plain = PrefixCache(memory_bytes=AMPLE, snapshot_interval=4, min_gain=1), DictCache()
    for step in steps:
        hit, (length, logits, shared) = (
            cache.match_prefix(step.namespace, step.ids),
            plain.find(step.namespace, step.ids),
        )
        assert (hit.length, hit.logits is not None, hit.shared_length) == (length, logits, shared) and is_correct(
            hit, step.ids
        )
        message_ends = (2, 5)
        assert cache.plan_snapshots(step.namespace, step.ids, length, message_ends) == expected_plan(
            plain, step, length, message_ends, 4
        )
        apply(cache, step)
        plain.apply(step)
        check(cache)
    assert cache.stats.evictions == 0 and cache.stats.hits + cache.stats.misses == len(steps)


@given(STEPS, st.integers(0, 4 * (BYTES + NODE_BYTES)))
def test_with_little_memory_the_longest_remaining_prefix_is_found(steps: list[Step], memory: int) -> None:
    cache, plain = PrefixCache(memory_bytes=memory, snapshot_interval=4, min_gain=1), DictCache()
    for step in steps:
        remaining = DictCache()
        for node, namespace in [*cache._recent.items(), *cache._redundant.items()]:
            ids = tuple(memoryview(node.path).cast("I"))
            remaining.paths.append((namespace, ids))
            if node.value is not None:
                remaining.snapshots[namespace, ids] = node.value.logits is not None
        assert (
            remaining.snapshots.items() <= {**plain.snapshots, **remaining.snapshots}.items()
            and remaining.snapshots.keys() <= plain.snapshots.keys()
        )
        hit, (length, logits, shared) = (
            cache.match_prefix(step.namespace, step.ids),
            remaining.find(step.namespace, step.ids),
        )
        assert (hit.length, hit.logits is not None, hit.shared_length) == (length, logits, shared) and is_correct(
            hit, step.ids
        )
        apply(cache, step)
        plain.apply(step)
        check(cache)
        assert length <= plain.find(step.namespace, step.ids)[0] or step.operation == "clear"


@pytest.mark.parametrize("memory", [0, 3 * (BYTES + NODE_BYTES), AMPLE])
@settings(max_examples=25)
@given(steps=STEPS)
def test_with_a_disk_nothing_is_lost(memory: int, steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskCache(folder, "model", max_bytes=AMPLE)
        cache, plain = PrefixCache(memory_bytes=memory, disk=disk, snapshot_interval=4, min_gain=1), DictCache()
        for step in steps:
            hit, (length, logits, shared) = (
                cache.match_prefix(step.namespace, step.ids),
                plain.find(step.namespace, step.ids),
            )
            assert (hit.length, hit.logits is not None) == (length, logits) and is_correct(hit, step.ids)
            assert length <= hit.shared_length <= shared
            apply(cache, step)
            plain.apply(step)
            check(cache)
            if step.operation == "reopen":
                cache.flush()
                disk.close()
                disk = DiskCache(folder, "model", max_bytes=AMPLE)
                cache = PrefixCache(memory_bytes=memory, disk=disk, snapshot_interval=4, min_gain=1)
        assert disk._queued.keys() <= disk._records.keys()
        disk.wait_idle()
        assert disk._queued_bytes == 0 and disk.nbytes == sum(row.size for row in disk._records.values())
        disk.close()
