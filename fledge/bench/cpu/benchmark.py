"""The CPU benchmark: Fledge and the baselines with the same weights, widths, prompt and threads, each in turn.

Every measurement has its own process. The machine's limits are measured in turn with the programs, so that a share of a
limit compares measurements of the same minutes. If logits differ by more than rounding, no metrics are reported.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fledge.bench.cpu.agreement import check_agreement, compare
from fledge.bench.cpu.metrics import case_metrics, compute_targets, limit_metrics
from fledge.bench.cpu.model_files import (
    FILE_KINDS,
    ModelFiles,
    gguf_matrix_bytes,
    warm_page_cache,
    write_model_files,
    write_random_files,
)
from fledge.bench.flops import count_matrix_weights
from fledge.bench.machine_limits import summarize_limits
from fledge.bench.measurement import JobResult
from fledge.bench.random_model import config_of_shape
from fledge.bench.suite import Benchmark, CaseRuns, Suite
from fledge.checkpoint import inspect
from fledge.core.errors import UsageError
from fledge.core.machine import package_version
from fledge.engine.llm.loading import locate_checkpoint

WIDTHS = ("fp32", "bf16", "int8", "int4")
DEFAULT_SHAPE = "L12-D768"
RWKV_ENVIRONMENT = {"RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0"}
RWKV_BYTES = {"fp32": 4, "bf16": 2}  # per weight
FIRST_TOKENS = 8  # of each text of a batch, before the measurement
LIMITS = "limits of the machine"
LLAMA_CPP_TYPES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""Width -> the type of llama.cpp that is compared with it."""


@dataclass(frozen=True)
class CpuCase:
    """One program with weights of one width."""

    program: str  # "fledge", "llama.cpp", "rwkv" or "rwkv jit"
    width: str

    @property
    def library(self) -> str:
        """The key of PROGRAMS and FILE_KINDS."""
        return self.program.removesuffix(" jit")

    @property
    def name(self) -> str:
        """The name in tables and records. For llama.cpp it has llama.cpp's type."""
        return f"{self.program} {LLAMA_CPP_TYPES[self.width] if self.program == 'llama.cpp' else self.width}"


