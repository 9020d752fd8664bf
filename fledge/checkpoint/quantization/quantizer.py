"""Which matrices are quantized and how: "int8", "int4", or "mixed", which decides for each by its effect.

Quantized are the products that make up nearly all of a model: att.{receptance,key,value,gate,output},
ffn.{key,value,receptance} and the head. Everything that RWKV is sensitive in stays as it is: the embedding (rows are
looked up, so it costs no speed), norms, mixes, decay, bonus, LoRA factors and the state.
"mixed" is int4 with the matrices in int8 that the predictions gain most from, as many as BITS allows.
Not here: how numbers are rounded (fledge.kernels.rounding), what a matrix's error costs (sensitivity.py), and measuring
quality (fledge.bench).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fledge.checkpoint.formats.container import detect_container
from fledge.checkpoint.formats.pth import verify_checksums
from fledge.checkpoint.identity import compute_identity
from fledge.checkpoint.quantization.sensitivity import (
    MatrixImportance,
    choose_within_budget,
    compute_cost,
    estimate_cost,
)
from fledge.checkpoint.reader import read
from fledge.checkpoint.writer import check_overwrite, save
from fledge.core.errors import CheckpointError, UnsupportedError, UsageError
from fledge.kernels import QuantizedMatrix
from fledge.kernels.quantized import blocks_shape
from fledge.kernels.rounding import quantize as round_weight
from fledge.models.config import ModelConfig
from fledge.models.native_model import MATRICES

SCHEMES = ("int8", "int4", "mixed")

BITS = 6.3
"""mixed: bits a weight at most, over all quantized matrices. Enough for a head of a third of them in int8."""

Importances = Mapping[str, MatrixImportance]
"""Matrix name -> what a text says about it."""

Report = Callable[[str, int, int], None]
"""Called with (matrix, matrices done, matrices in all)."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized matrix and how far it is from the weight it stands for."""

    matrix: QuantizedMatrix
    error: float  # root mean square of what rounding changed relative to the weights; with importance, of the outputs
    cost: float  # of its int4 form: see sensitivity.py; measured for "mixed" only


@dataclass(frozen=True)
class QuantizationReport:
    """What was written: format and relative error of each matrix, and the sizes."""

    source: Path
    target: Path
    scheme: str
    calibrated: bool
    formats: dict[str, str]
    errors: dict[str, float]  # as in Rounded
    weights: int  # in all quantized matrices
    nbytes_quantized: int  # of all quantized matrices
    nbytes_before: int  # of all tensors
    nbytes: int  # of the file that was written

    @property
    def bits_per_weight(self) -> float:
        """Over the quantized matrices, their scales, minima and filling included."""
        return 8 * self.nbytes_quantized / self.weights


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scheme: str,
    *,
    importance: Importances | None = None,
    force: bool = False,
    report: Report = lambda *_: None,
) -> QuantizationReport:
    """Write the checkpoint `source` as the quantized .safetensors `target`, whole or not at all.

    importance: what `fledge.checkpoint.quantization.calibration` gives; None: every input counts the same.
    Raises CheckpointError where the source is quantized already or the target exists (unless `force`), UsageError for
    an unknown scheme or another suffix.
    """
    target = Path(target)
    check_request(target, scheme, force)
    found = read(source)
    check_quantizable(found.config, str(source))
    if found.quantized:
        raise CheckpointError(f"{source} is quantized already; give the checkpoint from before quantization")
    for file in found.files:
        if detect_container(file) == "pth":
            verify_checksums(file)
    before = sum(tensor.numel() * tensor.element_size() for tensor in found.tensors.values())
    rest, rounded = _round_all(found.tensors, scheme, importance or {}, report)
    matrices = {name: one.matrix for name, one in rounded.items()}
    # Adapters of the dense model fit the rounded one, so its identity is kept.
    facts = {"scheme": scheme, "calibrated": bool(importance), "base": compute_identity(found)}
    save(
        target,
        found.config,
        rest,
        quantized=matrices,
        tokenizer_spec=found.tokenizer_spec,
        extra={**found.extra, "quantised": facts},
    )
    return QuantizationReport(
        source=found.path,
        target=target,
        scheme=scheme,
        calibrated=bool(importance),
        formats={name: matrix.format for name, matrix in matrices.items()},
        errors={name: one.error for name, one in rounded.items()},
        weights=sum(matrix.rows * matrix.columns for matrix in matrices.values()),
        nbytes_quantized=sum(matrix.nbytes for matrix in matrices.values()),
        nbytes_before=before,
        nbytes=target.stat().st_size,
    )


