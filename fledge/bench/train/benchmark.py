"""The training benchmark: an RWKV, a transformer of the same size, and other implementations of the RWKV.

A step is forward with loss, backward and the optimizer's update, always with the same number of tokens: many short rows
or one long row. Every measurement has its own process, and the programs of one length run in turn.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import torch

from fledge.bench.flops import count_matrix_weights, training_operations
from fledge.bench.measurement import Job, summarize, summarize_key
from fledge.bench.random_model import config_of_shape
from fledge.bench.suite import Benchmark, CaseRuns, Suite
from fledge.bench.train.metrics import compute_targets, model_flop_utilization, step_metrics
from fledge.checkpoint import get_expected_shapes
from fledge.core.device import choose_device
from fledge.core.errors import UsageError
from fledge.core.machine import package_version
from fledge.models import ModelConfig
from fledge.native.library import why_missing

C = TypeVar("C")  # a case

DTYPES = ("fp32", "bf16")
PRODUCT = "product"
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
KERNEL_LENGTH = 1024  # tokens
KERNEL_ROWS = (1, 8)
KERNEL_CALLS = 3  # per worker
PASSING = {"window": 1024, "tbptt_windows": 2, "steps": 2}
WORKER = "fledge.bench.train.worker"


@dataclass(frozen=True)
class TrainCase:
    """One program with matrix products in one dtype, on texts of one length."""

    program: str  # "finch" or "eagle", "transformer"; other implementations of the RWKV: "chunked", "loop", "fla"
    dtype: str  # "fp32" or "bf16"
    length: int  # tokens of context
    rows: int  # texts per step


@dataclass(frozen=True)
class TrainBenchmark(Benchmark):
    """Settings of the training benchmark."""

    kind: ClassVar[str] = "train"

    shape: str = "L6-D256"
    family: str = "finch"
    vocab: int = 8192
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    tokens: int = 16384  # per step
    dtypes: tuple[str, ...] = DTYPES
    loop: int = 1024  # the longest texts of the plain loop; 0 leaves the loop out
    kernel: bool = True  # also measure the recurrence alone
    passing: int = 65536  # tokens of a row that is trained with state passing; 0 leaves it out
    steps: int = 2  # per worker
    repeats: int = 3  # workers for each program, dtype and length
    threads: int | None = None  # None: torch's default
    device: str | None = None  # None: a GPU if there is one

    def __post_init__(self) -> None:
        config_of_shape(self.shape, self.vocab, self.family)
        if not self.dtypes or set(self.dtypes) - set(DTYPES):
            raise UsageError(f"dtypes is {','.join(self.dtypes)!r}; choose from {','.join(DTYPES)}")
        self.require_at_least(1, "vocab", "tokens", "steps", "repeats", "threads")
        shortest = PASSING["window"] * PASSING["tbptt_windows"]
        if self.passing and self.passing <= shortest:
            raise UsageError(
                f"passing is {self.passing}; it must be above the {shortest} tokens of the short row, or 0"
            )
        if not self.lengths or any(length < 1 or self.tokens % length for length in self.lengths):
            lengths = ",".join(map(str, self.lengths))
            raise UsageError(f"lengths is {lengths!r}; each must divide the {self.tokens} tokens of a step")

    @property
    def passing_lengths(self) -> tuple[int, ...]:
        """The tokens of the short row and of the long row."""
        return (PASSING["window"] * PASSING["tbptt_windows"], self.passing) if self.passing else ()

    @property
    def configs(self) -> dict[str, ModelConfig]:
        """Program -> its model."""
        rwkv = config_of_shape(self.shape, self.vocab, self.family)
        implementations = (self.family, "chunked", "loop", "fla")
        return {**dict.fromkeys(implementations, rwkv), "transformer": rwkv.as_transformer()}

    def measure(self, suite: Suite) -> None:
        """Measure the recurrence alone, state passing, then every dtype and length."""
        TrainRun(self, suite).measure()


def find_programs(benchmark: TrainBenchmark, device: str) -> tuple[list[str], list[str]]:
    """Return the programs besides the RWKV and the transformer, and notes on the programs that are left out."""
    programs, notes = (["loop"] if benchmark.loop else []), []
    if has_native_recurrence(device):
        programs.insert(0, "chunked")  # the default where there is no native library
    if benchmark.family != "finch":
        notes.append("flash-linear-attention is left out: it has no RWKV-5")
    elif not device.startswith("cuda"):
        notes.append("flash-linear-attention is left out: it runs on GPUs only")
    elif importlib.util.find_spec("fla") is None:
        notes.append("flash-linear-attention is left out: `pip install flash-linear-attention`")
    else:
        programs.append("fla")
    return programs, notes


def plan_cases(benchmark: TrainBenchmark, programs: list[str]) -> list[TrainCase]:
    """Return every program at every length. "chunked" and "loop" run in the first dtype only, the loop with one row.

    The loop stores one state per token for its gradient. A whole step of them would not fit into most machines.
    """
    cases = []
    for dtype in benchmark.dtypes:
        first = dtype == benchmark.dtypes[0]
        for length in benchmark.lengths:
            rows = benchmark.tokens // length
            names = [benchmark.family, "transformer"]
            names += [name for name in programs if name == "fla" or (name == "chunked" and first)]
            cases += [TrainCase(name, dtype, length, rows) for name in names]
            if "loop" in programs and length <= benchmark.loop and first:
                cases.append(TrainCase("loop", dtype, length, 1))
    return cases


def has_native_recurrence(device: str) -> bool:
    """Whether the native library computes the recurrence on this device."""
    return device == "cpu" and why_missing() is None


class TrainRun:
    """The workers of one training benchmark, and the record they fill."""

    def __init__(self, benchmark: TrainBenchmark, suite: Suite) -> None:
        self._benchmark, self._suite = benchmark, suite
        self._device = str(choose_device(benchmark.device)[0])
        self._threads = suite.threads = benchmark.threads or torch.get_num_threads()
        self._gpu = torch.cuda.get_device_name(self._device) if self._device.startswith("cuda") else ""
        programs, notes = find_programs(benchmark, self._device)
        self._cases = plan_cases(benchmark, programs)
        native = ["native"] if has_native_recurrence(self._device) else []
        self._backends = [*native, "chunked", "reference"]
        kernel_runs = len(KERNEL_ROWS) * len(self._backends) if benchmark.kernel else 0
        products = len(benchmark.dtypes) * len(benchmark.lengths)
        runs = len(self._cases) + products + kernel_runs + len(benchmark.passing_lengths)
        suite.total_runs = benchmark.repeats * runs
        if "fla" in programs:
            suite.record["peers"] = {"fla": package_version("flash-linear-attention")}
        suite.record |= {
            "device": self._gpu or self._device,
            "threads": self._threads,
            "notes": notes,
            "models": {name: _describe_model(benchmark.configs[name]) for name in (benchmark.family, "transformer")},
            "groups": [],
            "kernel": [],
            "passing": {"settings": PASSING, "peak_bytes": {}},
        }

    def measure(self) -> None:
        """Measure everything and save the record after each part."""
        record, benchmark = self._suite.record, self._benchmark
        for rows in KERNEL_ROWS if benchmark.kernel else ():
            record["kernel"].append(self._measure_kernel(rows))
            self._suite.save()
        if benchmark.passing:
            record["passing"]["peak_bytes"] = self._measure_passing()
            self._suite.save()
        for dtype in benchmark.dtypes:
            for length in benchmark.lengths:
                cases = [case for case in self._cases if (case.dtype, case.length) == (dtype, length)]
                record["groups"].append(self._measure_group(cases))
                self._suite.save()

    def _measure_group(self, cases: list[TrainCase]) -> dict[str, Any]:
        """Run all programs of one dtype and length, and torch's matrix product, in turn."""
        dtype, length, configs = cases[0].dtype, cases[0].length, self._benchmark.configs
        steps = self._benchmark.steps
        size = PRODUCT_SIZE.get(self._device.partition(":")[0], PRODUCT_SIZE["cpu"])
        jobs: dict[str, dict[str, Any]] = {
            case.program: {"kind": "step", **asdict(case), "config": asdict(configs[case.program]), "steps": steps}
            for case in cases
        }
        jobs[PRODUCT] = {"kind": PRODUCT, "dtype": dtype, "size": size}
        runs = self._run_jobs(jobs, f"{dtype}, {length} tokens, {{}}")
        product = summarize([result["operations_per_s"] for result in runs[PRODUCT].results])
        programs: dict[str, dict[str, Any]] = {}
        for case in cases:
            run = runs[case.program]
            if run.error:
                programs[case.program] = {"rows": case.rows, "error": run.error}
                continue
            operations = training_operations(configs[case.program], length)
            metrics = step_metrics(run.results, length * case.rows, operations)
            rate = metrics["operations_per_s"]
            utilization = model_flop_utilization(rate, self._gpu, dtype)
            shares = {"share_of_product": rate / product["median"], "model_flop_utilisation": utilization}
            programs[case.program] = {"rows": case.rows, **metrics, **shares}
        return {
            "dtype": dtype,
            "length": length,
            "product_operations_per_s": product,
            "programs": programs,
            "targets": compute_targets(programs, self._benchmark.family),
        }

    def _measure_kernel(self, rows: int) -> dict[str, Any]:
        """Run the recurrence of one layer, forward and backward, with every backend in turn."""
        config = self._benchmark.configs[self._benchmark.family]
        shape = [rows, KERNEL_LENGTH, config.n_head, config.head_size]
        jobs: dict[str, dict[str, Any]] = {
            backend: {"kind": "kernel", "backend": backend, "shape": shape, "repeats": KERNEL_CALLS}
            for backend in self._backends
        }
        runs = self._run_jobs(jobs, "the recurrence alone, {}")
        seconds = {
            backend: summarize([statistics.median(result["seconds"]) for result in run.results])
            for backend, run in runs.items()
        }
        loop = seconds["reference"]["median"]
        speedups = {name: loop / summary["median"] for name, summary in seconds.items() if name != "reference"}
        return {"shape": shape, "seconds": seconds, "times_the_loop": speedups}

    def _measure_passing(self) -> dict[int, Any]:
        """Return the peak memory of a row within one gradient window, and of the long row."""
        config = asdict(self._benchmark.configs[self._benchmark.family])
        jobs: dict[int, dict[str, Any]] = {
            length: {"kind": "passing", "config": config, "length": length, **PASSING}
            for length in self._benchmark.passing_lengths
        }
        runs = self._run_jobs(jobs, "state passing, {} tokens")
        peaks = {length: summarize_key(run.results, "peak_bytes") for length, run in runs.items()}
        return {length: peak for length, peak in peaks.items() if peak}

    def _run_jobs(self, jobs: Mapping[C, Job], label: str) -> dict[C, CaseRuns]:
        shared = {"threads": self._threads, "device": self._device}
        jobs = {case: {**job, **shared} for case, job in jobs.items()}
        baselines = [case for case in jobs if case == "fla"]
        return self._suite.interleave_jobs(WORKER, jobs, self._benchmark.repeats, label, baselines)


def _describe_model(config: ModelConfig) -> dict[str, Any]:
    return {
        **asdict(config),
        "family": config.family,
        "parameters": sum(torch.Size(shape).numel() for shape in get_expected_shapes(config).values()),
        "matrix_numbers": count_matrix_weights(config)[0],
    }
