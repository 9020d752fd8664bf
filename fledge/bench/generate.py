"""Reading and writing speed of one model, beside the PyPI package `rwkv` where it is asked for.

Both programs get the same .pth, the same prompt ids and the same number of threads, each in a fresh process for every
repeat, in turn. `rwkv` is measured with its TorchScript mode on and off, and compared by whichever is better in each
figure. In fp32 both must give the same logits; where they do not, no figure is given.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge import checkpoint
from fledge.bench.environment import machine_facts, package_version
from fledge.bench.harness import Sample, in_fresh_process, interleaved
from fledge.bench.random_model import config_of, random_tensors
from fledge.core.errors import FledgeError, UsageError
from fledge.engine.loading import locate

DTYPES = ("fp32", "bf16")
AGREEMENT = {"float32": 1e-3, "other": 3e-2}
"""Largest difference of two fp32 programs' logits, relative to the largest one, that counts as the same result.

By the dtype of the file: `rwkv` normalises the embedding in that dtype when it loads, so a bfloat16 file alone makes
differences of up to some hundredths in a random model. Exactness is for tests/peers, with float32 files.
"""

PEER_SETTINGS = {"RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0"}
Report = Callable[[str, int, int], None]
"""Called with (what runs now, runs done, runs in all)."""


@dataclass(frozen=True)
class Spec:
    """What to measure. `model` and `shape` exclude each other; with neither it is the bundled model."""

    model: str | None = None
    shape: str | None = None  # a random Finch such as L12-D768
    vocab: int = 65536  # rows of a random model
    peer: bool = False
    dtypes: tuple[str, ...] = DTYPES
    prompt: int = 512  # tokens
    tokens: int = 32
    repeats: int = 5
    threads: int | None = None  # None: as torch chooses

    def __post_init__(self) -> None:
        if self.model is not None and self.shape is not None:
            raise UsageError("model and shape exclude each other; give one of them")
        unknown = [dtype for dtype in self.dtypes if dtype not in DTYPES]
        if unknown or not self.dtypes:
            raise UsageError(f"dtypes is {','.join(self.dtypes)!r}; choose from {','.join(DTYPES)}")
        for name in ("vocab", "prompt", "tokens", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if self.peer and importlib.util.find_spec("rwkv") is None:
            raise UsageError('the package rwkv is not installed; install it with `pip install "fledge[bench]"`')


@dataclass(frozen=True)
class Configuration:
    """One program with one dtype."""

    program: str  # "fledge", "rwkv" or "rwkv jit"
    dtype: str

    @property
    def name(self) -> str:
        """As it stands in tables and records."""
        return f"{self.program} {self.dtype}"


@dataclass(frozen=True)
class Figures:
    """What one configuration reached: rates in tokens a second, memory in bytes, times in seconds."""

    prefill: Sample
    decode: Sample
    peak: Sample | None
    imports: Sample  # of the program with torch, before anything is loaded
    load: Sample
    first_token: Sample  # from the beginning of loading, the whole prompt included

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "prefill_tokens_per_s": self.prefill.summary(),
            "decode_tokens_per_s": self.decode.summary(),
            "peak_bytes": self.peak.summary() if self.peak else None,
            "import_s": self.imports.summary(),
            "load_s": self.load.summary(),
            "first_token_s": self.first_token.summary(),
        }


@dataclass(frozen=True)
class Outcome:
    """All figures of one benchmark."""

    spec: Spec
    model: dict[str, Any]
    machine: dict[str, Any]
    figures: dict[Configuration, Figures]
    differences: dict[str, float]  # dtype -> largest difference of the two programs' logits, relative

    def ratios(self) -> dict[str, dict[str, float]]:
        """dtype -> figure -> how many times better than the peer's best (for memory and times, smaller is better)."""
        found: dict[str, dict[str, float]] = {}
        for dtype in self.spec.dtypes:
            peers = [figures for c, figures in self.figures.items() if c.dtype == dtype and c.program != "fledge"]
            if not peers:
                continue
            ours = self.figures[Configuration("fledge", dtype)]
            found[dtype] = {
                "prefill": ours.prefill.median / max(peer.prefill.median for peer in peers),
                "decode": ours.decode.median / max(peer.decode.median for peer in peers),
                "load": min(peer.load.median for peer in peers) / ours.load.median,
                "first_token": min(peer.first_token.median for peer in peers) / ours.first_token.median,
            }
            if ours.peak is not None:
                smallest = min(peer.peak.median for peer in peers if peer.peak is not None)
                found[dtype]["memory"] = smallest / ours.peak.median
        return found

    def record(self, command: str) -> dict[str, Any]:
        """The whole result as plain JSON."""
        return {
            "benchmark": "generate",
            "command": command,
            "machine": self.machine,
            "peer": {"rwkv": package_version("rwkv")} if self.spec.peer else None,
            "model": self.model,
            "settings": asdict(self.spec),
            "figures": {configuration.name: figures.record() for configuration, figures in self.figures.items()},
            "ratios_to_the_best_peer": self.ratios(),
            "logit_differences": self.differences,
        }


