"""From a checkpoint to a model that runs: the precision of every weight, the device, the strict hand-over.

Precision, stated here and nowhere else:

    matrices    emb, head, att.{receptance,key,value,gate,output}, ffn.{key,value,receptance} (two axes, `*.weight`):
                the `dtype` asked for, or the file's own; float16 on a CPU becomes float32, which is faster there
    the rest    norms, mixes, decays, bonus, LoRA factors, tuned state: always float32

Not here: reading files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.checkpoint.pages import release_pages
from fledge.checkpoint.reader import read
from fledge.checkpoint.tuned import load_tuned_state, merge_tuned_state
from fledge.core.errors import UsageError
from fledge.models import ModelConfig, Trunk, build
from fledge.models.layers import pack_linears

MATRIX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run (in evaluation mode), and what its file said about it."""

    model: Trunk
    config: ModelConfig
    path: Path
    format: str  # "pth", "safetensors", "hf" or "fla"
    tokenizer_spec: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def load_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    pack: bool = False,
    tuned: bool = True,
    state_file: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Read a checkpoint and build its model.

    dtype: of the matrices, see above; float32, bfloat16 or float16. pack: see `assemble`.
    tuned: False leaves out a tuned initial state that the checkpoint carries. state_file: one to start from instead.
    On the CPU, weights that keep their dtype stay mapped: they are read when first used and shared between processes.
    A weight that changes its dtype, or is packed, is let go in the file at once, so memory peaks near the size of the
    finished model.
    Raises CheckpointError as `load` does, UsageError for another dtype.
    """
    checkpoint = read(path)
    config, tensors = checkpoint.config, checkpoint.tensors
    checkpoint = replace(checkpoint, tensors={})  # from here on `tensors` alone holds the weights
    if not tuned and config.tuned_state:
        config = replace(config, tuned_state=False)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".time_state")}
    if state_file is not None:
        config, tensors = merge_tuned_state(config, tensors, load_tuned_state(state_file), str(state_file))
    model = assemble(config, tensors, device=device, dtype=dtype, pack=pack, spend=True)
    return LoadedModel(model, config, checkpoint.path, checkpoint.format, checkpoint.tokenizer_spec, checkpoint.extra)


def assemble(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    pack: bool = False,
    spend: bool = False,
) -> Trunk:
    """The model of `config` with these weights (official names and shapes), in evaluation mode.

    Weights whose dtype and device need no change are shared with `tensors`, not copied; `tensors` stays as it is.
    pack: give the matrices to the CPU's best layout, where that can be done; the model is then for inference only.
    spend: nobody else reads these weights, so those that are converted or packed give up their memory at once.
    """
    if dtype is not None and dtype not in MATRIX_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in MATRIX_DTYPES)
        raise UsageError(f"dtype {str(dtype).removeprefix('torch.')} is not one of {names}")
    device = torch.device(device)
    model = build(config, device="meta")
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        weights[name] = tensor.to(device=device, dtype=weight_dtype(name, tensor, device, dtype))
        if spend and weights[name] is not tensor:
            release_pages(tensor)
    model.load_state_dict(weights, strict=True, assign=True)
    del weights  # the model alone holds them now, so packing lets go of each one as it is replaced
    if pack:
        pack_linears(model, release_pages if spend else None)
    return model.eval()


def weight_dtype(name: str, tensor: Tensor, device: torch.device, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype a weight has in a running model: the table at the top of this file."""
    if not (name.endswith(".weight") and tensor.dim() == 2):
        return torch.float32
    if wanted is not None:
        return wanted
    kept = tensor.dtype in MATRIX_DTYPES and not (tensor.dtype == torch.float16 and device.type == "cpu")
    return tensor.dtype if kept else torch.float32
