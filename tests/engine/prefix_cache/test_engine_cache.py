"""The engine with a prefix cache: the tokens do not change, and cached prefixes are not computed again."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from engine_runs import PARAMS, native_model, random_prompt, reference_ids, run, tokens_of
from fakes import EOS
from native_library import needs_native

from fledge.engine.engine import Engine
from fledge.engine.prefix_cache.cache import PrefixCache
from fledge.engine.prefix_cache.disk_cache import DiskCache
from fledge.engine.request import Request
from fledge.engine.scheduler import Scheduler

MEMORY = 1 << 22


def engine_of(cache: PrefixCache, version: str = "6.0") -> Engine:
    return Engine(native_model(version), eos_id=EOS, scheduler=Scheduler(slots=5, prefill_chunk=64), cache=cache)


def edited(ids: tuple[int, ...], chooser: random.Random) -> tuple[int, ...]:
    """A prompt after an edit: extended, cut, or with other tokens in the middle."""
    position = chooser.randrange(1, max(len(ids), 2))
    more = random_prompt(chooser.choice([1, 5, 40]), chooser.randrange(10**6))
    return chooser.choice([ids + more, ids[:position], ids[:position] + more + ids[position + 1 :], ids])


@needs_native
@pytest.mark.parametrize("version", ["4", "5.2", "6.0"])
@pytest.mark.parametrize("disk", [False, True])
def test_the_cache_changes_no_token(version: str, disk: bool, tmp_path: Path) -> None:
    """Random edits, two namespaces, too little memory for all, several requests in a batch, some aborted."""
    chooser = random.Random(version + str(disk))
    snapshots = DiskCache(tmp_path, "model", max_bytes=MEMORY) if disk else None
    cache = PrefixCache(memory_bytes=MEMORY // 64, disk=snapshots, snapshot_interval=32)
    engine = engine_of(cache, version)
    prompts = [random_prompt(90, seed) for seed in range(3)]
    for _ in range(12):
        submitted = {}
        for _ in range(4):
            ids = edited(chooser.choice(prompts), chooser)
            prompts.append(ids)
            params = replace(PARAMS, seed=chooser.randrange(100), max_tokens=4)
            message_ends = tuple(sorted(chooser.sample(range(1, len(ids) + 1), min(2, len(ids)))))
            request = Request(ids, params, cache_namespace=chooser.choice(["a", "b"]), message_ends=message_ends)
            submitted[engine.add(request)] = request
        if chooser.random() < 0.3:
            engine.step()
            aborted = chooser.choice(list(submitted))
            engine.abort(aborted)
            del submitted[aborted]
            continue
        found = run(engine)
        for request_id, request in submitted.items():
            assert tokens_of(found[request_id, 0]) == reference_ids(engine.model, request)
    assert cache.stats.hits > 5 and cache.stats.evictions > 0
    if snapshots is not None:
        cache.flush()
        snapshots.close()


@needs_native
def test_only_the_new_part_of_a_prompt_is_computed() -> None:
    engine = engine_of(PrefixCache(memory_bytes=MEMORY, snapshot_interval=32))
    first = Request(random_prompt(100, 1), PARAMS, cache_namespace="a", message_ends=(70,))
    cached_tokens_of(engine, first)
    assert engine.stats.prefill_tokens == 100
    for ids, cached in (
        (first.ids, 100),  # the same prompt: not even its last token is computed
        (first.ids + random_prompt(9, 2), 100),
        (first.ids[:80] + random_prompt(9, 3), 70),  # edited after the end of a message
        (first.ids[:60] + random_prompt(9, 4), 32),
        (first.ids[:60] + random_prompt(9, 5), 60),  # where the previous prompt diverged
    ):
        before = engine.stats.prefill_tokens
        assert cached_tokens_of(engine, Request(ids, PARAMS, cache_namespace="a")) == cached
        assert engine.stats.prefill_tokens - before == len(ids) - cached
    assert cached_tokens_of(engine, replace(first, cache_namespace="b")) == 0, "namespaces are separate"
    assert cached_tokens_of(engine, replace(first, cache_namespace=None)) == 0


@needs_native
def test_snapshots_survive_a_restart(tmp_path: Path) -> None:
    request = Request(random_prompt(100, 1), PARAMS, cache_namespace="a")
    tokens = []
    for cached in (0, 100):
        with DiskCache(tmp_path, "model", max_bytes=1 << 24) as disk:
            cache = PrefixCache(memory_bytes=MEMORY, disk=disk, snapshot_interval=32)
            engine = engine_of(cache)
            request_id = engine.add(request)
            outputs = run(engine)[request_id, 0]
            tokens.append(tokens_of(outputs))
            assert outputs[0].cached_tokens == cached
            cache.flush()
    assert tokens[0] == tokens[1]


def cached_tokens_of(engine: Engine, request: Request) -> int:
    """The cached tokens of the prompt; checks that the sampled tokens are those without a cache."""
    request_id = engine.add(request)
    outputs = run(engine)[request_id, 0]
    assert tokens_of(outputs) == reference_ids(engine.model, request)
    return outputs[0].cached_tokens