def run(spec: Spec, report: Report = lambda *_: None) -> Outcome:
    """Measure. Raises FledgeError where a process fails or the programs disagree, CheckpointError as loading does."""
    machine = machine_facts()
    threads = spec.threads or torch.get_num_threads()
    configurations = _configurations(spec)
    with tempfile.TemporaryDirectory(prefix="fledge-bench-") as name:
        folder = Path(name)
        path = _checkpoint(spec, folder)
        info = checkpoint.inspect(path)
        ids = torch.randint(info.config.vocab_size, (spec.prompt,), generator=torch.Generator().manual_seed(7)).tolist()
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in configurations}
        logits: dict[str, Tensor] = {}
        order = interleaved(list(configurations), spec.repeats)
        for done, (_, name) in enumerate(order):
            report(name, done, len(order))
            job = {
                "subject": configurations[name].program.split()[0],
                "checkpoint": str(path),
                "dtype": configurations[name].dtype,
                "prompt": ids,
                "tokens": spec.tokens,
                "threads": threads,
                "logits": str(folder / "logits.pt"),
            }
            environment = _environment(configurations[name], threads)
            results[name].append(in_fresh_process("fledge.bench.worker", job, environment))
            logits[name] = torch.load(folder / "logits.pt", weights_only=True)
    model = {
        "name": spec.shape or info.path.name,
        "family": info.config.family,
        "version": info.config.version,
        "n_layer": info.config.n_layer,
        "n_embd": info.config.n_embd,
        "vocab_size": info.config.vocab_size,
        "parameters": info.parameters,
        "file_dtype": info.dtypes[0],
        "threads": threads,
    }
    figures = {c: _figures(results[name], spec) for name, c in configurations.items()}
    differences = _differences(configurations, logits)
    _check_agreement(differences, info.dtypes[0])
    return Outcome(spec, model, machine, figures, differences)


def _configurations(spec: Spec) -> dict[str, Configuration]:
    programs = ("fledge", "rwkv", "rwkv jit") if spec.peer else ("fledge",)
    every = [Configuration(program, dtype) for dtype in spec.dtypes for program in programs]
    return {configuration.name: configuration for configuration in every}


def _environment(configuration: Configuration, threads: int) -> Mapping[str, str]:
    jit = {"RWKV_JIT_ON": "1" if configuration.program.endswith("jit") else "0"}
    return {"OMP_NUM_THREADS": str(threads), **PEER_SETTINGS, **jit}


def _checkpoint(spec: Spec, folder: Path) -> Path:
    """A .pth, which every program reads: the one given, or a new one in `folder`."""
    if spec.shape is not None:
        config = config_of(spec.shape, spec.vocab)
        path = folder / f"{spec.shape}.pth"
        checkpoint.save(path, config, random_tensors(config, torch.bfloat16))
        return path
    given = Path(os.fspath(locate(spec.model)))
    if given.is_file() and given.suffix == ".pth":
        return given.resolve()
    return checkpoint.convert(locate(spec.model), folder / f"{given.stem}.pth").target


def _figures(results: list[dict[str, Any]], spec: Spec) -> Figures:
    def sample(key: str) -> Sample:
        return Sample(tuple(result[key] for result in results))

    return Figures(
        prefill=Sample(tuple(spec.prompt / result["prefill_s"] for result in results)),
        decode=Sample(tuple(spec.tokens / result["decode_s"] for result in results)),
        peak=None if results[0]["peak_bytes"] is None else sample("peak_bytes"),
        imports=sample("import_s"),
        load=sample("load_s"),
        first_token=sample("first_token_s"),
    )


def _differences(configurations: Mapping[str, Configuration], logits: Mapping[str, Tensor]) -> dict[str, float]:
    """Ours against the peer's, by dtype, relative to the largest."""
    found: dict[str, float] = {}
    for name, configuration in configurations.items():
        if configuration.program != "fledge":
            ours, theirs = logits[f"fledge {configuration.dtype}"], logits[name]
            difference = float((ours - theirs).abs().max() / ours.abs().max())
            found[configuration.dtype] = max(difference, found.get(configuration.dtype, 0.0))
    return found


def _check_agreement(differences: Mapping[str, float], file_dtype: str) -> None:
    """Raise FledgeError where two fp32 programs do not compute the same."""
    allowed = AGREEMENT.get(file_dtype, AGREEMENT["other"])
    if not differences.get("fp32", 0.0) <= allowed:
        raise FledgeError(
            f"in fp32 the logits of fledge and rwkv differ by {differences['fp32']:.1e} of the largest one (up to "
            f"{allowed:g} is rounding); figures of programs that compute different things mean nothing"
        )
