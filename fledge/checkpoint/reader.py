"""Read a checkpoint of any format, from a path or a hub name, with official names, a config and checks."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fledge.checkpoint import metadata
from fledge.checkpoint.detection import detect
from fledge.checkpoint.formats.container import detect_container
from fledge.checkpoint.formats.fla import from_fla
from fledge.checkpoint.formats.gguf.reader import read_gguf
from fledge.checkpoint.formats.huggingface.folder import read_folder
from fledge.checkpoint.formats.huggingface.names import PREFIX, detect_layout, from_hf
from fledge.checkpoint.formats.huggingface.settings import MAX_NUMBER, apply_hf_config
from fledge.checkpoint.formats.pth import read_pth, verify_checksums
from fledge.checkpoint.formats.safetensors import DTYPES, read_safetensors
from fledge.checkpoint.hub import locate
from fledge.checkpoint.record import Checkpoint, RawFile, StoredMetadata
from fledge.checkpoint.shapes import Shape, get_expected_shapes
from fledge.checkpoint.unsupported import check_supported
from fledge.core.errors import CheckpointError, ConfigError, UnsupportedError
from fledge.kernels.quantized import QuantizedMatrix
from fledge.models.config import NOT_IN_SHAPES, ModelConfig
from fledge.models.native_model import MATRICES

StrPath = str | os.PathLike[str]
BLOCK = re.compile(r"^blocks\.\d+\.")


def load(path: StrPath) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the config and tensors (official names, shapes and order, the dtypes of the file, on the CPU).

    path: a .pth, a .safetensors, a .gguf, a Hugging Face folder, or a hub name `owner/name`. The tensors are mapped
    from the file, and nothing is copied before it is used. Quantized matrices are unpacked to float32, which is exact
    but large; `read` keeps them. Raises CheckpointError, or UnsupportedError for RWKV-7 and other unsupported models.
    """
    checkpoint = read(path)
    return checkpoint.config, checkpoint.dequantize()


def read(path: StrPath, *, weights: bool = True) -> Checkpoint:
    """Read a whole checkpoint. Without `weights` all tensors are on "meta" and none is read. Raises as `load` does."""
    return interpret(read_raw(locate(path), weights=weights))


def verify(path: StrPath) -> Checkpoint:
    """Read every weight once, to verify the checksums of a .pth and to find non-finite values.

    Loading maps the weights and detects neither. Raises CheckpointError naming the damaged file or tensor.
    """
    checkpoint = read(path)
    verify_files(checkpoint)
    scales = ((name, part) for name, matrix in checkpoint.quantized.items() for part in matrix.groups()[1:])
    for name, tensor in (*checkpoint.tensors.items(), *scales):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{checkpoint.path}: {name} contains non-finite values; the model cannot be used")
    return checkpoint


def verify_files(checkpoint: Checkpoint) -> None:
    """Verify the checksums of a checkpoint's .pth files; other formats have none. Raises CheckpointError."""
    for file in checkpoint.files:
        if detect_container(file) == "pth":
            verify_checksums(file)


def read_raw(path: Path, *, weights: bool = True) -> RawFile:
    """Read a local file or folder, with the tensor names of its own layout."""
    if path.is_dir():
        return read_folder(path, weights=weights)
    container = detect_container(path)
    if container == "gguf":
        return read_gguf(path, weights=weights)
    if container == "safetensors":
        tensors, texts = read_safetensors(path, weights=weights)
        stored = metadata.decode(texts, str(path))
        quantized = _take_quantized(tensors, stored, path)
        return RawFile(path, "safetensors", tensors, (path,), stored, quantized=quantized)
    return RawFile(path, "pth", read_pth(path, weights=weights), (path,))


def _take_quantized(tensors: dict[str, Tensor], stored: StoredMetadata, path: Path) -> dict[str, QuantizedMatrix]:
    """Move the matrices that the file records as quantized out of `tensors`."""
    quantized: dict[str, QuantizedMatrix] = {}
    for name, spec in stored.quantized.items():
        if name != "head.weight" and BLOCK.sub("", name, count=1) not in MATRICES:
            raise CheckpointError(
                f"{path}: its header lists {name!r:.80} as quantized, but this tensor is never quantized"
            )
        if name not in tensors:
            raise CheckpointError(f"{path}: its header lists {name!r:.80} as quantized, but there is no such tensor")
        try:
            quantized[name] = QuantizedMatrix(*spec, tensors.pop(name))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {name}: {error}; the file is damaged") from error
    return quantized


