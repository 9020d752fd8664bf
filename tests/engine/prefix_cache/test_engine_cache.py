"""The engine with a cache: the tokens of a cold run, and nothing read twice that a snapshot covers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from native_library import needs_native
from test_engine import EOS, PARAMS, drawn, packed, plain, prompt, run

from fledge.engine.engine import Engine
from fledge.engine.prefix_cache.cache import PrefixCache
from fledge.engine.prefix_cache.disk_cache import DiskCache
from fledge.engine.request import Request
from fledge.engine.scheduler import Scheduler

MEMORY = 1 << 22


def engine_of(cache: PrefixCache, version: str = "6.0") -> Engine:
    return Engine(packed(version), eos_id=EOS, scheduler=Scheduler(slots=5, prefill_chunk=64), cache=cache)


def edited(ids: tuple[int, ...], chooser: random.Random) -> tuple[int, ...]:
    """A prompt as people change them: longer, cut, or with another word in the middle."""
    place = chooser.randrange(1, max(len(ids), 2))
    more = prompt(chooser.choice([1, 5, 40]), chooser.randrange(10**6))
    return chooser.choice([ids + more, ids[:place], ids[:place] + more + ids[place + 1 :], ids])


@needs_native
@pytest.mark.parametrize("version", ["4", "5.2", "6.0"])
@pytest.mark.parametrize("disk", [False, True])
def test_known_beginnings_change_no_token(version: str, disk: bool, tmp_path: Path) -> None:
    """Random edits, two tenants, a memory too small for all, several requests at once, some aborted."""
    chooser = random.Random(version + str(disk))
    snapshots = DiskCache(tmp_path, "model", max_bytes=MEMORY) if disk else None
    cache = PrefixCache(memory_bytes=MEMORY // 64, disk=snapshots, snapshot_interval=32)
    engine = engine_of(cache, version)
    known = [prompt(90, number) for number in range(3)]
    for _ in range(12):
        asked = {}
        for _ in range(4):
            ids = edited(chooser.choice(known), chooser)
            known.append(ids)
            params = replace(PARAMS, seed=chooser.randrange(100), max_tokens=4)
            marks = tuple(sorted(chooser.sample(range(1, len(ids) + 1), min(2, len(ids)))))
            request = Request(ids, params, cache_namespace=chooser.choice(["a", "b"]), message_ends=marks)
            asked[engine.add(request)] = request
        if chooser.random() < 0.3:
            engine.step()
            gone = chooser.choice(list(asked))
            engine.abort(gone)
            del asked[gone]
            continue
        found = run(engine)
        for number, request in asked.items():
            assert drawn(found[number, 0]) == [token for token, _ in plain(engine.model, request)]
    assert cache.stats.hits > 5 and cache.stats.evictions > 0
    if snapshots is not None:
        cache.flush()
        snapshots.close()


@needs_native
def test_only_what_is_new_is_read() -> None:
    engine = engine_of(PrefixCache(memory_bytes=MEMORY, snapshot_interval=32))
    first = Request(prompt(100, 1), PARAMS, cache_namespace="a", message_ends=(70,))
    run_of(engine, first)
    assert engine.stats.prefill_tokens == 100
    for ids, cached in (
        (first.ids, 100),  # again: not even its last token
        (first.ids + prompt(9, 2), 100),
        (first.ids[:80] + prompt(9, 3), 70),  # edited after the end of a message
        (first.ids[:60] + prompt(9, 4), 32),
        (first.ids[:60] + prompt(9, 5), 60),  # the place where the one before left known ground
    ):
        before = engine.stats.prefill_tokens
        assert run_of(engine, Request(ids, PARAMS, cache_namespace="a")) == cached
        assert engine.stats.prefill_tokens - before == len(ids) - cached
    assert run_of(engine, replace(first, cache_namespace="b")) == 0, "another tenant's prompts are not known"
    assert run_of(engine, replace(first, cache_namespace=None)) == 0


@needs_native
def test_what_was_read_is_known_after_a_restart(tmp_path: Path) -> None:
    request = Request(prompt(100, 1), PARAMS, cache_namespace="a")
    tokens = []
    for cached in (0, 100):
        with DiskCache(tmp_path, "model", max_bytes=1 << 24) as disk:
            cache = PrefixCache(memory_bytes=MEMORY, disk=disk, snapshot_interval=32)
            engine = engine_of(cache)
            number = engine.add(request)
            outputs = run(engine)[number, 0]
            tokens.append(drawn(outputs))
            assert outputs[0].cached_tokens == cached
            cache.flush()
    assert tokens[0] == tokens[1]


def run_of(engine: Engine, request: Request) -> int:
    """The tokens of the prompt that the cache spared; the text is that of a cold run."""
    number = engine.add(request)
    outputs = run(engine)[number, 0]
    assert drawn(outputs) == [token for token, _ in plain(engine.model, request)]
    return outputs[0].cached_tokens
