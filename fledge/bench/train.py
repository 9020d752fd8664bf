"""Training speed and memory by length of context: an RWKV, the transformer of its size, and other forms of the RWKV.

A step is forward with loss, backward and the optimiser's update, always on the same number of tokens: short texts in
many rows or one long text. Every measurement has a process of its own, and the programs of one length take turns.
Not here: what is measured in a process (train_worker.py), the arithmetic (train_figures.py, counting.py).
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fledge.bench.counting import matrix_numbers, training_operations
from fledge.bench.environment import machine_facts, package_version
from fledge.bench.harness import Report, Sample, in_fresh_process, interleaved
from fledge.bench.random_model import config_of
from fledge.bench.train_figures import Case, Figures, Group, KernelGroup, figures_of
from fledge.checkpoint import get_expected_shapes
from fledge.core.device import choose_device
from fledge.core.errors import UsageError
from fledge.models import ModelConfig
from fledge.native.library import why_missing

DTYPES = ("fp32", "bf16")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PRODUCT = "product"
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
KERNEL_LENGTH = 1024  # tokens
KERNEL_ROWS = (1, 8)
KERNEL_CALLS = 3  # in each process
PASSING = {"window": 1024, "through": 2, "steps": 2}
WORKER = "fledge.bench.train_worker"


@dataclass(frozen=True)
class Spec:
    """What to measure."""

    shape: str = "L6-D256"
    family: str = "finch"
    vocab: int = 8192
    lengths: tuple[int, ...] = LENGTHS
    tokens: int = 16384  # a step
    dtypes: tuple[str, ...] = DTYPES
    loop: int = 1024  # the longest texts that the plain loop reads; 0 leaves it out
    kernel: bool = True  # the recurrence alone, too
    passing: int = 65536  # tokens of a row read by windows, the state being carried on; 0 leaves it out
    steps: int = 2  # in each process
    repeats: int = 3  # processes for each program, dtype and length
    threads: int | None = None  # None: as torch chooses
    device: str | None = None  # None: a GPU if there is one

    def __post_init__(self) -> None:
        config_of(self.shape, self.vocab, self.family)
        unknown = [dtype for dtype in self.dtypes if dtype not in DTYPES]
        if unknown or not self.dtypes:
            raise UsageError(f"dtypes is {','.join(self.dtypes)!r}; choose from {','.join(DTYPES)}")
        for name in ("vocab", "tokens", "steps", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        shortest = PASSING["window"] * PASSING["through"]
        if self.passing and self.passing <= shortest:
            raise UsageError(f"passing is {self.passing}; it is compared with {shortest} tokens and must be more, or 0")
        wrong = [length for length in self.lengths if length < 1 or self.tokens % length]
        if wrong or not self.lengths:
            given = ",".join(map(str, self.lengths))
            raise UsageError(f"lengths is {given!r}; each must divide the {self.tokens} tokens of a step")

    @property
    def passing_lengths(self) -> tuple[int, ...]:
        """Of the short row and the long one."""
        return (PASSING["window"] * PASSING["through"], self.passing) if self.passing else ()

    @property
    def configs(self) -> dict[str, ModelConfig]:
        """Program -> its model."""
        rwkv = config_of(self.shape, self.vocab, self.family)
        forms = (self.family, "chunked", "loop", "fla")
        return {**dict.fromkeys(forms, rwkv), "transformer": rwkv.as_transformer()}


@dataclass
class Outcome:
    """What has been measured so far."""

    spec: Spec
    machine: dict[str, Any]
    device: str
    threads: int
    notes: tuple[str, ...]
    groups: list[Group] = field(default_factory=list)
    kernels: list[KernelGroup] = field(default_factory=list)
    passing: dict[int, Sample] = field(default_factory=dict)  # tokens of a row -> bytes at the peak

    @property
    def gpu(self) -> str:
        """Its name, where training runs on one."""
        return torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else ""

    def record(self, command: str) -> dict[str, Any]:
        """The whole result as plain JSON."""
        family, configs = self.spec.family, self.spec.configs
        return {
            "benchmark": "train",
            "command": command,
            "machine": self.machine,
            "device": self.gpu or self.device,
            "threads": self.threads,
            "peers": {"fla": package_version("flash-linear-attention")} if self._ran("fla") else {},
            "settings": asdict(self.spec),
            "notes": list(self.notes),
            "models": {name: _facts(configs[name]) for name in (family, "transformer")},
            "groups": [group.record(family, self.gpu) for group in self.groups],
            "kernel": [kernel.record() for kernel in self.kernels],
            "passing": {"settings": PASSING, "peak_bytes": {n: peak.summary() for n, peak in self.passing.items()}},
        }

    @property
    def growth(self) -> float | None:
        """How much more memory the long row takes than the short one, as a share; None where it was not measured."""
        if len(self.passing) < 2:
            return None
        short, long = (self.passing[length].median for length in sorted(self.passing))
        return long / short - 1

    def _ran(self, program: str) -> bool:
        return any(group.of(program) for group in self.groups)


Finished = Callable[[Outcome], None]
"""Called after each group, so that hours are not lost to the last one."""


def run(spec: Spec, report: Report = lambda *_: None, finished: Finished = lambda _: None) -> Outcome:
    """Measure. Raises FledgeError where a process fails, UsageError for a device that is not here."""
    device = str(choose_device(spec.device)[0])
    others, notes = available(spec, device)
    outcome = Outcome(spec, machine_facts(), device, spec.threads or torch.get_num_threads(), notes)
    cases = cases_of(spec, others)
    kernels = [(rows, KERNEL_LENGTH) for rows in KERNEL_ROWS] if spec.kernel else []
    forms = len(kernels) * (3 if native_runs(device) else 2)
    measuring = Measuring(outcome, report, _total(spec, cases, forms))
    for rows, length in kernels:
        outcome.kernels.append(measuring.kernel(rows, length))
        finished(outcome)
    if spec.passing:
        outcome.passing = measuring.passing()
        finished(outcome)
    for dtype in spec.dtypes:
        for length in spec.lengths:
            outcome.groups.append(
                measuring.group([case for case in cases if (case.dtype, case.length) == (dtype, length)])
            )
            finished(outcome)
    return outcome


def available(spec: Spec, device: str) -> tuple[list[str], tuple[str, ...]]:
    """The programs beside the RWKV and the transformer, and why others are left out."""
    others, notes = (["loop"] if spec.loop else []), []
    if native_runs(device):
        others.insert(0, "chunked")  # what serves where there is no library
    if spec.family != "finch":
        notes.append("flash-linear-attention is left out: it has no RWKV-5")
    elif not device.startswith("cuda"):
        notes.append("flash-linear-attention is left out: it runs on GPUs only")
    elif importlib.util.find_spec("fla") is None:
        notes.append("flash-linear-attention is left out: `pip install flash-linear-attention`")
    else:
        others.append("fla")
    return others, tuple(notes)


def cases_of(spec: Spec, others: list[str]) -> list[Case]:
    """Every program at every length; other forms of the recurrence in the first dtype only, the loop with one row.

    What the loop keeps for its gradient is a state a token, which for a whole step would fill most machines.
    """
    cases = []
    for dtype in spec.dtypes:
        for length in spec.lengths:
            rows = spec.tokens // length
            cases += [Case(program, dtype, length, rows) for program in (spec.family, "transformer")]
            if "chunked" in others and dtype == spec.dtypes[0]:
                cases.append(Case("chunked", dtype, length, rows))
            if "loop" in others and length <= spec.loop and dtype == spec.dtypes[0]:
                cases.append(Case("loop", dtype, length, 1))
            if "fla" in others:
                cases.append(Case("fla", dtype, length, rows))
    return cases


def native_runs(device: str) -> bool:
    """Whether the native library does the recurrence there."""
    return device == "cpu" and why_missing() is None


class Measuring:
    """The processes, one after the other."""

    def __init__(self, outcome: Outcome, report: Report, total: int) -> None:
        self._outcome, self._spec = outcome, outcome.spec
        self._report, self._done, self._total = report, 0, total
        self._device = outcome.device.partition(":")[0]

    def group(self, cases: list[Case]) -> Group:
        """All programs of one dtype and length, and torch's product, in turn."""
        by_name = {case.program: case for case in cases}
        dtype, length = cases[0].dtype, cases[0].length
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in (*by_name, PRODUCT)}
        for _, name in interleaved(list(results), self._spec.repeats):
            job = self._product_job(dtype) if name == PRODUCT else self._step_job(by_name[name])
            results[name].append(self._run(f"{dtype}, {length} tokens, {name}", job))
        product = Sample(tuple(result["operations_per_s"] for result in results[PRODUCT]))
        return Group(dtype, length, {case: self._figures(case, results[case.program]) for case in cases}, product)

    def kernel(self, rows: int, length: int) -> KernelGroup:
        """The recurrence of one layer in every form, in turn."""
        config = self._spec.configs[self._spec.family]
        shape = (rows, length, config.n_head, config.head_size)
        backends = (*(["native"] if native_runs(self._device) else []), "chunked", "reference")
        seconds: dict[str, list[float]] = {backend: [] for backend in backends}
        for _, backend in interleaved(list(seconds), self._spec.repeats):
            job = {"kind": "kernel", "backend": backend, "shape": shape, "repeats": KERNEL_CALLS}
            result = self._run(f"the recurrence alone, {backend}", job)
            seconds[backend].append(statistics.median(result["seconds"]))
        return KernelGroup(shape, {backend: Sample(tuple(values)) for backend, values in seconds.items()})

    def passing(self) -> dict[int, Sample]:
        """Bytes at the peak for a row of as many tokens as a gradient flows through, and for the long one."""
        config = asdict(self._spec.configs[self._spec.family])
        peaks: dict[int, list[float]] = {length: [] for length in self._spec.passing_lengths}
        for _, length in interleaved(list(peaks), self._spec.repeats):
            job = {"kind": "passing", "config": config, "length": length, **PASSING}
            peak = self._run(f"state passing, {length} tokens", job)["peak_bytes"]
            if peak:
                peaks[length].append(peak)
        return {length: Sample(tuple(values)) for length, values in peaks.items() if values}

    def _figures(self, case: Case, results: list[dict[str, Any]]) -> Figures:
        return figures_of(case, results, training_operations(self._spec.configs[case.program], case.length))

    def _step_job(self, case: Case) -> dict[str, Any]:
        config = asdict(self._spec.configs[case.program])
        return {"kind": "step", **asdict(case), "config": config, "steps": self._spec.steps}

    def _product_job(self, dtype: str) -> dict[str, Any]:
        return {"kind": "product", "dtype": dtype, "size": PRODUCT_SIZE.get(self._device, PRODUCT_SIZE["cpu"])}

    def _run(self, label: str, job: Mapping[str, Any]) -> dict[str, Any]:
        self._report(label, self._done, self._total)
        environment = {"OMP_NUM_THREADS": str(self._outcome.threads)}
        shared = {"threads": self._outcome.threads, "device": self._outcome.device}
        result = in_fresh_process(WORKER, {**job, **shared}, environment)
        self._done += 1
        return result


def _total(spec: Spec, cases: list[Case], kernels: int) -> int:
    """Processes in all."""
    return spec.repeats * (len(cases) + len(spec.dtypes) * len(spec.lengths) + kernels + len(spec.passing_lengths))


def _facts(config: ModelConfig) -> dict[str, Any]:
    shapes = get_expected_shapes(config).values()
    return {
        **asdict(config),
        "family": config.family,
        "parameters": sum(torch.Size(shape).numel() for shape in shapes),
        "matrix_numbers": matrix_numbers(config)[0],
    }
