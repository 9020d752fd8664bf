"""The framework: progress, the record that grows, and baselines that fail."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from fledge.bench.suite import Benchmark, Suite, run_benchmark
from fledge.core.errors import FledgeError, UsageError


@dataclass(frozen=True)
class FakeBenchmark(Benchmark):
    """Two programs. One of them may fail in its second run."""

    kind: ClassVar[str] = "fake"

    failing: str = ""
    repeats: int = 3

    def __post_init__(self) -> None:
        self.require_at_least(1, "repeats")

    def measure(self, suite: Suite) -> None:
        """Record which program ran when."""
        order: list[str] = []

        def run(name: str) -> int:
            order.append(name)
            if name == self.failing and order.count(name) == 2:
                raise FledgeError(f"{name} crashed")
            return len(order)

        suite.total_runs = 2 * self.repeats
        calls = {name: lambda name=name: run(name) for name in ("ours", "theirs")}
        runs = suite.interleave(calls, self.repeats, "now {}", baselines={"theirs"})
        suite.record["rows"] = {name: case.error or case.results for name, case in runs.items()}
        suite.record["order"] = order


def test_the_record_and_the_progress() -> None:
    progress: list[Any] = []
    saved: list[Any] = []
    record = run_benchmark(FakeBenchmark(), "the command", lambda *call: progress.append(call), saved.append)
    assert list(json.loads(json.dumps(record)))[:6] == [
        *("benchmark", "command", "machine", "peers", "settings", "notes")
    ]
    assert record["settings"] == {"failing": "", "repeats": 3} and record["command"] == "the command"
    assert record["rows"] == {"ours": [1, 4, 5], "theirs": [2, 3, 6]} and saved == [record]
    assert progress[:2] == [("now ours", 0, 6), ("now theirs", 1, 6)] and progress[-1][1:] == (5, 6)


def test_a_baseline_that_fails_is_recorded_and_not_run_again() -> None:
    record = run_benchmark(FakeBenchmark(failing="theirs"))
    assert record["rows"] == {"ours": [1, 4, 5], "theirs": "theirs crashed"}
    assert record["order"].count("theirs") == 2


def test_a_failure_of_fledge_ends_the_run() -> None:
    with pytest.raises(FledgeError, match="ours crashed"):
        run_benchmark(FakeBenchmark(failing="ours"))


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="repeats is 0; it must be at least 1"):
        FakeBenchmark(repeats=0)
