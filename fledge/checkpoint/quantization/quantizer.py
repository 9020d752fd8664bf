"""Quantize a checkpoint with a scheme: "int8", "int4", or "mixed", which chooses one of them for each matrix.

The quantized matrices are nearly all weights of a model: att.{receptance,key,value,gate,output},
ffn.{key,value,receptance} and the head. The others, to which RWKV is sensitive, are unchanged: the embedding (a lookup
of rows, which quantization would not make faster), norms, mixes, decay, bonus, LoRA factors and the state.
"mixed" is int4, with int8 for the matrices that improve the predictions most, up to MAX_BITS per weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fledge.checkpoint.identity import compute_identity
from fledge.checkpoint.quantization.sensitivity import (
    MatrixImportance,
    choose_within_budget,
    compute_cost,
    estimate_cost,
)
from fledge.checkpoint.reader import read, verify_files
from fledge.checkpoint.writer import check_overwrite, save
from fledge.core.errors import CheckpointError, UnsupportedError, UsageError
from fledge.kernels import QuantizedMatrix
from fledge.kernels.quantized import blocks_shape
from fledge.kernels.rounding import quantize as round_weight
from fledge.models.config import ModelConfig
from fledge.models.native_model import MATRICES

SCHEMES = ("int8", "int4", "mixed")

MAX_BITS = 6.3
"""mixed: the maximum mean of bits per quantized weight. Enough for int8 in a head that is a third of all weights."""

Importances = Mapping[str, MatrixImportance]
"""Matrix name -> its importance, measured on a text."""

ProgressCallback = Callable[[str, int, int], None]
"""Called with (matrix, number of finished matrices, number of all matrices)."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized matrix and its difference from the original weight."""

    matrix: QuantizedMatrix
    error: float  # relative root mean square of the rounding error, of the weights; with importance, of the outputs
    cost: float  # of its int4 form, see sensitivity.py; for "mixed" only


