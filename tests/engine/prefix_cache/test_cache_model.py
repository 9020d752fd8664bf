"""Random prompts over two tokens and two spaces: the cache against a dictionary that is searched one by one."""

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
    act: str
    space: str
    ids: Ids
    logits: bool


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["put", "put", "put", "find", "find", "learn", "places", "clear", "again"]),
        st.sampled_from(["a", "b"]),
        st.lists(st.sampled_from([3, 70_000]), min_size=1, max_size=9).map(tuple),
        st.booleans(),
    ),
    max_size=40,
)


def agreement(one: Ids, other: Ids) -> int:
    """How many leading ids two prompts share."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class Plain:
    """The cache without bounds, in the plainest words."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, Ids], bool] = {}
        self.seen: list[tuple[str, Ids]] = []

    def find(self, space: str, ids: Ids) -> tuple[int, bool, int]:
        """Length, whether there are logits, and shared."""
        usable = [0]
        for (owner, prefix), logits in self.kept.items():
            if owner == space and ids[: len(prefix)] == prefix and (len(prefix) < len(ids) or logits):
                usable.append(len(prefix))
        length = max(usable)
        shared = max((agreement(ids, path) for owner, path in self.seen if owner == space), default=0)
        return length, self.kept.get((space, ids[:length]), False), shared

    def do(self, step: Step) -> None:
        if step.act == "put":
            self.kept[step.space, step.ids] = self.kept.get((step.space, step.ids), False) or step.logits
        if step.act in ("put", "learn"):
            self.seen.append((step.space, step.ids))
        if step.act == "clear" and len(step.ids) > 7:
            self.kept = {key: logits for key, logits in self.kept.items() if key[0] != step.space}
            self.seen = [pair for pair in self.seen if pair[0] != step.space]


def do(cache: PrefixCache, step: Step) -> None:
    if step.act == "put":
        cache.put(step.space, list(step.ids), state_of(step.ids), logits_of(step.ids) if step.logits else None)
    elif step.act == "learn":
        cache.insert_prompt(step.space, list(step.ids))
    elif step.act == "clear" and len(step.ids) > 7:
        cache.clear(step.space)


def sound(hit: PrefixMatch, ids: Ids) -> bool:
    """Whether what was found belongs to the ids it says."""
    if hit.length == 0:
        return hit.state is None and hit.logits is None
    right = hit.logits is None or hit.logits.equal(logits_of(ids[: hit.length]))
    return right and same(hit.state, ids[: hit.length]) and (hit.length < len(ids) or hit.logits is not None)


def places(plain: Plain, step: Step, start: int, marks: Sequence[int], every: int) -> tuple[int, ...]:
    shared = plain.find(step.space, step.ids)[2]
    found = []
    for place in range(start + 1, len(step.ids) + 1):
        there = plain.kept.get((step.space, step.ids[:place]))
        if (place in (*marks, shared, len(step.ids)) or place % every == 0) and (
            there is None or (place == len(step.ids) and not there)
        ):
            found.append(place)
    return tuple(found)


@given(STEPS)
def test_with_room_for_all_it_is_the_dictionary(steps: list[Step]) -> None:
    cache, plain = PrefixCache(memory_bytes=AMPLE, snapshot_interval=4, min_gain=1), Plain()
    for step in steps:
        hit, (length, logits, shared) = cache.match_prefix(step.space, step.ids), plain.find(step.space, step.ids)
        assert (hit.length, hit.logits is not None, hit.shared_length) == (length, logits, shared) and sound(
            hit, step.ids
        )
        marks = (2, 5)
        assert cache.plan_snapshots(step.space, step.ids, length, marks) == places(plain, step, length, marks, 4)
        do(cache, step)
        plain.do(step)
        check(cache)
    assert cache.stats.evictions == 0 and cache.stats.hits + cache.stats.misses == len(steps)


@given(STEPS, st.integers(0, 4 * (BYTES + NODE_BYTES)))
def test_in_little_memory_it_finds_the_longest_of_what_is_left(steps: list[Step], memory: int) -> None:
    cache, plain = PrefixCache(memory_bytes=memory, snapshot_interval=4, min_gain=1), Plain()
    for step in steps:
        left = Plain()
        for node, space in [*cache._recent.items(), *cache._passed.items()]:
            ids = tuple(memoryview(node.path).cast("I"))
            left.seen.append((space, ids))
            if node.value is not None:
                left.kept[space, ids] = node.value.logits is not None
        assert left.kept.items() <= {**plain.kept, **left.kept}.items() and left.kept.keys() <= plain.kept.keys()
        hit, (length, logits, shared) = cache.match_prefix(step.space, step.ids), left.find(step.space, step.ids)
        assert (hit.length, hit.logits is not None, hit.shared_length) == (length, logits, shared) and sound(
            hit, step.ids
        )
        do(cache, step)
        plain.do(step)
        check(cache)
        assert length <= plain.find(step.space, step.ids)[0] or step.act == "clear"


@pytest.mark.parametrize("memory", [0, 3 * (BYTES + NODE_BYTES), AMPLE])
@settings(max_examples=25)
@given(steps=STEPS)
def test_with_a_disk_nothing_is_lost(memory: int, steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskCache(folder, "model", max_bytes=AMPLE)
        cache, plain = PrefixCache(memory_bytes=memory, disk=disk, snapshot_interval=4, min_gain=1), Plain()
        for step in steps:
            hit, (length, logits, shared) = cache.match_prefix(step.space, step.ids), plain.find(step.space, step.ids)
            assert (hit.length, hit.logits is not None) == (length, logits) and sound(hit, step.ids)
            assert length <= hit.shared_length <= shared
            do(cache, step)
            plain.do(step)
            check(cache)
            if step.act == "again":
                cache.flush()
                disk.close()
                disk = DiskCache(folder, "model", max_bytes=AMPLE)
                cache = PrefixCache(memory_bytes=memory, disk=disk, snapshot_interval=4, min_gain=1)
        assert disk._queued.keys() <= disk._rows.keys()
        disk.wait_idle()
        assert disk._queued_bytes == 0 and disk.nbytes == sum(row.size for row in disk._rows.values())
        disk.close()
