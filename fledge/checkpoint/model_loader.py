"""From a checkpoint to a model that runs: the precision of every weight, the device, the strict hand-over.

Precision, stated here and nowhere else:

    matrices    emb, head, att.{receptance,key,value,gate,output}, ffn.{key,value,receptance} (two axes, `*.weight`),
                and those of a transformer: the `dtype` asked for, or the file's own; float16 on a CPU is computed in
                float32
    the rest    norms, mixes, decays, bonus, LoRA factors, tuned state: always float32

Quantized matrices (int8, int4) come from the file as they are, or are made here from the others.
Not here: reading files, and how numbers are rounded (fledge.kernels.rounding).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.checkpoint.adapters.tuned_state import load_tuned_state, merge_tuned_state
from fledge.checkpoint.detection import check_shapes
from fledge.checkpoint.mapped_memory import release_pages
from fledge.checkpoint.quantization.quantizer import check_quantizable, quantize_tensors
from fledge.checkpoint.reader import read
from fledge.core.device import SMALL_MODEL
from fledge.core.errors import UsageError
from fledge.kernels import QuantizedMatrix
from fledge.models import BaseModel, ModelConfig, build
from fledge.models.layers import pack_linears
from fledge.models.native_model import NativeModel, why_not_native

MATRIX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run (in evaluation mode), and what its file said about it."""

    model: BaseModel | NativeModel
    config: ModelConfig
    path: Path
    format: str  # "pth", "safetensors", "gguf", "hf" or "fla"
    tokenizer_spec: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def load_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    pack: bool = False,
    quant: str | None = None,
    tuned: bool = True,
    state_file: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Read a checkpoint and build its model.

    dtype: of the matrices, see above; float32, bfloat16 or float16. pack, quant: see `assemble`.
    tuned: False leaves out a tuned initial state that the checkpoint carries. state_file: one to start from instead.
    On the CPU, weights that keep their dtype stay mapped: they are read when first used and shared between processes.
    A weight that changes its dtype, or is packed, is let go in the file at once, so memory peaks near the size of the
    finished model.
    Raises CheckpointError as `load` does, UsageError for another dtype.
    """
    checkpoint = read(path)
    config, tensors, quantized = checkpoint.config, checkpoint.tensors, checkpoint.quantized
    checkpoint = replace(checkpoint, tensors={}, quantized={})  # from here on these two alone hold the weights
    if not tuned and config.tuned_state:
        config = replace(config, tuned_state=False)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".time_state")}
    if state_file is not None:
        config, tensors = merge_tuned_state(config, tensors, load_tuned_state(state_file), str(state_file))
    given = ModelWeights(tensors, quantized, spend=True)
    del tensors, quantized
    model = assemble(config, given, device=device, dtype=dtype, pack=pack, quant=quant)
    return LoadedModel(model, config, checkpoint.path, checkpoint.format, checkpoint.tokenizer_spec, checkpoint.extra)


@dataclass(frozen=True)
class ModelWeights:
    """What a model is made of: dense tensors and quantized matrices, official names and shapes."""

    tensors: Mapping[str, Tensor]
    quantized: Mapping[str, QuantizedMatrix] = field(default_factory=dict)
    spend: bool = False  # nobody else reads these weights, so what is converted or packed gives up its memory at once


def assemble(
    config: ModelConfig,
    weights: ModelWeights | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    pack: bool = False,
    quant: str | None = None,
) -> BaseModel | NativeModel:
    """The model of `config` with these weights, in evaluation mode.

    Weights whose dtype and device need no change are shared, not copied; what is given stays as it is.
    pack: make a model for inference only, in the CPU's best form: the native library's, or torch with reordered
    matrices where that is missing. Elsewhere than on a CPU it has no effect.
    quant: "int8", "int4" or "mixed" quantizes the matrices that are not yet; a CPU only.
    Quantized matrices run as they are in the native library; anywhere else they are expanded first.
    """
    if dtype is not None and dtype not in MATRIX_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in MATRIX_DTYPES)
        raise UsageError(f"dtype {str(dtype).removeprefix('torch.')} is not one of {names}")
    device = torch.device(device)
    given = weights if isinstance(weights, ModelWeights) else ModelWeights(weights)
    if quant is not None:
        check_quantizable(config, "this model")
        given = _quantized(given, quant, device)
    if pack and device.type == "cpu" and why_not_native(config) is None:
        return _native(config, given, dtype).eval()
    if given.quantized:
        given = _expanded(given, dtype)
    return _torch_model(config, given, device, dtype, pack).eval()


def _quantized(given: ModelWeights, quant: str, device: torch.device) -> ModelWeights:
    if given.quantized:
        raise UsageError(
            f"quant is {quant!r}, but the model is quantized already; leave it out, or give the dense model"
        )
    if device.type != "cpu":
        raise UsageError(f"quant is {quant!r}, but quantized matrices run on a CPU only, not on {device}")
    tensors, quantized = quantize_tensors(given.tensors, quant, release_pages if given.spend else None)
    return ModelWeights(tensors, {**given.quantized, **quantized}, given.spend)


def _native(config: ModelConfig, given: ModelWeights, dtype: torch.dtype | None) -> NativeModel:
    shapes = {name: tuple(tensor.shape) for name, tensor in given.tensors.items()}
    check_shapes({**shapes, **{name: matrix.shape for name, matrix in given.quantized.items()}}, config, "the model")
    return NativeModel(
        config,
        given.tensors,
        given.quantized,
        matrix_dtype=torch.float32 if dtype == torch.float16 else dtype,
        release=release_pages if given.spend else None,
    )


def _expanded(given: ModelWeights, dtype: torch.dtype | None) -> ModelWeights:
    """Dense matrices in place of the quantized ones: float32 where that is affordable, else bfloat16."""
    if dtype is None:
        numbers = sum(matrix.rows * matrix.columns for matrix in given.quantized.values())
        dtype = torch.float32 if numbers < SMALL_MODEL else torch.bfloat16
    dense = {name: matrix.dequantize(dtype) for name, matrix in given.quantized.items()}
    return ModelWeights({**given.tensors, **dense}, spend=given.spend)


def _torch_model(
    config: ModelConfig, given: ModelWeights, device: torch.device, dtype: torch.dtype | None, pack: bool
) -> BaseModel:
    model = build(config, device="meta")
    weights: dict[str, Tensor] = {}
    for name, tensor in given.tensors.items():
        weights[name] = tensor.to(device=device, dtype=choose_weight_dtype(name, tensor, device, dtype))
        if given.spend and weights[name] is not tensor:
            release_pages(tensor)
    model.load_state_dict(weights, strict=True, assign=True)
    del weights  # the model alone holds them now, so packing lets go of each one as it is replaced
    if pack:
        pack_linears(model, release_pages if given.spend else None)
    return model


def choose_weight_dtype(name: str, tensor: Tensor, device: torch.device, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype a weight has in a running model: the table at the top of this file."""
    if not (name.endswith(".weight") and tensor.dim() == 2):
        return torch.float32
    if wanted is not None:
        return wanted
    kept = tensor.dtype in MATRIX_DTYPES and not (tensor.dtype == torch.float16 and device.type == "cpu")
    return tensor.dtype if kept else torch.float32
