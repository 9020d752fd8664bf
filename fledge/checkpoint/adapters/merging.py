"""Adapters merged into a checkpoint: in memory, and as a file that is only kept once it predicts what it should.

W + (alpha / r) B A is added up in float32 and rounded once, to the dtype W has unless another is asked for; a quantized
matrix is expanded first and stays dense, so that nothing is rounded twice. Parts that were trained whole
take the place of the base's, and a tuned state becomes the one that the model starts from.
Not here: reading adapters (adapters.py), applying them without merging (fledge.models.adapters).
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
from fledge.checkpoint.formats.container import detect_container
from fledge.checkpoint.formats.pth import verify_checksums
from fledge.checkpoint.model_loader import assemble
from fledge.checkpoint.reader import read
from fledge.checkpoint.record import Checkpoint
from fledge.checkpoint.writer import check_disk_space, check_overwrite, save
from fledge.core.errors import CheckpointError, UsageError
from fledge.models import BaseModel
from fledge.models.adapters import LoraFactors, adapted, merged_weight, stacked, start_state

TOKENS = 24
"""How many are read to compare the merged model with the unmerged one."""

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest difference of a logit, relative to their spread: what rounding the merged weights once may change."""

SUFFIXES = (".safetensors", ".pth")


@dataclass(frozen=True)
class MergeReport:
    """What was written, and how it was verified; all relative to the spread (standard deviation) of the logits."""

    target: Path
    nbytes: int
    difference: float  # largest difference between a logit of the merged file and of base and adapter apart
    effect: float  # largest difference that the adapters make
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CombinedAdapter:
    """What one or several adapters do together."""

    factors: Mapping[str, LoraFactors] = field(default_factory=dict)  # blocks.<i>.att.key -> what is added to it
    full_parameters: Mapping[str, Tensor] = field(default_factory=dict)  # parameters that are replaced
    state: Mapping[str, Tensor] = field(default_factory=dict)  # blocks.<i>.att.time_state, (H, V, K)
    template: str | None = None  # of chats


def combine_adapters(adapters: Sequence[Adapter]) -> CombinedAdapter:
    """Several adapters as one: factors add up, and chats are written as the last that tells was trained.

    Raises UsageError where two adapters bring the same part, or a tuned state each.
    """
    full_parameters: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    owner: dict[str, Path] = {}
    template: str | None = None
    for adapter in adapters:
        for name in (*adapter.full_parameters, *adapter.state):
            if name in owner:
                what = "a tuned state" if name in state else name
                raise UsageError(f"{owner[name]} and {adapter.path} both bring {what}; use one of them at a time")
            owner[name] = adapter.path
        full_parameters, state = {**full_parameters, **adapter.full_parameters}, {**state, **adapter.state}
        template = adapter.template or template
    return CombinedAdapter(stacked([adapter.factors for adapter in adapters]), full_parameters, state, template)


def merge_adapters(checkpoint: Checkpoint, changes: CombinedAdapter, dtype: torch.dtype | None = None) -> Checkpoint:
    """The checkpoint with the changes in its weights; what was given stays as it is. `check_base` first.

    dtype: of the matrices that are changed; None: what they have, or the embedding's where they were quantized.
    """
    tensors, quantized = dict(checkpoint.tensors), dict(checkpoint.quantized)
    for name, tensor in changes.full_parameters.items():
        kept = tensors["emb.weight" if quantized.pop(name, None) else name].dtype
        tensors[name] = tensor.to(kept, copy=True)  # whoever packs these may give up their memory
    for name, one in changes.factors.items():
        weight = f"{name}.weight"
        if weight in quantized:
            dense = quantized.pop(weight).dequantize(torch.float32)
            tensors[weight] = merged_weight(dense, one, dtype or tensors["emb.weight"].dtype)
        else:
            tensors[weight] = merged_weight(tensors[weight], one, dtype)
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

    The file is read back, and kept only if its logits are those of base and adapters apart. Raises CheckpointError
    where they are not, where the target exists (unless `force`), where the source is quantized or another base.
    """
    target, adapters = Path(target), tuple(adapters)
    if target.suffix not in SUFFIXES:
        raise UsageError(f"{target}: a merged model is written as {' or '.join(SUFFIXES)}; convert it afterwards")
    check_overwrite(target, force)
    found = read(source)
    if found.quantized:
        raise CheckpointError(f"{source} is quantized; merge into the dense model, and quantize the result")
    for file in found.files:
        if detect_container(file) == "pth":
            verify_checksums(file)
    check_base(adapters, found)
    changes = combine_adapters(adapters)
    done = merge_adapters(found, changes)
    check_disk_space(target.parent, done.tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        written = Path(folder) / target.name
        notes = _write(done, adapters, changes.template or found.template, written)
        difference, effect = _compare(found, changes, written)
        tolerance = TOLERANCE[found.tensors["blocks.0.att.key.weight"].dtype]
        if not difference <= tolerance:
            raise CheckpointError(
                f"the merged model does not predict what {source} with the adapter does (logits differ by "
                f"{difference:.2g} of their spread, at most {tolerance:g} is rounding); {target} was not written"
            )
        os.replace(written, target)
    if difference > effect / 2:
        notes = (*notes, "the adapter changes so little that rounding to the base's dtype hides it")
    return MergeReport(target, target.stat().st_size, difference, effect, notes)


def _write(done: Checkpoint, adapters: Sequence[Adapter], template: str | None, path: Path) -> tuple[str, ...]:
    if path.suffix == ".pth":
        save(path, done.config, done.tensors)
        notes = ["a .pth cannot hold the tokenizer; it was left out"] if done.tokenizer_spec else []
        told = [f"a .pth cannot hold the chat template; chat with --template {template}"] if template else []
        return (*notes, *told)
    record = [
        {"file": a.path.name, "kind": a.kind, "alpha": a.alpha, "base": a.base and a.base.identity} for a in adapters
    ]
    # What was said of the base, its quality say, is not true of this.
    extra = {"base": done.extra, "merged": record, **({"template": template} if template else {})}
    save(path, done.config, done.tensors, tokenizer_spec=done.tokenizer_spec, extra=extra)
    return ()


@torch.no_grad()
def _compare(base: Checkpoint, changes: CombinedAdapter, written: Path) -> tuple[float, float]:
    """(difference of merged and unmerged, effect of the changes), of the logits of a few tokens, in float32."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(base.config.vocab_size, (1, TOKENS), generator=generator)
    plain = assemble(base.config, base.tensors, dtype=torch.float32)
    assert isinstance(plain, BaseModel)
    begin = start_state(base.config, changes.state) if changes.state else None
    wanted = adapted(plain, changes.factors, changes.full_parameters)(idx, begin)[0]
    before = plain(idx)[0]
    del plain  # two models in memory at a time are enough
    again = read(written)
    found = assemble(again.config, again.tensors, dtype=torch.float32)(idx)[0]
    spread = float(wanted.std())
    return float((found - wanted).abs().max()) / spread, float((wanted - before).abs().max()) / spread
