"""Policies of the prefix cache: where it takes snapshots, what it evicts first, and when it reads a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefixes import BYTES, check, logits_of, same, state_of

from fledge.engine.prefix_cache.cache import MIN_GAIN, PrefixCache, PrefixMatch
from fledge.engine.prefix_cache.disk_cache import DiskCache
from fledge.engine.prefix_cache.radix_tree import NODE_BYTES, TOKEN_BYTES

AMPLE = 1 << 24
IDS = tuple(range(100, 200))


def put(cache: PrefixCache, ids: tuple[int, ...], namespace: str = "a", logits: bool = False) -> None:
    cache.put(namespace, ids, state_of(ids), logits_of(ids) if logits else None)
    check(cache)


def lengths(cache: PrefixCache) -> list[int]:
    """The lengths of the snapshots in memory."""
    return sorted(
        node.length for nodes in (cache._redundant, cache._recent) for node in nodes if node.value is not None
    )


def bytes_of(*prompts: int) -> int:
    """Bytes of the snapshots of separate prompts of these lengths, in one namespace."""
    return NODE_BYTES + sum(NODE_BYTES + length * TOKEN_BYTES + BYTES for length in prompts)


def test_snapshot_positions() -> None:
    cache = PrefixCache(memory_bytes=AMPLE, snapshot_interval=32)
    assert cache.plan_snapshots("a", IDS, 0, (70, 10, 0, 500)) == (10, 32, 64, 70, 96, 100)
    assert cache.plan_snapshots("a", IDS, 64, (70, 10)) == (70, 96, 100)
    assert cache.plan_snapshots("a", IDS, 100, (70,)) == ()
    cache.insert_prompt("a", IDS)
    put(cache, IDS[:70])
    other = (*IDS[:80], *range(20))
    assert MIN_GAIN > 80 - 70 and cache.plan_snapshots("a", other, 70, ()) == (96, 100), "the gain is too small"
    assert cache.plan_snapshots("a", other, 0, (70,)) == (32, 64, 80, 96, 100), (
        "70 exists, and the prompts diverge at 80"
    )
    assert cache.plan_snapshots("b", other, 0, (70,)) == (32, 64, 70, 96, 100)
    put(cache, other)
    assert cache.plan_snapshots("a", other, 70, ()) == (96, 100), "a snapshot of the whole prompt needs logits"
    put(cache, other, logits=True)
    assert cache.plan_snapshots("a", other, 70, ()) == (96,)


def test_snapshots_on_the_disk_are_not_taken_again(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "model", max_bytes=AMPLE) as disk:
        cache = PrefixCache(memory_bytes=AMPLE, disk=disk, snapshot_interval=32)
        put(cache, IDS[:32])
        put(cache, IDS)
        cache.flush()
        cache = PrefixCache(memory_bytes=AMPLE, disk=disk, snapshot_interval=32)
        assert cache.plan_snapshots("a", IDS, 0, ()) == (64, 96, 100)
        assert cache.plan_snapshots("a", (*IDS, 1), 0, (100,)) == (64, 96, 101)


def test_a_long_prompt_evicts_its_own_regular_snapshots_first() -> None:
    """Its message ends and its end stay."""
    cache = PrefixCache(memory_bytes=bytes_of(5, 6, 100) + 2 * (NODE_BYTES + BYTES), snapshot_interval=10)
    put(cache, (1,) * 5)
    put(cache, (2,) * 6)
    for length in (10, 20, 30, 37, 40, 50, 60, 100):
        put(cache, IDS[:length])
    assert lengths(cache) == [5, 6, 37, 60, 100]
    assert cache.stats.evictions == 5


def test_a_redundant_snapshot_that_is_hit_or_where_prompts_diverge_is_kept() -> None:
    cache = PrefixCache(memory_bytes=AMPLE, snapshot_interval=10)
    put(cache, IDS[:10])
    put(cache, IDS[:15])
    assert [node.length for node in cache._redundant] == [10]
    assert cache.match_prefix("a", (*IDS[:10], 1)).length == 10
    assert not cache._redundant
    put(cache, (*IDS[:10], 1))
    put(cache, (*IDS[:10], 2))
    assert not cache._redundant
    check(cache)


def test_a_hit_refreshes_only_the_snapshot_that_it_uses() -> None:
    cache = PrefixCache(memory_bytes=bytes_of(9) + NODE_BYTES + BYTES + 5 * TOKEN_BYTES, snapshot_interval=50)
    put(cache, IDS[:4])
    put(cache, (1,) * 5)
    assert cache.match_prefix("a", (*IDS[:4], 1)).length == 4
    put(cache, IDS[:9])
    assert lengths(cache) == [4, 9]
    assert cache.match_prefix("a", (*IDS[:9], 1)).length == 9
    put(cache, (1,) * 5)
    assert lengths(cache) == [5, 9], "the hit has not refreshed the shorter snapshot"


def test_a_snapshot_that_is_too_large_evicts_nothing(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "model", max_bytes=AMPLE) as disk:
        cache = PrefixCache(memory_bytes=bytes_of(5), disk=disk)
        put(cache, IDS[:5])
        put(cache, IDS[:60])
        cache.insert_prompt("a", tuple(range(10_000)))
        assert lengths(cache) == [5] and cache.stats.evictions == 0
        hit = cache.match_prefix("a", IDS)
        assert hit.length == 60 and same(hit.state, IDS[:60]), "it was written to the disk"


def test_paths_without_snapshots_are_limited_too() -> None:
    cache = PrefixCache(memory_bytes=20 * NODE_BYTES)
    for number in range(100):
        cache.insert_prompt(f"tenant {number}", (number,) * 50)
        check(cache)
    assert cache.match_prefix("tenant 99", (99,) * 60) == PrefixMatch(0, None, None, 50)
    assert cache.match_prefix("tenant 0", (0,) * 60).shared_length == 0
    assert cache.stats.evictions == 0


def test_a_file_is_read_only_if_the_gain_is_large_enough(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "model", max_bytes=AMPLE) as disk:
        cache = PrefixCache(memory_bytes=AMPLE, disk=disk)
        for length in (20, 40, 40 + MIN_GAIN - 1, 40 + MIN_GAIN):
            put(cache, IDS[:length], logits=True)
        cache.flush()
        cache = PrefixCache(memory_bytes=AMPLE, disk=disk)
        put(cache, IDS[:40])
        assert cache.match_prefix("a", IDS[: 40 + MIN_GAIN - 1]).length == 40
        hit = cache.match_prefix("a", IDS[: 40 + MIN_GAIN])
        assert hit.length == hit.shared_length == 40 + MIN_GAIN
        assert same(hit.state, IDS[: hit.length]) and hit.logits is not None
        assert lengths(cache) == [40, 40 + MIN_GAIN], "the snapshot is in memory now"
        check(cache)


def test_logits_are_added_to_an_existing_snapshot() -> None:
    cache = PrefixCache(memory_bytes=AMPLE)
    put(cache, IDS[:7])
    first = cache.match_prefix("a", IDS[:8]).state
    assert cache.match_prefix("a", IDS[:7]).length == 0
    put(cache, IDS[:7], logits=True)
    put(cache, IDS[:7])
    hit = cache.match_prefix("a", IDS[:7])
    assert hit.state is first and hit.logits is not None and hit.logits.equal(logits_of(IDS[:7]))


def test_clear_deletes_snapshots_on_the_disk_too(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "model", max_bytes=AMPLE) as disk:
        cache = PrefixCache(memory_bytes=bytes_of(50), disk=disk)
        for namespace in ("a", "b"):
            put(cache, IDS[:50], namespace)
            put(cache, IDS[:30], namespace)
        cache.clear("a")
        check(cache)
        assert cache.match_prefix("a", IDS) == PrefixMatch(0, None, None, 0)
        assert cache.match_prefix("b", IDS).length == 50
        cache.clear()
        disk.wait_idle()
        check(cache)
        stats = cache.stats
        assert (stats.snapshots, stats.bytes, stats.disk_snapshots, stats.disk_bytes) == (0, 0, 0, 0)
        assert (stats.hits, stats.misses, stats.tokens_saved) == (1, 1, 50)


def test_the_cache_works_without_a_usable_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with DiskCache(tmp_path / "file" / "folder", "model", max_bytes=AMPLE) as disk:
        cache = PrefixCache(memory_bytes=bytes_of(60), disk=disk)
        put(cache, IDS[:50])
        put(cache, (1,) * 60)
        assert cache.match_prefix("a", IDS).length == 0 and cache.match_prefix("a", (1,) * 70).length == 60
        assert cache.plan_snapshots("a", IDS, 0, ()) == (100,)
        cache.clear("b")
        cache.flush()
    assert len(caplog.records) == 1
