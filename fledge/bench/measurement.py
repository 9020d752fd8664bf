"""Repeated measurements: summaries with their spread, timing, worker processes and the order of the cases."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from fledge.core.errors import FledgeError

C = TypeVar("C")  # a case

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
Job = Mapping[str, Any]
JobResult = dict[str, Any]


class Summary(TypedDict):
    """Several measurements of one quantity, as recorded."""

    median: float
    min: float
    max: float
    spread: float  # (max - min) / median
    values: list[float]


def summarize(values: Sequence[float]) -> Summary:
    """Return the median, the extremes and the spread of some measurements."""
    median, low, high = statistics.median(values), min(values), max(values)
    spread = (high - low) / median if median else 0.0
    return {"median": median, "min": low, "max": high, "spread": spread, "values": list(values)}


def summarize_key(results: Sequence[JobResult], key: str) -> Summary | None:
    """Return the summary of one key of all results, or None if a result lacks it."""
    values = [result.get(key) for result in results]
    return None if not values or None in values else summarize([float(value) for value in values if value is not None])


def time_calls(call: Callable[[], object], *, repeats: int, warmup: int = 1) -> list[float]:
    """Return the seconds of each of `repeats` calls, after `warmup` calls that are not counted."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def interleave(cases: Sequence[C], repeats: int) -> list[C]:
    """Return the order of all runs: A B C, B C A, C A B. Drift of the machine then affects all cases equally."""
    order = []
    for repeat in range(repeats):
        first = repeat % len(cases)
        order += [*cases[first:], *cases[:first]]
    return order


def run_in_fresh_process(module: str, job: Job, environment: Mapping[str, str]) -> JobResult:
    """Run `python -m module job.json` and return the JSON object that it prints as its last line.

    `environment` is added to the environment of this process. Raises FledgeError with the last line of standard error
    if the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="fledge-bench-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        process = subprocess.run(
            [sys.executable, "-m", module, str(file)],
            cwd=PACKAGE_PARENT,  # the same package is imported, installed or not
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        reason = (process.stderr.strip().splitlines() or ["no output"])[-1]
        raise FledgeError(f"the worker {module} failed with exit code {process.returncode}: {reason:.300}")
    result: JobResult = json.loads(lines[-1])
    return result


def run_worker(measure: Callable[[dict[str, Any]], JobResult]) -> None:
    """The main function of a worker module: read the job from the file in argv, print the result as one line."""
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