@dataclass(frozen=True)
class QuantizationReport:
    """The result: format and relative error of each matrix, and the sizes."""

    source: Path
    target: Path
    scheme: str
    calibrated: bool
    formats: dict[str, str]
    errors: dict[str, float]  # as in QuantizedWeight
    weights: int  # in all quantized matrices
    nbytes_quantized: int  # of all quantized matrices
    nbytes_before: int  # of all tensors
    nbytes: int  # of the file that was written

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, with scales, minima and padding."""
        return 8 * self.nbytes_quantized / self.weights


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scheme: str,
    *,
    importance: Importances | None = None,
    force: bool = False,
    report: ProgressCallback = lambda *_: None,
) -> QuantizationReport:
    """Quantize the checkpoint `source` and write it atomically as the .safetensors `target`.

    importance: from `fledge.checkpoint.quantization.calibration`; None gives every input the same weight.
    Raises CheckpointError if the source is already quantized or the target exists (unless `force`), UsageError for an
    unknown scheme or another suffix.
    """
    target = Path(target)
    check_request(target, scheme, force)
    checkpoint = read(source)
    check_quantizable(checkpoint.config, str(source))
    if checkpoint.quantized:
        raise CheckpointError(f"{source} is already quantized; use the unquantized checkpoint")
    verify_files(checkpoint)
    before = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.tensors.values())
    rest, rounded = _round_all(checkpoint.tensors, scheme, importance or {}, report)
    matrices = {name: weight.matrix for name, weight in rounded.items()}
    # Adapters of the dense model fit the quantized one, so the identity of the dense model is recorded.
    facts = {"scheme": scheme, "calibrated": bool(importance), "base": compute_identity(checkpoint)}
    save(
        target,
        checkpoint.config,
        rest,
        quantized=matrices,
        tokenizer_spec=checkpoint.tokenizer_spec,
        extra={**checkpoint.extra, "quantised": facts},
    )
    return QuantizationReport(
        source=checkpoint.path,
        target=target,
        scheme=scheme,
        calibrated=bool(importance),
        formats={name: matrix.format for name, matrix in matrices.items()},
        errors={name: weight.error for name, weight in rounded.items()},
        weights=sum(matrix.rows * matrix.columns for matrix in matrices.values()),
        nbytes_quantized=sum(matrix.nbytes for matrix in matrices.values()),
        nbytes_before=before,
        nbytes=target.stat().st_size,
    )


def check_quantizable(config: ModelConfig, source: str) -> None:
    """Raise UnsupportedError for the transformer, which exists only for comparisons."""
    if config.version == "llama":
        raise UnsupportedError(f"{source} is a transformer; only RWKV models can be quantized")


def check_request(target: Path, scheme: str, force: bool) -> None:
    """Raise the errors of `quantize` that are known without reading the source, before a long calibration."""
    _check_scheme(scheme)
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: quantized models are written as .safetensors; give the target that suffix")
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name a file")
    check_overwrite(target, force)


def quantize_tensors(
    tensors: Mapping[str, Tensor], scheme: str, release: Callable[[Tensor], None] | None = None
) -> tuple[dict[str, Tensor], dict[str, QuantizedMatrix]]:
    """Return the tensors that stay dense, and the quantized matrices. Raises UsageError for an unknown scheme.

    release: called with each weight that is no longer needed.
    """
    _check_scheme(scheme)
    rest: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedMatrix] = {}
    if scheme == "mixed":  # the choice needs the errors of all matrices
        rest, rounded = _round_all(tensors, scheme, {}, lambda *_: None)
        quantized = {name: weight.matrix for name, weight in rounded.items()}
    for name, tensor in tensors.items():
        if scheme == "mixed" or not is_quantizable(name):
            if name not in quantized:
                rest[name] = tensor
        else:
            quantized[name] = _round_matrix(name, tensor, scheme, None)[0]
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
    tensors: Mapping[str, Tensor], scheme: str, importance: Importances, report: ProgressCallback
) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    names = [name for name in tensors if is_quantizable(name)]
    format = "int8" if scheme == "int8" else "int4"
    rounded: dict[str, QuantizedWeight] = {}
    for done, name in enumerate(names):
        report(name, done, len(names))
        rounded[name] = _round_weight(name, tensors[name], format, importance.get(name), with_cost=scheme == "mixed")
    if scheme == "mixed":
        for name in _choose_int8(rounded):
            rounded[name] = _round_weight(name, tensors[name], "int8", importance.get(name))
    return {name: tensor for name, tensor in tensors.items() if name not in rounded}, rounded


def _choose_int8(rounded: Mapping[str, QuantizedWeight]) -> set[str]:
    """Choose the int4 matrices that become int8, with an error that costs nearly nothing."""
    matrices = {name: weight.matrix for name, weight in rounded.items()}
    weights = sum(matrix.rows * matrix.columns for matrix in matrices.values())
    budget = int(MAX_BITS / 8 * weights) - sum(matrix.nbytes for matrix in matrices.values())
    prices = {}
    for name, matrix in matrices.items():
        panels, groups, block = blocks_shape("int8", matrix.rows, matrix.columns)
        prices[name] = panels * groups * block - matrix.nbytes
    return choose_within_budget({name: weight.cost for name, weight in rounded.items()}, prices, budget)


def _round_matrix(name: str, weight: Tensor, format: str, inputs: Tensor | None) -> tuple[QuantizedMatrix, float]:
    try:
        return round_weight(weight, format, inputs)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _round_weight(
    name: str, weight: Tensor, format: str, importance: MatrixImportance | None, *, with_cost: bool = False
) -> QuantizedWeight:
    # Only the proportions of `inputs` matter for rounding. With a mean of 1, sums of squares stay in range of float32.
    inputs = None if importance is None else importance.inputs / importance.inputs.mean().clamp(min=1e-30)
    matrix, error = _round_matrix(name, weight, format, inputs)
    square = weight.float().square()
    total = float(square.sum() if inputs is None else (square @ inputs).sum())
    relative = (error / total) ** 0.5 if total else 0.0
    if not with_cost:
        return QuantizedWeight(matrix, relative, 0.0)
    if importance is None:
        return QuantizedWeight(matrix, relative, estimate_cost(name, weight.numel(), relative))
    return QuantizedWeight(matrix, relative, compute_cost(weight, matrix, importance))