def interpret(raw: RawFile) -> Checkpoint:
    """Rename to official names, detect the config, and run all checks that need no tensor values."""
    source = str(raw.path)
    layout, tensors = rename_to_official(raw.tensors, source)
    if repeated := tensors.keys() & raw.quantized.keys():
        raise CheckpointError(f"{source} holds {min(repeated)!r:.80} twice, dense and quantized; the file is damaged")
    shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    heads = raw.stored.config.n_head if raw.stored.config else None
    config = detect(shapes | {name: matrix.shape for name, matrix in raw.quantized.items()}, source, heads)
    _check_dtypes(tensors, source)
    if raw.stored.config is not None:
        config = _merge_configs(config, raw.stored.config, source)
    if raw.container == "folder":
        claimed = apply_hf_config(config, raw.settings, layout, source)
        if raw.stored.config is not None:
            _check_epsilons(claimed, config, source)
        else:
            config = claimed
    # Always the official order: other programs detect versions by it, and safetensors keeps no order.
    shapes = get_expected_shapes(config)
    tensors = {name: tensors[name] for name in shapes if name in tensors}
    quantized = {name: raw.quantized[name] for name in shapes if name in raw.quantized}
    metadata.check_vocabulary(config, raw.stored.tokenizer_spec, source)
    kind = raw.container if raw.container != "folder" else "fla" if layout == "fla" else "hf"
    stored = raw.stored
    return Checkpoint(raw.path, kind, config, tensors, raw.files, stored.tokenizer_spec, stored.extra, quantized)


def rename_to_official(tensors: dict[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """Return the layout of these names, and the tensors under official names."""
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise CheckpointError(f"{source} holds the same tensor with and without the prefix {PREFIX}")
    layout = detect_layout(plain)
    check_supported(plain.keys(), source)
    if layout == "hf":
        official = {from_hf(name): tensor for name, tensor in plain.items()}
        if len(official) < len(plain):
            raise CheckpointError(f"{source} holds the same tensor under its Hugging Face name and its official one")
        return layout, official
    if layout == "fla":
        try:
            return layout, from_fla(plain)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from error
    return layout, plain


def _check_dtypes(tensors: dict[str, Tensor], source: str) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise UnsupportedError(
                f"{source}: {name} has dtype {str(tensor.dtype).removeprefix('torch.')}; use the unquantized checkpoint"
            )


def _merge_configs(detected: ModelConfig, stored: ModelConfig, source: str) -> ModelConfig:
    """Complete the detected config with the stored settings that shapes do not show; the sizes must agree."""
    epsilons = (stored.norm_eps, stored.group_norm_eps)
    if not all(0 < eps < MAX_NUMBER for eps in epsilons):
        raise CheckpointError(f"{source}: the config in its header has impossible epsilons {epsilons}")
    unshaped = {name: getattr(stored, name) for name in NOT_IN_SHAPES}
    try:
        merged = replace(detected, **unshaped)
    except ConfigError as error:
        raise CheckpointError(f"{source}: the config in its header does not fit its tensors: {error}") from error
    if detected.version == "4":  # has no choice of bonus
        stored = replace(stored, bonus=merged.bonus)
    differing = [name for name in vars(merged) if getattr(merged, name) != getattr(stored, name)]
    if differing:
        in_header, in_tensors = (
            ", ".join(f"{name} {getattr(config, name)!r:.40}" for name in differing) for config in (stored, merged)
        )
        raise CheckpointError(
            f"{source}: its header says {in_header}, its tensors say {in_tensors}; the file is damaged"
        )
    return merged


def _check_epsilons(claimed: ModelConfig, stored: ModelConfig, source: str) -> None:
    """Raise CheckpointError if the config.json of a folder has another epsilon than the header of its weights."""
    for name in ("norm_eps", "group_norm_eps"):
        in_header, in_json = getattr(stored, name), getattr(claimed, name)
        if not math.isclose(in_header, in_json):
            raise CheckpointError(
                f"{source}: config.json has {name} {in_json:g}, the header of its weights {in_header:g}; undo the "
                "change to config.json, or save the model again with the epsilon you want"
            )