@dataclass(frozen=True)
class CpuBenchmark(Benchmark):
    """Settings: `model` and `shapes` exclude each other. Without both, a random model of DEFAULT_SHAPE is measured."""

    kind: ClassVar[str] = "cpu"

    model: str | None = None
    shapes: tuple[str, ...] = ()
    family: str = "finch"  # of random models
    vocab: int = 65536  # of random models
    widths: tuple[str, ...] = ("bf16", "int8", "int4")
    peers: bool = True
    prompt: int = 512  # tokens
    tokens: int = 32
    batch: int = 16  # texts; 1 leaves the batch out
    repeats: int = 5
    threads: int | None = None  # None: torch's default
    cache: str | None = None  # folder that keeps the model files

    def __post_init__(self) -> None:
        if self.model is not None and self.shapes:
            raise UsageError("model and shape exclude each other; pass one of them")
        if not self.widths or set(self.widths) - set(WIDTHS):
            raise UsageError(f"widths is {','.join(self.widths)!r}; choose from {','.join(WIDTHS)}")
        self.require_at_least(1, "vocab", "prompt", "tokens", "batch", "repeats", "threads")
        for shape in self.shapes:
            config_of_shape(shape, self.vocab, self.family)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The models, in order."""
        return (self.model,) if self.model is not None else self.shapes or (DEFAULT_SHAPE,)

    def settings(self) -> dict[str, Any]:
        """Return the settings, without the path of the cache."""
        return {**super().settings(), "cache": self.cache is not None}

    def measure(self, suite: Suite) -> None:
        """Measure model by model."""
        programs, notes = find_programs(self)
        cases = plan_cases(self, programs)
        threads = self.threads or torch.get_num_threads()
        suite.record |= {"threads": threads, "notes": notes, "models": []}
        suite.total_runs = (len(cases) + 1) * self.repeats * len(self.model_names)
        kinds = list(dict.fromkeys(FILE_KINDS[case.library][case.width] for case in cases))
        for name in self.model_names:
            suite.report(f"writing the files of {name}")
            with _model_folder(self.cache) as folder, tempfile.TemporaryDirectory(prefix="fledge-bench-") as scratch:
                files = self._write_files(name, folder, kinds)
                run = CpuModelRun(self, suite, files, threads, Path(scratch))
                suite.record["models"].append(run.measure(cases, name))
            suite.save()

    def _write_files(self, name: str, folder: Path, kinds: list[str]) -> ModelFiles:
        if self.model is not None:
            return write_model_files(self.model, folder, kinds)
        return write_random_files(name, self.family, self.vocab, folder, kinds)

    def architecture(self, name: str) -> str:
        """Return the RWKV version of a model, without writing any file."""
        if self.model is not None:
            return inspect(locate_checkpoint(self.model)).config.version
        return config_of_shape(name, self.vocab, self.family).version


def find_programs(benchmark: CpuBenchmark) -> tuple[list[str], list[str]]:
    """Return the programs to measure, and notes on the baselines that are left out."""
    programs, notes = ["fledge"], list[str]()
    if not benchmark.peers:
        return programs, notes
    missing = [module for module in ("llama_cpp", "gguf") if importlib.util.find_spec(module) is None]
    if any(benchmark.architecture(name) != "6.0" for name in benchmark.model_names):
        notes.append("llama.cpp is left out: of RWKV-4, RWKV-5 and RWKV-6 it supports only RWKV-6")
    elif missing:
        packages = " ".join(module.replace("llama_cpp", "llama-cpp-python") for module in missing)
        notes.append(f"llama.cpp is left out: `pip install {packages}` (it may compile for some minutes)")
    else:
        programs.append("llama.cpp")
    if importlib.util.find_spec("rwkv") is None:
        notes.append('rwkv is left out: `pip install "fledge[bench]"`')
    else:
        programs += ["rwkv", "rwkv jit"]
    return programs, notes


def plan_cases(benchmark: CpuBenchmark, programs: list[str]) -> list[CpuCase]:
    """Return all cases. `rwkv` has no usable int8, so it is always measured in fp32 and bf16."""
    rwkv = [program for program in programs if program.startswith("rwkv")]
    others = [program for program in programs if program not in rwkv]
    return [
        CpuCase(program, width)
        for group, widths in ((others, benchmark.widths), (rwkv, RWKV_BYTES))
        for width in widths
        for program in group
    ]


class CpuModelRun:
    """The measurement of one model: every case and the limits, in turn."""

    def __init__(self, benchmark: CpuBenchmark, suite: Suite, files: ModelFiles, threads: int, scratch: Path) -> None:
        self._benchmark, self._suite, self._files = benchmark, suite, files
        self._threads, self._scratch = threads, scratch
        rows, generator = files.config.vocab_size, torch.Generator().manual_seed(0)
        self._job = {
            "prompt": torch.randint(rows, (benchmark.prompt,), generator=generator).tolist(),
            "batch": torch.randint(rows, (benchmark.batch, FIRST_TOKENS), generator=generator).tolist(),
            "tokens": benchmark.tokens,
            "threads": threads,
        }

    def measure(self, cases: list[CpuCase], label: str) -> dict[str, Any]:
        """Return the record of the model."""
        calls: dict[str, Callable[[], JobResult]] = {case.name: partial(self._run_case, case) for case in cases}
        calls[LIMITS] = self._measure_limits
        baselines = {case.name for case in cases if case.program != "fledge"}
        runs = self._suite.interleave(calls, self._benchmark.repeats, f"{label}, {{}}", baselines)
        model, limits = self._describe_model(), summarize_limits(runs[LIMITS].results)
        self._record_baselines(runs)
        rows = {}
        for case in cases:
            row, run = {"program": case.program, "width": case.width}, runs[case.name]
            if run.error:
                rows[case.name] = row | {"error": run.error}
                continue
            metrics = case_metrics(run.results, self._matrix_bytes(case, run.results[0]), self._benchmark.settings())
            used = limit_metrics(metrics, case.width, model, limits, self._benchmark.batch)
            rows[case.name] = {**row, **metrics, **used}
        measured = [case for case in cases if not runs[case.name].error]
        return {
            "model": model,
            "limits": limits,
            "figures": rows,
            "targets": compute_targets(rows.values()),
            "differences": self._compare_logits(measured),
        }

    def _environment(self, program: str = "") -> Mapping[str, str]:
        jit = {"RWKV_JIT_ON": "1" if program.endswith("jit") else "0"}
        return {"OMP_NUM_THREADS": str(self._threads), **RWKV_ENVIRONMENT, **jit}

    def _measure_limits(self) -> JobResult:
        return self._suite.worker("fledge.bench.machine_limits", {"threads": self._threads}, self._environment())

    def _run_case(self, case: CpuCase) -> JobResult:
        path = self._files.path(case.library, case.width)
        warm_page_cache(path)
        own = {"program": case.library, "checkpoint": str(path), "width": case.width}
        started = time.perf_counter()
        job = {**own, **self._job, "logits": str(self._logits_path(case))}
        result = self._suite.worker("fledge.bench.cpu.worker", job, self._environment(case.program))
        return {**result, "process_s": time.perf_counter() - started}

    def _logits_path(self, case: CpuCase) -> Path:
        return self._scratch / f"{case.name}.npz"

    def _matrix_bytes(self, case: CpuCase, result: JobResult) -> int:
        reported: int | None = result.get("matrix_bytes")
        if reported is not None:
            return reported
        if case.program == "llama.cpp":
            return gguf_matrix_bytes(self._files.path(case.library, case.width))
        return count_matrix_weights(self._files.config)[0] * RWKV_BYTES.get(case.width, 4)

    def _compare_logits(self, cases: list[CpuCase]) -> dict[str, Any]:
        """Compare the logits of the last repeat. Raises FledgeError if rounding cannot explain the differences."""
        logits = {}
        for case in cases:
            with np.load(self._logits_path(case)) as file:
                logits[case] = dict(file)
        reference = CpuCase("fledge", min(self._benchmark.widths, key=WIDTHS.index))
        result: dict[str, Any] = {"reference": reference.name}
        for case in cases:
            if case != reference:
                result[case.name] = compare(logits[case], logits[reference])
                check_agreement((case.name, case.width), (reference.name, reference.width), result[case.name])
        return result

    def _record_baselines(self, runs: Mapping[str, CaseRuns]) -> None:
        """Record the version of each baseline, and its build options if it reports them."""
        for library, package in (("rwkv", "rwkv"), ("llama.cpp", "llama-cpp-python")):
            results = [run.results for name, run in runs.items() if name.startswith(library)]
            if results:
                build = next((result[0].get("build") for result in results if result), None)
                version = package_version(package)
                self._suite.record["peers"][library] = {"package": package, "version": version, "build": build}

    def _describe_model(self) -> dict[str, Any]:
        config = self._files.config
        weights, head = count_matrix_weights(config)
        return {
            "name": self._files.name,
            "family": config.family,
            "version": config.version,
            "n_layer": config.n_layer,
            "n_embd": config.n_embd,
            "vocab_size": config.vocab_size,
            "parameters": inspect(self._files.paths["pth"]).parameters,
            "matrix_numbers": weights,
            "head_numbers": head,
            "file_bytes": {kind: path.stat().st_size for kind, path in self._files.paths.items()},
        }


@contextmanager
def _model_folder(cache: str | None) -> Iterator[Path]:
    """The folder of the model files: the cache, or a temporary folder."""
    if cache is not None:
        Path(cache).mkdir(parents=True, exist_ok=True)
        yield Path(cache).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fledge-bench-models-") as folder:
        yield Path(folder)
