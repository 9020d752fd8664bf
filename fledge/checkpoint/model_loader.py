"""Build a model that runs from a checkpoint: the precision and device of every weight, and a strict load.

The precision of the weights:

    matrices    emb, head, att.{receptance,key,value,gate,output}, ffn.{key,value,receptance} (two axes, `*.weight`),
                and those of a transformer: the requested `dtype`, or that of the file; float16 on a CPU is computed in
                float32
    the rest    norms, mixes, decays, bonus, LoRA factors, tuned state: always float32

Quantized matrices (int8, int4) are read from the file, or quantized here from dense ones.
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
    """A model ready to run (in evaluation mode), and the facts from its file."""

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
    tuned: False drops the tuned initial state of the checkpoint. state_file: a tuned state to start from instead.
    On the CPU, weights that keep their dtype stay mapped: they are read on first use and shared between processes. The
    file pages of a weight that changes its dtype or is packed are released immediately, so that peak memory is close to
    the size of the final model.
    Raises CheckpointError as `load` does, UsageError for another dtype.
    """
    checkpoint = read(path)
    config, tensors, quantized = checkpoint.config, checkpoint.tensors, checkpoint.quantized
    checkpoint = replace(checkpoint, tensors={}, quantized={})  # only `tensors` and `quantized` hold the weights now
    if not tuned and config.tuned_state:
        config = replace(config, tuned_state=False)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".time_state")}
    if state_file is not None:
        config, tensors = merge_tuned_state(config, tensors, load_tuned_state(state_file), str(state_file))
    weights = ModelWeights(tensors, quantized, is_consumable=True)
    del tensors, quantized
    model = assemble(config, weights, device=device, dtype=dtype, pack=pack, quant=quant)
    return LoadedModel(model, config, checkpoint.path, checkpoint.format, checkpoint.tokenizer_spec, checkpoint.extra)


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a model: dense tensors and quantized matrices, with official names and shapes."""

    tensors: Mapping[str, Tensor]
    quantized: Mapping[str, QuantizedMatrix] = field(default_factory=dict)
    is_consumable: bool = False  # nothing else reads these weights: memory is released as they are converted or packed


def assemble(
    config: ModelConfig,
    weights: ModelWeights | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    pack: bool = False,
    quant: str | None = None,
) -> BaseModel | NativeModel:
    """Build the model of `config` with these weights, in evaluation mode.

    Weights whose dtype and device do not change are shared, not copied, and the arguments are not modified.
    pack: build a model for inference only, in the fastest form on a CPU: the native library, or torch with reordered
    matrices if the library is missing. On other devices it has no effect.
    quant: "int8", "int4" or "mixed" quantizes the dense matrices; CPU only.
    The native library runs quantized matrices directly; everywhere else they are expanded first.
    """
    if dtype is not None and dtype not in MATRIX_DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in MATRIX_DTYPES)
        raise UsageError(f"dtype {str(dtype).removeprefix('torch.')} is not one of {names}")
    device = torch.device(device)
    weights = weights if isinstance(weights, ModelWeights) else ModelWeights(weights)
    if quant is not None:
        check_quantizable(config, "this model")
        weights = _quantize(weights, quant, device)
    if pack and device.type == "cpu" and why_not_native(config) is None:
        return _build_native(config, weights, dtype).eval()
    if weights.quantized:
        weights = _expand(weights, dtype)
    return _build_torch(config, weights, device, dtype, pack).eval()


def _quantize(weights: ModelWeights, quant: str, device: torch.device) -> ModelWeights:
    if weights.quantized:
        raise UsageError(f"quant is {quant!r}, but the model is already quantized; omit quant, or give the dense model")
    if device.type != "cpu":
        raise UsageError(f"quant is {quant!r}, but quantized matrices run on a CPU only, not on {device}")
    tensors, quantized = quantize_tensors(weights.tensors, quant, release_pages if weights.is_consumable else None)
    return ModelWeights(tensors, {**weights.quantized, **quantized}, weights.is_consumable)


def _build_native(config: ModelConfig, weights: ModelWeights, dtype: torch.dtype | None) -> NativeModel:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
    check_shapes({**shapes, **{name: matrix.shape for name, matrix in weights.quantized.items()}}, config, "the model")
    return NativeModel(
        config,
        weights.tensors,
        weights.quantized,
        matrix_dtype=torch.float32 if dtype == torch.float16 else dtype,
        release=release_pages if weights.is_consumable else None,
    )


def _expand(weights: ModelWeights, dtype: torch.dtype | None) -> ModelWeights:
    """Replace quantized matrices by dense ones: float32 for a small model, else bfloat16."""
    if dtype is None:
        numbers = sum(matrix.rows * matrix.columns for matrix in weights.quantized.values())
        dtype = torch.float32 if numbers < SMALL_MODEL else torch.bfloat16
    dense = {name: matrix.dequantize(dtype) for name, matrix in weights.quantized.items()}
    return ModelWeights({**weights.tensors, **dense}, is_consumable=weights.is_consumable)


def _build_torch(
    config: ModelConfig, weights: ModelWeights, device: torch.device, dtype: torch.dtype | None, pack: bool
) -> BaseModel:
    model = build(config, device="meta")
    parameters: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        parameters[name] = tensor.to(device=device, dtype=choose_weight_dtype(name, tensor, device, dtype))
        if weights.is_consumable and parameters[name] is not tensor:
            release_pages(tensor)
    model.load_state_dict(parameters, strict=True, assign=True)
    del parameters  # only the model holds them now, so packing frees each one as it is replaced
    if pack:
        pack_linears(model, release_pages if weights.is_consumable else None)
    return model


def choose_weight_dtype(name: str, tensor: Tensor, device: torch.device, requested: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a weight in a running model, as in the table above."""
    if not (name.endswith(".weight") and tensor.dim() == 2):
        return torch.float32
    if requested is not None:
        return requested
    kept = tensor.dtype in MATRIX_DTYPES and not (tensor.dtype == torch.float16 and device.type == "cpu")
    return tensor.dtype if kept else torch.float32
