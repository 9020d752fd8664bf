"""The scheduler: order, shares of the budget, no starvation, and short calls while sequences decode."""

from __future__ import annotations

import pytest
from fakes import random_finch

from fledge.engine.generation import make_initial_state
from fledge.engine.request import Request
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.engine.scheduler import MIN_PREFILL_TOKENS, LatencyModel, Scheduler
from fledge.engine.sequence import RequestState, Sequence
from fledge.models.state_slice import StateSlice

STATE = StateSlice(make_initial_state(random_finch(9)))


def make_request(request_id: int, rank: float, *, length: int = 100, n: int = 1, decoding: int = 0) -> RequestState:
    """A request that is still prefilling, or, if `decoding` is above 0, one with that many decoding sequences."""
    request = RequestState(request_id, Request(tuple(range(length)), n=n), rank, STATE, is_started=bool(decoding))
    request.sequences = [Sequence(choice, STATE, Sampler(SamplingParams()), 9, None, 7) for choice in range(decoding)]
    return request


def linear_latency() -> LatencyModel:
    """A model call takes 10 ms, and 1 ms more for every token."""
    latency = LatencyModel()
    for tokens in (1, 5, 30, 200):
        latency.update(tokens, 0.010 + 0.001 * tokens)
    return latency


def test_order_of_arrival_and_priority() -> None:
    scheduler = Scheduler(slots=2, priority_seconds=10)
    early, late = make_request(0, scheduler.compute_rank(100.0, 0)), make_request(1, scheduler.compute_rank(105.0, 0))
    urgent, aged = make_request(2, scheduler.compute_rank(108.0, 1)), make_request(3, scheduler.compute_rank(80.0, -1))
    assert [each.request_id for each in scheduler.select([late, early, urgent, aged])] == [3, 2]


def test_a_request_with_many_sequences_is_not_starved() -> None:
    """Later requests use the slots that are too few for it, and wait as soon as it fits."""
    scheduler = Scheduler(slots=4)
    running = [make_request(index, index, decoding=1) for index in range(2)]
    wide, later = make_request(2, 2, n=3), [make_request(index, index) for index in range(3, 9)]
    assert [each.request_id for each in scheduler.select([*running, wide, *later])] == [0, 1, 3, 4]
    assert [each.request_id for each in scheduler.select([running[0], wide, *later])] == [0, 2]


def test_prompts_share_half_of_the_budget_and_the_first_gets_the_rest() -> None:
    scheduler = Scheduler(prefill_chunk=80)
    scheduled = scheduler.schedule([make_request(index, index) for index in range(4)], LatencyModel())
    assert [len(tokens.ids) for tokens in scheduled] == [50, 10, 10, 10]
    short = [make_request(0, 0, length=4), make_request(1, 1), make_request(2, 2)]
    assert [len(tokens.ids) for tokens in scheduler.schedule(short, LatencyModel())] == [4, 63, 13]
    many = [make_request(index, index) for index in range(200)]
    assert all(tokens.ids for tokens in scheduler.schedule(many, LatencyModel())), "every prompt advances in every call"


def test_prefill_stops_at_snapshot_positions() -> None:
    prompt, other = make_request(0, 0), make_request(1, 1)
    prompt.snapshot_positions.extend((7, 20))
    scheduled = Scheduler(prefill_chunk=64).schedule([prompt, other], LatencyModel())
    assert [len(tokens.ids) for tokens in scheduled] == [7, 57]


def test_calls_stay_short_while_sequences_decode() -> None:
    scheduler, latency = Scheduler(prefill_chunk=512, latency_factor=3.0, burst_seconds=0.0), linear_latency()
    assert latency.tokens_within(3.0) == pytest.approx(23)  # three times 11 ms
    decoder, prompt = make_request(0, 0, decoding=4), make_request(1, 1, length=600)
    scheduled = scheduler.schedule([decoder, prompt], latency)
    assert [len(tokens.ids) for tokens in scheduled] == [1, 1, 1, 1, 18]
    assert all(tokens.ids == (7,) for tokens in scheduled[:4])
    assert len(scheduler.schedule([prompt], latency)[0].ids) == 512, "no sequence waits"
    crowd = make_request(0, 0, decoding=60)
    assert len(scheduler.schedule([crowd, prompt], latency)[-1].ids) == MIN_PREFILL_TOKENS, "prompts always advance"


