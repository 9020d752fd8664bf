"""This program and others on a CPU, in one run: the same weights, widths, prompt and threads, each in turn.

Every measurement has a process of its own. The machine's limits are measured between the programs, as often as they,
so that a share of a limit means the same minutes. Programs whose scores differ by more than rounding get no figures.
Not here: what is measured in a process (cpu_worker.py), the files (cpu_files.py), the arithmetic (cpu_figures.py).
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fledge.bench.agreement import Difference, check, compare
from fledge.bench.counting import matrix_numbers
from fledge.bench.cpu_figures import Block, Case, Figures, figures_of
from fledge.bench.cpu_files import KINDS, ModelFiles, gguf_bytes, model_files, random_files, read_once
from fledge.bench.environment import machine_facts, package_version
from fledge.bench.harness import Report, in_fresh_process, interleaved
from fledge.bench.limits import Limits
from fledge.bench.random_model import config_of
from fledge.checkpoint import inspect
from fledge.core.errors import UsageError
from fledge.engine.llm.loading import locate_checkpoint

WIDTHS = ("fp32", "bf16", "int8", "int4")
DEFAULT_WIDTHS = ("bf16", "int8", "int4")
DEFAULT_SHAPE = "L12-D768"
PEER_SETTINGS = {"RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0"}
RWKV_BYTES = {"fp32": 4, "bf16": 2}
FIRST_TOKENS = 8  # of each text of a batch, before the clock runs
LIMITS = "limits of the machine"


@dataclass(frozen=True)
class Spec:
    """What to measure. `model` and `shapes` exclude each other; with neither it is a random model of DEFAULT_SHAPE."""

    model: str | None = None
    shapes: tuple[str, ...] = ()
    family: str = "finch"  # of the random models
    vocab: int = 65536  # rows of the random models
    widths: tuple[str, ...] = DEFAULT_WIDTHS
    peers: bool = True
    prompt: int = 512  # tokens
    tokens: int = 32
    batch: int = 16  # texts at once; 1 leaves that out
    repeats: int = 5
    threads: int | None = None  # None: as torch chooses
    cache: str | None = None  # folder in which the files stay

    def __post_init__(self) -> None:
        if self.model is not None and self.shapes:
            raise UsageError("model and shape exclude each other; give one of them")
        unknown = [width for width in self.widths if width not in WIDTHS]
        if unknown or not self.widths:
            raise UsageError(f"widths is {','.join(self.widths)!r}; choose from {','.join(WIDTHS)}")
        for name in ("vocab", "prompt", "tokens", "batch", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        for shape in self.shapes:
            config_of(shape, self.vocab, self.family)

    @property
    def names(self) -> tuple[str, ...]:
        """The models, in order."""
        return (self.model,) if self.model is not None else self.shapes or (DEFAULT_SHAPE,)

    def files(self, name: str, folder: Path, kinds: list[str]) -> ModelFiles:
        """Write the files of one of `names`."""
        if self.model is not None:
            return model_files(self.model, folder, kinds)
        return random_files(name, self.family, self.vocab, folder, kinds)

    def version(self, name: str) -> str:
        """The version of one of `names`, without writing anything."""
        if self.model is not None:
            return inspect(locate_checkpoint(self.model)).config.version
        return config_of(name, self.vocab, self.family).version


@dataclass(frozen=True)
class Outcome:
    """What has been measured so far, model by model."""

    spec: Spec
    machine: dict[str, Any]
    threads: int
    notes: tuple[str, ...]  # for people: which programs are missing and why
    peers: dict[str, Any] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    def record(self, command: str) -> dict[str, Any]:
        """The whole result as plain JSON."""
        return {
            "benchmark": "cpu",
            "command": command,
            "machine": self.machine,
            "threads": self.threads,
            "peers": self.peers,
            "settings": {**asdict(self.spec), "cache": self.spec.cache is not None},
            "notes": list(self.notes),
            "models": [block.record() for block in self.blocks],
        }


Finished = Callable[[Outcome], None]
"""Called after each model, so that hours are not lost to the last one."""


def run(spec: Spec, report: Report = lambda *_: None, finished: Finished = lambda _: None) -> Outcome:
    """Measure. Raises FledgeError where a process fails or programs disagree, CheckpointError as loading does."""
    programs, notes = available(spec)
    outcome = Outcome(spec, machine_facts(), spec.threads or torch.get_num_threads(), notes)
    cases = cases_of(spec, programs)
    total = (len(cases) + 1) * spec.repeats * len(spec.names)
    for place, name in enumerate(spec.names):
        report(f"writing the files of {name}", place * total // len(spec.names), total)

        def step(label: str, done: int, name: str = name, before: int = place * total // len(spec.names)) -> None:
            report(f"{name}, {label}", before + done, total)

        with _folder(spec) as folder, tempfile.TemporaryDirectory(prefix="fledge-bench-") as scratch:
            kinds = list(dict.fromkeys(KINDS[case.subject][case.width] for case in cases))
            measuring = Measuring(spec, spec.files(name, folder, kinds), outcome.threads, Path(scratch))
            outcome.blocks.append(measuring.run(cases, step))
            outcome.peers.update(measuring.peers())
        finished(outcome)
    return outcome


def available(spec: Spec) -> tuple[list[str], tuple[str, ...]]:
    """The programs to measure, and why others are left out."""
    if not spec.peers:
        return ["fledge"], ()
    programs, notes = ["fledge"], []
    missing = [module for module in ("llama_cpp", "gguf") if importlib.util.find_spec(module) is None]
    if any(spec.version(name) != "6.0" for name in spec.names):
        notes.append("llama.cpp is left out: of RWKV-4, RWKV-5 and RWKV-6 it runs RWKV-6 only")
    elif missing:
        packages = " ".join(module.replace("llama_cpp", "llama-cpp-python") for module in missing)
        notes.append(f"llama.cpp is left out: `pip install {packages}` (it may compile for some minutes)")
    else:
        programs.append("llama.cpp")
    if importlib.util.find_spec("rwkv") is None:
        notes.append('rwkv is left out: `pip install "fledge[bench]"`')
    else:
        programs += ["rwkv", "rwkv jit"]
    return programs, tuple(notes)


def cases_of(spec: Spec, programs: list[str]) -> list[Case]:
    """The widths asked for, program by program. `rwkv` has no sound int8: it takes part with what it has, always."""
    cases = [Case(program, width) for width in spec.widths for program in programs if not program.startswith("rwkv")]
    return cases + [Case(program, width) for width in RWKV_BYTES for program in programs if program.startswith("rwkv")]


class Measuring:
    """One model: every case and the limits, in turn."""

    def __init__(self, spec: Spec, files: ModelFiles, threads: int, scratch: Path) -> None:
        self._spec, self._files, self._threads, self._scratch = spec, files, threads, scratch
        draw = torch.Generator().manual_seed(0)
        rows = files.config.vocab_size
        self._prompt: list[int] = torch.randint(rows, (spec.prompt,), generator=draw).tolist()
        self._batch: list[list[int]] = torch.randint(rows, (spec.batch, FIRST_TOKENS), generator=draw).tolist()
        self._results: dict[str, list[dict[str, Any]]] = {}

    def run(self, cases: list[Case], step: Callable[[str, int], None]) -> Block:
        """Measure all of them `repeats` times."""
        by_name = {case.name: case for case in cases}
        names = [*by_name, LIMITS]
        self._results = {name: [] for name in names}
        for done, (_, name) in enumerate(interleaved(names, self._spec.repeats)):
            step(name, done)
            result = self._limits() if name == LIMITS else self._case(by_name[name])
            self._results[name].append(result)
        reference = Case("fledge", min(self._spec.widths, key=WIDTHS.index))
        return Block(
            model=self._model(),
            batch=self._spec.batch,
            limits=Limits.of(self._results[LIMITS]),
            figures={case: self._figures(case) for case in cases},
            differences=self._differences(cases, reference),
            reference=reference,
        )

    def peers(self) -> dict[str, Any]:
        """Versions of the other programs, and how they were compiled where they tell."""
        found: dict[str, Any] = {}
        for package, program in (("rwkv", "rwkv"), ("llama-cpp-python", "llama.cpp")):
            results = [result for name, result in self._results.items() if name.startswith(program)]
            if results:
                found[program] = {"package": package, "version": package_version(package)}
                found[program]["build"] = results[0][0].get("build")
        return found

    def _environment(self, program: str) -> Mapping[str, str]:
        jit = {"RWKV_JIT_ON": "1" if program.endswith("jit") else "0"}
        return {"OMP_NUM_THREADS": str(self._threads), **PEER_SETTINGS, **jit}

    def _limits(self) -> dict[str, Any]:
        return in_fresh_process("fledge.bench.limits", {"threads": self._threads}, self._environment("limits"))

    def _case(self, case: Case) -> dict[str, Any]:
        path = self._files.of(case.subject, case.width)
        read_once(path)
        job = {
            "subject": case.subject,
            "checkpoint": str(path),
            "width": case.width,
            "prompt": self._prompt,
            "tokens": self._spec.tokens,
            "batch": self._batch,
            "threads": self._threads,
            "logits": str(self._logits(case)),
        }
        began = time.perf_counter()
        result = in_fresh_process("fledge.bench.cpu_worker", job, self._environment(case.program))
        return {**result, "process_s": time.perf_counter() - began}

    def _logits(self, case: Case) -> Path:
        return self._scratch / f"{case.name}.npz"

    def _figures(self, case: Case) -> Figures:
        results = self._results[case.name]
        told = results[0].get("matrix_bytes")
        if told is None and case.program == "llama.cpp":
            told = gguf_bytes(self._files.of(case.subject, case.width))
        if told is None:
            told = matrix_numbers(self._files.config)[0] * RWKV_BYTES.get(case.width, 4)
        settings = {name: getattr(self._spec, name) for name in ("prompt", "tokens", "batch")}
        return figures_of(results, settings, told)

    def _differences(self, cases: list[Case], reference: Case) -> dict[Case, dict[str, Difference]]:
        """Of the last repeat's scores. Raises FledgeError where they are no rounding."""
        scores = {}
        for case in cases:
            with np.load(self._logits(case)) as file:
                scores[case] = dict(file)
        found = {case: compare(scores[case], scores[reference]) for case in cases if case != reference}
        for case, differences in found.items():
            check(case.name, case.width, differences, reference.name, reference.width)
        return found

    def _model(self) -> dict[str, Any]:
        config = self._files.config
        numbers, head = matrix_numbers(config)
        return {
            "name": self._files.name,
            "family": config.family,
            "version": config.version,
            "n_layer": config.n_layer,
            "n_embd": config.n_embd,
            "vocab_size": config.vocab_size,
            "parameters": inspect(self._files.paths["pth"]).parameters,
            "matrix_numbers": numbers,
            "head_numbers": head,
            "file_bytes": {kind: path.stat().st_size for kind, path in self._files.paths.items()},
        }


@contextmanager
def _folder(spec: Spec) -> Iterator[Path]:
    """Where the files of one model are written: the folder given, or one that vanishes."""
    if spec.cache is not None:
        Path(spec.cache).mkdir(parents=True, exist_ok=True)
        yield Path(spec.cache).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fledge-bench-models-") as folder:
        yield Path(folder)