def check_quantizable(config: ModelConfig, source: str) -> None:
    """Raise UnsupportedError for a model that is not quantized: the transformer is there to be compared with."""
    if config.version == "llama":
        raise UnsupportedError(f"{source} is a transformer; only RWKV models can be quantized")


def check_request(target: Path, scheme: str, force: bool) -> None:
    """The errors of `quantize` that need no reading, so that a long calibration does not end in them."""
    _check_scheme(scheme)
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: quantized models are written as .safetensors; name the target so")
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name a file")
    check_overwrite(target, force)


def quantize_tensors(
    tensors: Mapping[str, Tensor], scheme: str, release: Callable[[Tensor], None] | None = None
) -> tuple[dict[str, Tensor], dict[str, QuantizedMatrix]]:
    """The tensors that stay dense, and the matrices that do not. Raises UsageError for an unknown scheme.

    release: called with each weight that is not needed any more.
    """
    _check_scheme(scheme)
    rest: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedMatrix] = {}
    if scheme == "mixed":  # all errors must be known before the first choice
        rest, rounded = _round_all(tensors, scheme, {}, lambda *_: None)
        quantized = {name: one.matrix for name, one in rounded.items()}
    for name, tensor in tensors.items():
        if scheme == "mixed" or not is_quantizable(name):
            if name not in quantized:
                rest[name] = tensor
        else:
            quantized[name] = _matrix(name, tensor, scheme, None)[0]
        if release is not None and name in quantized:
            release(tensor)
    return rest, quantized


def is_quantizable(name: str) -> bool:
    """Whether this is the name of a matrix that can be quantized."""
    return name == "head.weight" or (name.startswith("blocks.") and name.split(".", 2)[2] in MATRICES)


def _check_scheme(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise UsageError(f"quantization {scheme!r:.40} is unknown; choose one of {', '.join(SCHEMES)}")


def _round_all(
    tensors: Mapping[str, Tensor], scheme: str, importance: Importances, report: Report
) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    names = [name for name in tensors if is_quantizable(name)]
    first = "int8" if scheme == "int8" else "int4"
    found: dict[str, QuantizedWeight] = {}
    for done, name in enumerate(names):
        report(name, done, len(names))
        found[name] = _rounded(name, tensors[name], first, importance.get(name), weigh=scheme == "mixed")
    if scheme == "mixed":
        for name in _worth_int8(found):
            found[name] = _rounded(name, tensors[name], "int8", importance.get(name))
    return {name: tensor for name, tensor in tensors.items() if name not in found}, found


def _worth_int8(found: Mapping[str, QuantizedWeight]) -> set[str]:
    """Which of these int4 matrices to keep in int8 instead, whose error costs next to nothing."""
    weights = sum(one.matrix.rows * one.matrix.columns for one in found.values())
    budget = int(BITS / 8 * weights) - sum(one.matrix.nbytes for one in found.values())
    prices = {}
    for name, one in found.items():
        panels, groups, block = blocks_shape("int8", one.matrix.rows, one.matrix.columns)
        prices[name] = panels * groups * block - one.matrix.nbytes
    return choose_within_budget({name: one.cost for name, one in found.items()}, prices, budget)


def _matrix(name: str, weight: Tensor, format: str, inputs: Tensor | None) -> tuple[QuantizedMatrix, float]:
    try:
        return round_weight(weight, format, inputs)
    except CheckpointError as problem:
        raise CheckpointError(f"{name}: {problem}") from problem


def _rounded(
    name: str, weight: Tensor, format: str, importance: MatrixImportance | None, *, weigh: bool = False
) -> QuantizedWeight:
    # Only the proportions of `inputs` matter for rounding; a mean of one keeps sums of squares far from float32's ends.
    inputs = None if importance is None else importance.inputs / importance.inputs.mean().clamp(min=1e-30)
    matrix, error = _matrix(name, weight, format, inputs)
    square = weight.float().square()
    total = float(square.sum() if inputs is None else (square @ inputs).sum())
    relative = (error / total) ** 0.5 if total else 0.0
    if not weigh:
        return QuantizedWeight(matrix, relative, 0.0)
    if importance is None:
        return QuantizedWeight(matrix, relative, estimate_cost(name, weight.numel(), relative))
    return QuantizedWeight(matrix, relative, compute_cost(weight, matrix, importance))
