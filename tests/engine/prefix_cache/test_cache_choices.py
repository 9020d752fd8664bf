"""The cache's choices: where snapshots are asked for, what goes first, and when a file is not worth its reading."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefixes import BYTES, check, logits_of, same, state_of

from fledge.engine.prefix_cache.cache import MIN_GAIN, PrefixCache, PrefixMatch
from fledge.engine.prefix_cache.disk_cache import DiskCache
from fledge.engine.prefix_cache.radix_tree import NODE_BYTES, TOKEN_BYTES

AMPLE = 1 << 24
IDS = tuple(range(100, 200))


def put(cache: PrefixCache, ids: tuple[int, ...], space: str = "a", logits: bool = False) -> None:
    cache.put(space, ids, state_of(ids), logits_of(ids) if logits else None)
    check(cache)


def lengths(cache: PrefixCache) -> list[int]:
    """Of the snapshots in memory."""
    return sorted(node.length for book in (cache._passed, cache._recent) for node in book if node.value is not None)


def room(*prompts: int) -> int:
    """Bytes of snapshots of so many separate prompts of these lengths, in one space."""
    return NODE_BYTES + sum(NODE_BYTES + length * TOKEN_BYTES + BYTES for length in prompts)


def test_where_snapshots_are_asked_for() -> None:
    cache = PrefixCache(memory_bytes=AMPLE, snapshot_interval=32)
    assert cache.plan_snapshots("a", IDS, 0, (70, 10, 0, 500)) == (10, 32, 64, 70, 96, 100)
    assert cache.plan_snapshots("a", IDS, 64, (70, 10)) == (70, 96, 100)
    assert cache.plan_snapshots("a", IDS, 100, (70,)) == ()
    cache.insert_prompt("a", IDS)
    put(cache, IDS[:70])
    other = (*IDS[:80], *range(20))
    assert MIN_GAIN > 80 - 70 and cache.plan_snapshots("a", other, 70, ()) == (96, 100), "too little lies between"
    assert cache.plan_snapshots("a", other, 0, (70,)) == (32, 64, 80, 96, 100), "70 is there, and 80 is where they part"
    assert cache.plan_snapshots("b", other, 0, (70,)) == (32, 64, 70, 96, 100)
    put(cache, other)
    assert cache.plan_snapshots("a", other, 70, ()) == (96, 100), (
        "without logits the end is of no use to the same prompt"
    )
    put(cache, other, logits=True)
    assert cache.plan_snapshots("a", other, 70, ()) == (96,)


def test_places_on_the_disk_are_not_asked_for_again(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "model", max_bytes=AMPLE) as disk:
        cache = PrefixCache(memory_bytes=AMPLE, disk=disk, snapshot_interval=32)
        put(cache, IDS[:32])
        put(cache, IDS)
        cache.flush()
        cache = PrefixCache(memory_bytes=AMPLE, disk=disk, snapshot_interval=32)
        assert cache.plan_snapshots("a", IDS, 0, ()) == (64, 96, 100)
        assert cache.plan_snapshots("a", (*IDS, 1), 0, (100,)) == (64, 96, 101)


def test_a_long_prompt_displaces_little() -> None:
    """Its passed snapshots go before anything else, the older ones first, and its marks and end do not."""
    cache = PrefixCache(memory_bytes=room(5, 6, 100) + 2 * (NODE_BYTES + BYTES), snapshot_interval=10)
    put(cache, (1,) * 5)
    put(cache, (2,) * 6)
    for place in (10, 20, 30, 37, 40, 50, 60, 100):
        put(cache, IDS[:place])
    assert lengths(cache) == [5, 6, 37, 60, 100]
    assert cache.stats.evictions == 5


def test_a_passed_snapshot_that_is_hit_or_where_prompts_part_is_like_any_other() -> None:
    cache = PrefixCache(memory_bytes=AMPLE, snapshot_interval=10)
    put(cache, IDS[:10])
    put(cache, IDS[:15])
    assert [node.length for node in cache._passed] == [10]
    assert cache.match_prefix("a", (*IDS[:10], 1)).length == 10
    assert not cache._passed
    put(cache, (*IDS[:10], 1))
    put(cache, (*IDS[:10], 2))
    assert not cache._passed
    check(cache)


def test_the_least_recently_used_goes_and_a_hit_keeps_only_what_it_hit() -> None:
    cache = PrefixCache(memory_bytes=room(9) + NODE_BYTES + BYTES + 5 * TOKEN_BYTES, snapshot_interval=50)
    put(cache, IDS[:4])
    put(cache, (1,) * 5)
    assert cache.match_prefix("a", (*IDS[:4], 1)).length == 4
    put(cache, IDS[:9])
    assert lengths(cache) == [4, 9]
    assert cache.match_prefix("a", (*IDS[:9], 1)).length == 9
    put(cache, (1,) * 5)
    assert lengths(cache) == [5, 9], "the shorter one on the way was not refreshed"


def test_what_is_too_large_displaces_nothing(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "model", max_bytes=AMPLE) as disk:
        cache = PrefixCache(memory_bytes=room(5), disk=disk)
        put(cache, IDS[:5])
        put(cache, IDS[:60])
        cache.insert_prompt("a", tuple(range(10_000)))
        assert lengths(cache) == [5] and cache.stats.evictions == 0
        hit = cache.match_prefix("a", IDS)
        assert hit.length == 60 and same(hit.state, IDS[:60]), "it went to the disk"


def test_learned_paths_are_bounded_too() -> None:
    cache = PrefixCache(memory_bytes=20 * NODE_BYTES)
    for number in range(100):
        cache.insert_prompt(f"tenant {number}", (number,) * 50)
        check(cache)
    assert cache.match_prefix("tenant 99", (99,) * 60) == PrefixMatch(0, None, None, 50)
    assert cache.match_prefix("tenant 0", (0,) * 60).shared_length == 0
    assert cache.stats.evictions == 0


def test_a_file_is_read_only_where_that_gains_enough(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "model", max_bytes=AMPLE) as disk:
        cache = PrefixCache(memory_bytes=AMPLE, disk=disk)
        for place in (20, 40, 40 + MIN_GAIN - 1, 40 + MIN_GAIN):
            put(cache, IDS[:place], logits=True)
        cache.flush()
        cache = PrefixCache(memory_bytes=AMPLE, disk=disk)
        put(cache, IDS[:40])
        assert cache.match_prefix("a", IDS[: 40 + MIN_GAIN - 1]).length == 40
        hit = cache.match_prefix("a", IDS[: 40 + MIN_GAIN])
        assert (
            hit.length == hit.shared_length == 40 + MIN_GAIN
            and same(hit.state, IDS[: hit.length])
            and hit.logits is not None
        )
        assert lengths(cache) == [40, 40 + MIN_GAIN], "it is in memory now"
        check(cache)


def test_logits_that_come_later_are_added_to_the_state_that_is_there() -> None:
    cache = PrefixCache(memory_bytes=AMPLE)
    put(cache, IDS[:7])
    first = cache.match_prefix("a", IDS[:8]).state
    assert cache.match_prefix("a", IDS[:7]).length == 0
    put(cache, IDS[:7], logits=True)
    put(cache, IDS[:7])
    hit = cache.match_prefix("a", IDS[:7])
    assert hit.state is first and hit.logits is not None and hit.logits.equal(logits_of(IDS[:7]))


def test_what_is_cleared_is_gone_from_the_disk_as_well(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "model", max_bytes=AMPLE) as disk:
        cache = PrefixCache(memory_bytes=room(50), disk=disk)
        for space in ("a", "b"):
            put(cache, IDS[:50], space)
            put(cache, IDS[:30], space)
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


def test_a_disk_that_cannot_be_used_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with DiskCache(tmp_path / "file" / "folder", "model", max_bytes=AMPLE) as disk:
        cache = PrefixCache(memory_bytes=room(60), disk=disk)
        put(cache, IDS[:50])
        put(cache, (1,) * 60)
        assert cache.match_prefix("a", IDS).length == 0 and cache.match_prefix("a", (1,) * 70).length == 60
        assert cache.plan_snapshots("a", IDS, 0, ()) == (100,)
        cache.clear("b")
        cache.flush()
    assert len(caplog.records) == 1
