"""Summaries, order of runs, processes of their own."""

from __future__ import annotations

import pytest

from fledge.bench.harness import (
    Sample,
    in_fresh_process,
    interleaved,
    peak_memory,
    time_calls,
)
from fledge.core.errors import FledgeError


def test_a_sample_has_a_median_and_a_spread() -> None:
    sample = Sample((4.0, 1.0, 2.0))
    assert (sample.median, sample.spread) == (2.0, 1.5)
    summary = {"median": 2.0, "min": 1.0, "max": 4.0, "spread": 1.5, "values": [4.0, 1.0, 2.0]}
    assert sample.summary() == summary
    assert Sample((3.0,)).spread == 0.0 and Sample((0.0,)).spread == 0.0


def test_warm_up_calls_do_not_count() -> None:
    calls: list[int] = []
    sample = time_calls(lambda: calls.append(1), repeats=3, warmup=2)
    assert len(calls) == 5 and len(sample.values) == 3 and min(sample.values) >= 0


def test_every_configuration_comes_once_a_repeat_and_in_every_place() -> None:
    order = interleaved(["a", "b", "c"], 3)
    assert order == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "c"), (2, "a"), (2, "b")]


def test_peak_memory_is_that_of_this_process() -> None:
    peak = peak_memory()
    assert peak is None or 1 << 20 < peak < 1 << 40


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(FledgeError, match=r"fledge\.bench\.cpu_worker failed with exit code 1: KeyError: 'threads'"):
        in_fresh_process("fledge.bench.cpu_worker", {}, {})
