"""The framework of all benchmarks: a dataclass of settings, cases that run in turn, and one JSON record as the result.

A benchmark is a frozen dataclass whose fields are its settings. Its `measure` method runs the cases through a `Suite`
and writes the metrics into the record of the suite. Tables, summaries and plots are made from the record alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

from fledge.bench.measurement import Job, JobResult, interleave, run_in_fresh_process
from fledge.core.errors import FledgeError, UsageError
from fledge.core.machine import machine_facts

C = TypeVar("C")  # a case
R = TypeVar("R")  # the result of one run of a case

Record = dict[str, Any]
Progress = Callable[[str, int, int], None]
"""Called with (label of the current run, finished runs, all runs)."""


class Benchmark(ABC):
    """The settings of one benchmark, and how it is measured. Subclasses are frozen dataclasses."""

    kind: ClassVar[str]  # "benchmark" in the record

    @abstractmethod
    def measure(self, suite: Suite) -> None:
        """Run all cases and write the results to `suite.record`."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as they are recorded, without paths: a folder may identify a person."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return values

    def require_at_least(self, least: float, *names: str) -> None:
        """Raise UsageError if one of these settings is below `least`. None is allowed."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; it must be at least {least}")


@dataclass
class CaseRuns:
    """The results of one case. `error` is the message of a baseline that failed; it has no results."""

    results: list[Any]
    error: str = ""


class Suite:
    """One run of a benchmark: its progress and its record, which is saved after each part."""

    def __init__(self, benchmark: Benchmark, command: str, progress: Progress, save: Callable[[Record], None]) -> None:
        self._progress, self._save = progress, save
        self.finished_runs, self.total_runs = 0, 0
        self.threads: int | None = None  # of OpenMP in the workers of `interleave_jobs`; None: its default
        self.record: Record = {
            "benchmark": benchmark.kind,
            "command": command,
            "machine": machine_facts(),  # now, because the benchmark itself is load
            "peers": {},
            "settings": benchmark.settings(),
            "notes": [],
        }

    def save(self) -> None:
        """Save the record so far. A benchmark can run for hours, and an interruption should not lose it all."""
        self._save(self.record)

    def report(self, label: str) -> None:
        """Show what runs now."""
        self._progress(label, self.finished_runs, self.total_runs)

    def worker(self, module: str, job: Job, environment: Mapping[str, str] | None = None) -> JobResult:
        """Run a job in a new process."""
        return run_in_fresh_process(module, job, environment or {})

    def interleave_jobs(
        self, module: str, jobs: Mapping[C, Job], repeats: int, label: str, baselines: Collection[C] = ()
    ) -> dict[C, CaseRuns]:
        """Run each job in new processes of a worker module, `repeats` times in turn. See `interleave`."""
        environment = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        calls = {case: partial(self.worker, module, job, environment) for case, job in jobs.items()}
        return self.interleave(calls, repeats, label, baselines)

    def run(self, label: str, call: Callable[[], R]) -> R:
        """Run one call as one step of the progress."""
        self.report(label)
        try:
            return call()
        finally:
            self.finished_runs += 1

    def interleave(
        self, cases: Mapping[C, Callable[[], R]], repeats: int, label: str = "{}", baselines: Collection[C] = ()
    ) -> dict[C, CaseRuns]:
        """Run all cases `repeats` times in turn. A case in `baselines` that fails does not end the run."""
        runs = {case: CaseRuns([]) for case in cases}
        for case in interleave(list(cases), repeats):
            try:
                if not runs[case].error:
                    runs[case].results.append(self.run(label.format(case), cases[case]))
                else:
                    self.finished_runs += 1
            except FledgeError as error:
                if case not in baselines:
                    raise
                runs[case] = CaseRuns([], str(error))
        return runs


def run_benchmark(
    benchmark: Benchmark,
    command: str = "",
    progress: Progress = lambda *_: None,
    save: Callable[[Record], None] = lambda _: None,
) -> Record:
    """Measure a benchmark and return its record. Raises FledgeError if a run of Fledge itself fails.

    command: the command line that repeats it. save: called with the record so far after each part.
    """
    suite = Suite(benchmark, command, progress, save)
    benchmark.measure(suite)
    suite.save()
    return suite.record