def test_prompts_after_a_quiet_period_are_prefilled_in_one_call() -> None:
    scheduler, latency = Scheduler(prefill_chunk=512, burst_seconds=0.2), linear_latency()
    decoder, prompts = make_request(0, 0, decoding=2), [make_request(index, index, length=40) for index in range(1, 5)]
    assert [len(tokens.ids) for tokens in scheduler.schedule([decoder, *prompts], latency)[2:]] == [40] * 4, "0.16 s"
    late = make_request(9, 9, length=300)
    ordinary = max(MIN_PREFILL_TOKENS, int(latency.tokens_within(2.5)) - 2)
    assert len(scheduler.schedule([decoder, late], latency)[-1].ids) == ordinary, "the budget is spent"
    for _ in range(120):
        scheduler.schedule([decoder], latency)
    assert len(scheduler.schedule([decoder, late], latency)[-1].ids) == pytest.approx(ordinary + 200, abs=1)


def test_the_budget_never_becomes_negative() -> None:
    """Each prompt gets at least one token, even if that exceeds the ordinary duration."""
    scheduler, latency = Scheduler(burst_seconds=0.2), linear_latency()
    decoder, crowd = make_request(0, 0, decoding=2), [make_request(index, index, length=400) for index in range(1, 60)]
    for _ in range(300):
        scheduler.schedule([decoder, *crowd], latency)
    for _ in range(120):
        scheduler.schedule([decoder], latency)
    assert len(scheduler.schedule([decoder, crowd[0]], latency)[-1].ids) > 200


def test_the_budget_is_refilled_while_no_sequence_decodes() -> None:
    scheduler, latency = Scheduler(prefill_chunk=512, burst_seconds=0.2), linear_latency()
    decoder, prompt = make_request(0, 0, decoding=2), make_request(1, 1, length=5000)
    first, second = (len(scheduler.schedule([decoder, prompt], latency)[-1].ids) for _ in range(2))
    assert first > 200 > second
    scheduler.schedule([prompt], latency)
    assert len(scheduler.schedule([decoder, prompt], latency)[-1].ids) > 200


def test_few_calls_are_long_while_a_long_prompt_is_prefilled() -> None:
    scheduler, latency = Scheduler(prefill_chunk=512), linear_latency()
    decoder, prompt = make_request(0, 0, decoding=3), make_request(1, 1, length=100_000)
    sizes = [len(scheduler.schedule([decoder, prompt], latency)[-1].ids) for _ in range(1000)]
    long = [size for size in sizes if size > MIN_PREFILL_TOKENS + 10]
    assert 10 < len(long) < 45 and max(long) <= 220
    seconds = [latency.predict_seconds(3 + size) for size in sizes]
    assert sum(seconds) < 1.16 * 1000 * latency.predict_seconds(3 + MIN_PREFILL_TOKENS), (
        "long calls use the refilled budget only"
    )


@pytest.mark.parametrize("calls", [[], [(1, 0.01)], [(1, 0.01)] * 50, [(4, 0.01), (1, 0.02)]])
def test_unknown_latency(calls: list[tuple[int, float]]) -> None:
    latency = LatencyModel()
    for call in calls:
        latency.update(*call)
    assert latency.tokens_within(3.0) == 0.0


def test_the_latency_model_follows_changes() -> None:
    latency = linear_latency()
    for _ in range(100):
        for tokens in (1, 30):
            latency.update(tokens, 0.02 + 0.001 * tokens)
    assert latency.tokens_within(2.0) == pytest.approx(22.0, rel=0.02)
