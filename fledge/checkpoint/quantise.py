"""Which matrices are quantised and how: "int8", "int4", or "mixed", which decides for each by measured error.

Quantised are the products that make up nearly all of a model: att.{receptance,key,value,gate,output},
ffn.{key,value,receptance} and the head. Everything that RWKV is sensitive in stays as it is: the embedding (rows are
looked up, so it costs no speed), norms, mixes, decay, bonus, LoRA factors and the state.
Not here: how numbers are rounded (fledge.kernels.rounding), and measuring quality (fledge.bench).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fledge.checkpoint.pth import check_sums
from fledge.checkpoint.reader import read
from fledge.checkpoint.sniff import container_of
from fledge.checkpoint.writer import save
from fledge.core.errors import CheckpointError, UsageError
from fledge.kernels import Quantised
from fledge.kernels.rounding import quantise as round_weight
from fledge.models.config import ModelConfig
from fledge.models.native import MATRICES

SCHEMES = ("int8", "int4", "mixed")

OUTLIERS = 1.1
"""mixed: a matrix whose int4 error is above so many times the median of all is kept in int8. RWKV has a few matrices
with outliers that a 4-bit grid cannot hold; the others lose little."""

Importance = Mapping[str, Tensor]
"""Matrix name -> mean square of the activations that its inputs meet, (columns,)."""

Report = Callable[[str, int, int], None]
"""Called with (matrix, matrices done, matrices in all)."""


@dataclass(frozen=True)
class Outcome:
    """What was written: format and relative error of each matrix, and the sizes."""

    source: Path
    target: Path
    scheme: str
    formats: dict[str, str]
    errors: dict[str, float]  # root mean square of what rounding changed, relative to the weights
    nbytes_before: int
    nbytes: int


def quantise(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scheme: str,
    *,
    importance: Importance | None = None,
    force: bool = False,
    report: Report = lambda *_: None,
) -> Outcome:
    """Write the checkpoint `source` as the quantised .safetensors `target`, whole or not at all.

    Raises CheckpointError where the source is quantised already or the target exists (unless `force`), UsageError for
    an unknown scheme or another suffix.
    """
    target = Path(target)
    _check_scheme(scheme)
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: quantised models are written as .safetensors; name the target so")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists; to replace it give force=True, or --force on the command line")
    found = read(source)
    if found.quantised:
        raise CheckpointError(f"{source} is quantised already; give the checkpoint from before quantisation")
    for file in found.files:
        if container_of(file) == "pth":
            check_sums(file)
    before = sum(tensor.numel() * tensor.element_size() for tensor in found.tensors.values())
    rest, quantised, errors = _round_all(found.tensors, scheme, importance or {}, report)
    formats = {name: matrix.format for name, matrix in quantised.items()}
    save(
        target,
        found.config,
        rest,
        quantised=quantised,
        tokenizer_spec=found.tokenizer_spec,
        extra={**found.extra, "quantised": scheme},
    )
    return Outcome(found.path, target, scheme, formats, errors, before, target.stat().st_size)


def quantise_tensors(
    config: ModelConfig, tensors: Mapping[str, Tensor], scheme: str
) -> tuple[dict[str, Tensor], dict[str, Quantised]]:
    """The tensors that stay dense, and the matrices that do not. Raises UsageError for an unknown scheme."""
    _check_scheme(scheme)
    rest, quantised, _ = _round_all(tensors, scheme, {}, lambda *_: None)
    return rest, quantised


def is_matrix(name: str) -> bool:
    """Whether this is the name of a matrix that can be quantised."""
    return name == "head.weight" or (name.startswith("blocks.") and name.split(".", 2)[2] in MATRICES)


def _check_scheme(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise UsageError(f"quantisation {scheme!r:.40} is unknown; choose one of {', '.join(SCHEMES)}")


def _round_all(
    tensors: Mapping[str, Tensor], scheme: str, importance: Importance, report: Report
) -> tuple[dict[str, Tensor], dict[str, Quantised], dict[str, float]]:
    names = [name for name in tensors if is_matrix(name)]
    first = "int8" if scheme == "int8" else "int4"
    quantised: dict[str, Quantised] = {}
    errors: dict[str, float] = {}
    for done, name in enumerate(names):
        report(name, done, len(names))
        quantised[name], errors[name] = _rounded(name, tensors[name], first, importance.get(name))
    if scheme == "mixed" and names:
        limit = OUTLIERS * sorted(errors.values())[len(names) // 2]
        for name in names:
            if errors[name] > limit:
                quantised[name], errors[name] = _rounded(name, tensors[name], "int8", importance.get(name))
    rest = {name: tensor for name, tensor in tensors.items() if name not in quantised}
    return rest, quantised, errors


def _rounded(name: str, weight: Tensor, format: str, importance: Tensor | None) -> tuple[Quantised, float]:
    try:
        matrix, error = round_weight(weight, format, importance)
    except CheckpointError as problem:
        raise CheckpointError(f"{name}: {problem}") from problem
    square = weight.float().square()
    total = float((square if importance is None else square * importance).sum())
    return matrix, (error / total) ** 0.5 if total else 0.0
