"""Measured numbers: several of them, with their spread, and the record they end up in.

A figure is never one run. Here: the summary of repeated measurements, processes of their own for each, and the JSON
record. Not here: what is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fledge.core.errors import FledgeError

N = TypeVar("N")  # a name of what is measured

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
Report = Callable[[str, int, int], None]
"""Called with (what runs now, runs done, runs in all)."""

PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True)
class Sample:
    """Several measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one: half of the others are faster, half slower."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """How far the extremes lie apart, relative to the median."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0

    def summary(self) -> dict[str, float | list[float]]:
        """For the record."""
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "spread": self.spread,
            "values": list(self.values),
        }


def time_calls(call: Callable[[], object], *, repeats: int, warmup: int = 1) -> Sample:
    """Seconds of each of `repeats` calls, after `warmup` calls that do not count."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return Sample(tuple(seconds))


def peak_memory() -> int | None:
    """Bytes of RAM this process has held at most; None where the platform does not tell.

    Linux counts in `ru_maxrss` what the parent held when it started this process; VmHWM begins anew.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT


def in_fresh_process(module: str, job: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run `python -m module job.json` and return the JSON object that is the last line it prints.

    `environment` is added to that of this process. Raises FledgeError with the end of what the process wrote where it
    fails.
    """
    with tempfile.TemporaryDirectory(prefix="fledge-bench-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        run = subprocess.run(
            [sys.executable, "-m", module, str(file)],
            cwd=PACKAGE_PARENT,  # so that the same package is found, installed or not
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        last = (run.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise FledgeError(f"the measuring process {module} failed with exit code {run.returncode}: {last:.300}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def interleaved(names: Sequence[N], repeats: int) -> list[tuple[int, N]]:
    """A B C, then B C A, then C A B: whatever drifts on the machine reaches every name alike, in every place."""
    order = []
    for repeat in range(repeats):
        turn = repeat % len(names)
        order += [(repeat, name) for name in (*names[turn:], *names[:turn])]
    return order
