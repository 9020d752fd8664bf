"""Who takes part in a call: order, shares, no starvation, and calls that stay short for those who write."""

from __future__ import annotations

import pytest
from fakes import random_finch

from fledge.engine.generation import make_initial_state
from fledge.engine.request import Request
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.engine.scheduler import MIN_PREFILL_TOKENS, LatencyModel, Scheduler
from fledge.engine.sequence import RequestState, Sequence
from fledge.models.state_slice import StateSlice

ROW = StateSlice(make_initial_state(random_finch(9)))


def task(number: int, rank: float, *, length: int = 100, n: int = 1, writes: int = 0) -> RequestState:
    """A request that is read, or one with `writes` continuations under way."""
    made = RequestState(number, Request(tuple(range(length)), n=n), rank, ROW, is_started=bool(writes))
    made.sequences = [Sequence(choice, ROW, Sampler(SamplingParams()), 9, None, 7) for choice in range(writes)]
    return made


def even(pace: LatencyModel) -> LatencyModel:
    """A model that takes 10 ms and 1 ms more for every token."""
    for tokens in (1, 5, 30, 200):
        pace.update(tokens, 0.010 + 0.001 * tokens)
    return pace


def test_who_comes_first_goes_first_and_priority_is_a_lead_in_seconds() -> None:
    scheduler = Scheduler(slots=2, priority_seconds=10)
    early, late = task(0, scheduler.compute_rank(100.0, 0)), task(1, scheduler.compute_rank(105.0, 0))
    urgent, aged = task(2, scheduler.compute_rank(108.0, 1)), task(3, scheduler.compute_rank(80.0, -1))
    assert [found.request_id for found in scheduler.select([late, early, urgent, aged])] == [3, 2]


def test_a_wide_request_is_not_passed_over_for_ever() -> None:
    """Narrow ones that came later take the slots it cannot use, and give way as soon as it fits."""
    scheduler = Scheduler(slots=4)
    running = [task(number, number, writes=1) for number in range(2)]
    wide, later = task(2, 2, n=3), [task(number, number) for number in range(3, 9)]
    assert [found.request_id for found in scheduler.select([*running, wide, *later])] == [0, 1, 3, 4]
    assert [found.request_id for found in scheduler.select([running[0], wide, *later])] == [0, 2]


def test_prompts_share_half_of_the_budget_and_the_first_takes_the_rest() -> None:
    scheduler = Scheduler(prefill_chunk=80)
    pieces = scheduler.schedule([task(number, number) for number in range(4)], LatencyModel())
    assert [len(piece.ids) for piece in pieces] == [50, 10, 10, 10]
    short = [task(0, 0, length=4), task(1, 1), task(2, 2)]
    assert [len(piece.ids) for piece in scheduler.schedule(short, LatencyModel())] == [4, 63, 13]
    many = [task(number, number) for number in range(200)]
    assert all(piece.ids for piece in scheduler.schedule(many, LatencyModel())), "everybody comes forward in every call"


def test_reading_stops_where_a_snapshot_is_due() -> None:
    reader, other = task(0, 0), task(1, 1)
    reader.snapshot_positions.extend((7, 20))
    assert [len(piece.ids) for piece in Scheduler(prefill_chunk=64).schedule([reader, other], LatencyModel())] == [
        7,
        57,
    ]


def test_calls_stay_short_while_somebody_writes() -> None:
    scheduler, pace = Scheduler(prefill_chunk=512, latency_factor=3.0, burst_seconds=0.0), even(LatencyModel())
    assert pace.tokens_within(3.0) == pytest.approx(23)  # three times 11 ms
    writer, reader = task(0, 0, writes=4), task(1, 1, length=600)
    pieces = scheduler.schedule([writer, reader], pace)
    assert [len(piece.ids) for piece in pieces] == [1, 1, 1, 1, 18]
    assert all(piece.ids == (7,) for piece in pieces[:4])
    assert len(scheduler.schedule([reader], pace)[0].ids) == 512, "nobody is kept waiting"
    crowd = task(0, 0, writes=60)
    assert len(scheduler.schedule([crowd, reader], pace)[-1].ids) == MIN_PREFILL_TOKENS, "reading always comes forward"


def test_prompts_that_come_after_a_quiet_time_are_read_at_once() -> None:
    scheduler, pace = Scheduler(prefill_chunk=512, burst_seconds=0.2), even(LatencyModel())
    writer, readers = task(0, 0, writes=2), [task(number, number, length=40) for number in range(1, 5)]
    assert [len(piece.ids) for piece in scheduler.schedule([writer, *readers], pace)[2:]] == [40] * 4, "0.16 s"
    late = task(9, 9, length=300)
    ordinary = max(MIN_PREFILL_TOKENS, int(pace.tokens_within(2.5)) - 2)
    assert len(scheduler.schedule([writer, late], pace)[-1].ids) == ordinary, "the writers have halted just now"
    for _ in range(120):
        scheduler.schedule([writer], pace)
    assert len(scheduler.schedule([writer, late], pace)[-1].ids) == pytest.approx(ordinary + 200, abs=1)


def test_more_readers_than_a_call_has_room_for_make_no_debts() -> None:
    """Each of them reads a token at least, whatever is ordinary."""
    scheduler, pace = Scheduler(burst_seconds=0.2), even(LatencyModel())
    writer, crowd = task(0, 0, writes=2), [task(number, number, length=400) for number in range(1, 60)]
    for _ in range(300):
        scheduler.schedule([writer, *crowd], pace)
    for _ in range(120):
        scheduler.schedule([writer], pace)
    assert len(scheduler.schedule([writer, crowd[0]], pace)[-1].ids) > 200


def test_where_nobody_writes_nobody_is_kept_waiting() -> None:
    scheduler, pace = Scheduler(prefill_chunk=512, burst_seconds=0.2), even(LatencyModel())
    writer, reader = task(0, 0, writes=2), task(1, 1, length=5000)
    assert (
        len(scheduler.schedule([writer, reader], pace)[-1].ids)
        > 200
        > len(scheduler.schedule([writer, reader], pace)[-1].ids)
    )
    scheduler.schedule([reader], pace)
    assert len(scheduler.schedule([writer, reader], pace)[-1].ids) > 200


def test_of_many_calls_few_are_long() -> None:
    """However much there is to read."""
    scheduler, pace = Scheduler(prefill_chunk=512), even(LatencyModel())
    writer, reader = task(0, 0, writes=3), task(1, 1, length=100_000)
    sizes = [len(scheduler.schedule([writer, reader], pace)[-1].ids) for _ in range(1000)]
    long = [size for size in sizes if size > MIN_PREFILL_TOKENS + 10]
    assert 10 < len(long) < 45 and max(long) <= 220
    seconds = [pace.predict_seconds(3 + size) for size in sizes]
    assert sum(seconds) < 1.16 * 1000 * pace.predict_seconds(3 + MIN_PREFILL_TOKENS), "what was saved, and no more"


@pytest.mark.parametrize("calls", [[], [(1, 0.01)], [(1, 0.01)] * 50, [(4, 0.01), (1, 0.02)]])
def test_a_pace_that_cannot_be_told_is_slow(calls: list[tuple[int, float]]) -> None:
    pace = LatencyModel()
    for call in calls:
        pace.update(*call)
    assert pace.tokens_within(3.0) == 0.0


def test_the_pace_follows_what_changes() -> None:
    pace = even(LatencyModel())
    for _ in range(100):
        for tokens in (1, 30):
            pace.update(tokens, 0.02 + 0.001 * tokens)
    assert pace.tokens_within(2.0) == pytest.approx(22.0, rel=0.02)
