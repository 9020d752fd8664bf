"""Merge adapters into a checkpoint: in memory, and to a file, whose predictions are verified before it is kept.

W + (alpha / r) B A is computed in float32 and rounded once, to the dtype of W unless another is requested. A quantized
matrix is expanded first and stays dense, so that nothing is rounded twice. Fully trained parameters replace those of
the base, and a tuned state becomes the initial state of the model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fledge.checkpoint.adapters.files import Adapter, check_base
from fledge.checkpoint.adapters.tuned_state import merge_tuned_state
from fledge.checkpoint.model_loader import assemble
from fledge.checkpoint.reader import read, verify_files
from fledge.checkpoint.record import Checkpoint
from fledge.checkpoint.writer import check_disk_space, check_overwrite, save
from fledge.core.errors import CheckpointError, UsageError
from fledge.models import BaseModel
from fledge.models.adapters import LoraFactors, build_adapted_model, build_tuned_state, combine_factors, merge_weight

COMPARED_TOKENS = 24
"""Tokens read to compare the merged model with base and adapter."""

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest difference of a logit, relative to their spread, that rounding the merged weights once may cause."""

SUFFIXES = (".safetensors", ".pth")


@dataclass(frozen=True)
class MergeReport:
    """The written file and its verification. Differences are relative to the standard deviation of the logits."""

    target: Path
    nbytes: int
    difference: float  # largest difference of a logit between the merged file and base with adapter
    effect: float  # largest difference of a logit that the adapters cause
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CombinedAdapter:
    """The combined changes of one or several adapters."""

    factors: Mapping[str, LoraFactors] = field(default_factory=dict)  # blocks.<i>.att.key -> its factors
    full_parameters: Mapping[str, Tensor] = field(default_factory=dict)  # parameters that are replaced
    state: Mapping[str, Tensor] = field(default_factory=dict)  # blocks.<i>.att.time_state, (H, V, K)
    template: str | None = None  # the chat template


def combine_adapters(adapters: Sequence[Adapter]) -> CombinedAdapter:
    """Combine several adapters: factors add up, and the last recorded chat template applies.

    Raises UsageError if two adapters contain the same parameter, or a tuned state each.
    """
    full_parameters: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    owner: dict[str, Path] = {}
    template: str | None = None
    for adapter in adapters:
        for name in (*adapter.full_parameters, *adapter.state):
            if name in owner:
                item = "a tuned state" if name in state else name
                raise UsageError(f"{owner[name]} and {adapter.path} both contain {item}; use only one of them")
            owner[name] = adapter.path
        full_parameters, state = {**full_parameters, **adapter.full_parameters}, {**state, **adapter.state}
        template = adapter.template or template
    return CombinedAdapter(combine_factors([adapter.factors for adapter in adapters]), full_parameters, state, template)


def merge_adapters(checkpoint: Checkpoint, changes: CombinedAdapter, dtype: torch.dtype | None = None) -> Checkpoint:
    """Return the checkpoint with the changes merged into its weights. Call `check_base` first.

    dtype: of the changed matrices; None keeps theirs, or uses that of the embedding for quantized ones.
    """
    tensors, quantized = dict(checkpoint.tensors), dict(checkpoint.quantized)
    for name, tensor in changes.full_parameters.items():
        replaced = "emb.weight" if quantized.pop(name, None) else name
        tensors[name] = tensor.to(tensors[replaced].dtype, copy=True)  # a copy, as packing may release its memory
    for name, factors in changes.factors.items():
        weight = f"{name}.weight"
        if weight in quantized:
            dense = quantized.pop(weight).dequantize(torch.float32)
            tensors[weight] = merge_weight(dense, factors, dtype or tensors["emb.weight"].dtype)
        else:
            tensors[weight] = merge_weight(tensors[weight], factors, dtype)
    config = checkpoint.config
    if changes.state:
        config, tensors = merge_tuned_state(config, tensors, changes.state)
    return replace(checkpoint, config=config, tensors=tensors, quantized=quantized)


def merge_to_file(
    source: str | os.PathLike[str],
    adapters: Sequence[Adapter],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
) -> MergeReport:
    """Write the checkpoint `source` with `adapters` in its weights as `target` (.safetensors or .pth).

    The file is read back, and kept only if its logits equal those of base and adapters. Raises CheckpointError if they
    do not, if the target exists (unless `force`), or if the source is quantized or another base.
    """
    target, adapters = Path(target), tuple(adapters)
    if target.suffix not in SUFFIXES:
        raise UsageError(f"{target}: merged models are written as {' or '.join(SUFFIXES)}; convert the file afterwards")
    check_overwrite(target, force)
    base = read(source)
    if base.quantized:
        raise CheckpointError(f"{source} is quantized; merge into the dense model, and quantize the result")
    verify_files(base)
    check_base(adapters, base)
    changes = combine_adapters(adapters)
    merged = merge_adapters(base, changes)
    check_disk_space(target.parent, merged.tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        written = Path(folder) / target.name
        notes = _write(merged, adapters, changes.template or base.template, written)
        difference, effect = _compare(base, changes, written)
        tolerance = TOLERANCE[base.tensors["blocks.0.att.key.weight"].dtype]
        if not difference <= tolerance:
            raise CheckpointError(
                f"the merged model does not predict the same as {source} with the adapter (logits differ by "
                f"{difference:.2g} of their spread, at most {tolerance:g} is rounding); {target} was not written"
            )
        os.replace(written, target)
    if difference > effect / 2:
        notes = (*notes, "the effect of the adapter is so small that rounding to the dtype of the base hides it")
    return MergeReport(target, target.stat().st_size, difference, effect, notes)


def _write(merged: Checkpoint, adapters: Sequence[Adapter], template: str | None, path: Path) -> tuple[str, ...]:
    if path.suffix == ".pth":
        save(path, merged.config, merged.tensors)
        notes = ["a .pth cannot hold the tokenizer; it was left out"] if merged.tokenizer_spec else []
        if template:
            notes.append(f"a .pth cannot hold the chat template; chat with --template {template}")
        return tuple(notes)
    record = [
        {"file": a.path.name, "kind": a.kind, "alpha": a.alpha, "base": a.base and a.base.identity} for a in adapters
    ]
    # The facts about the base, such as its quality, do not apply to the merged model.
    extra = {"base": merged.extra, "merged": record, **({"template": template} if template else {})}
    save(path, merged.config, merged.tensors, tokenizer_spec=merged.tokenizer_spec, extra=extra)
    return ()


@torch.no_grad()
def _compare(base: Checkpoint, changes: CombinedAdapter, written: Path) -> tuple[float, float]:
    """Return the largest differences between merged and adapted, and between adapted and base, on a few tokens.

    All are computed in float32 and relative to the spread of the logits.
    """
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(base.config.vocab_size, (1, COMPARED_TOKENS), generator=generator)
    plain = assemble(base.config, base.tensors, dtype=torch.float32)
    assert isinstance(plain, BaseModel)
    initial = build_tuned_state(base.config, changes.state) if changes.state else None
    expected = build_adapted_model(plain, changes.factors, changes.full_parameters)(idx, initial)[0]
    unchanged = plain(idx)[0]
    del plain  # so that only two models are in memory at a time
    stored = read(written)
    actual = assemble(stored.config, stored.tensors, dtype=torch.float32)(idx)[0]
    spread = float(expected.std())
    return float((actual - expected).abs().max()) / spread, float((expected - unchanged).abs().max()) / spread
