"""Summaries, timing, the order of runs, and worker processes."""

from __future__ import annotations

import pytest

from fledge.bench.measurement import interleave, run_in_fresh_process, summarize, summarize_key, time_calls
from fledge.core.errors import FledgeError


def test_a_summary_has_a_median_and_a_spread() -> None:
    summary = {"median": 2.0, "min": 1.0, "max": 4.0, "spread": 1.5, "values": [4.0, 1.0, 2.0]}
    assert summarize([4.0, 1.0, 2.0]) == summary
    assert summarize([3.0])["spread"] == 0.0 and summarize([0.0])["spread"] == 0.0
    assert summarize_key([{"a": 4.0}, {"a": 1.0}, {"a": 2.0}], "a") == summary
    assert summarize_key([{"a": 4.0}, {}], "a") is None and summarize_key([{"a": None}], "a") is None


def test_warm_up_calls_are_not_counted() -> None:
    calls: list[int] = []
    seconds = time_calls(lambda: calls.append(1), repeats=3, warmup=2)
    assert len(calls) == 5 and len(seconds) == 3 and min(seconds) >= 0


def test_every_case_runs_once_per_repeat_and_in_every_position() -> None:
    assert interleave(["a", "b", "c"], 3) == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_the_error_of_a_worker_is_reported() -> None:
    message = r"fledge\.bench\.cpu\.worker failed with exit code 1: KeyError: 'program'"
    with pytest.raises(FledgeError, match=message):
        run_in_fresh_process("fledge.bench.cpu.worker", {}, {})
