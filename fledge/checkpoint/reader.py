"""One door for every format: a path or a hub name in, a complete and checked checkpoint out.

Here: choosing the reader, and the steps every file goes through after it (official names, config, checks).
Not here: the formats themselves, and models.
"""

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
from fledge.checkpoint.formats.huggingface.settings import LARGEST_NUMBER, apply_hf_config
from fledge.checkpoint.formats.pth import read_pth, verify_checksums
from fledge.checkpoint.formats.safetensors import DTYPES, read_safetensors
from fledge.checkpoint.hub import locate
from fledge.checkpoint.record import Checkpoint, RawFile, StoredMetadata
from fledge.checkpoint.shapes import Shape, get_expected_shapes
from fledge.checkpoint.unsupported import check_supported
from fledge.core.errors import CheckpointError, ConfigError, UnsupportedError
from fledge.kernels.quantized import QuantizedMatrix
from fledge.models.config import UNTOLD, ModelConfig
from fledge.models.native_model import MATRICES

StrPath = str | os.PathLike[str]
BLOCK = re.compile(r"^blocks\.\d+\.")


def load(path: StrPath) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and tensors (official names, shapes and order, the file's dtypes, on the CPU) of a checkpoint.

    `path`: a .pth, a .safetensors, a .gguf, a Hugging Face folder, or a hub name `owner/name`. The tensors are mapped
    from the file: nothing is copied until it is used. Quantized matrices are unpacked to float32, which is exact and
    large; `read` gives them as they are. Raises CheckpointError, or UnsupportedError for RWKV-7 and its like.
    """
    checkpoint = read(path)
    return checkpoint.config, checkpoint.dense()


def read(path: StrPath, *, weights: bool = True) -> Checkpoint:
    """As `load`, with everything else the file tells. Without `weights` all tensors are on "meta" and none is read."""
    return interpret(read_raw(locate(path), weights=weights))


def verify(path: StrPath) -> Checkpoint:
    """Read every weight once: the checksums that a .pth keeps, and numbers that are not finite.

    Loading maps the weights and so notices neither. Raises CheckpointError naming the damaged file or tensor.
    """
    checkpoint = read(path)
    for file in checkpoint.files:
        if detect_container(file) == "pth":
            verify_checksums(file)
    scales = ((name, part) for name, matrix in checkpoint.quantized.items() for part in matrix.groups()[1:])
    for name, tensor in (*checkpoint.tensors.items(), *scales):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{checkpoint.path}: {name} holds numbers that are not finite; the model cannot be used"
            )
    return checkpoint


def read_raw(path: Path, *, weights: bool = True) -> RawFile:
    """The tensors of a local file or folder under the names they have there."""
    if path.is_dir():
        return read_folder(path, weights=weights)
    container = detect_container(path)
    if container == "gguf":
        return read_gguf(path, weights=weights)
    if container == "safetensors":
        tensors, texts = read_safetensors(path, weights=weights)
        stored = metadata.decode(texts, str(path))
        quantized = _quantized(tensors, stored, path)
        return RawFile(path, "safetensors", tensors, (path,), stored, quantized=quantized)
    return RawFile(path, "pth", read_pth(path, weights=weights), (path,))


def _quantized(tensors: dict[str, Tensor], stored: StoredMetadata, path: Path) -> dict[str, QuantizedMatrix]:
    """The matrices that the file's record calls quantized, taken out of `tensors`."""
    found: dict[str, QuantizedMatrix] = {}
    for name, form in stored.quantized.items():
        if name != "head.weight" and BLOCK.sub("", name, count=1) not in MATRICES:
            raise CheckpointError(f"{path}: its header lists {name!r:.80} as quantized, which is never done; refused")
        if name not in tensors:
            raise CheckpointError(f"{path}: its header lists {name!r:.80} as quantized, but no such tensor is there")
        try:
            found[name] = QuantizedMatrix(*form, tensors.pop(name))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {name}: {error}; the file is damaged") from error
    return found


def interpret(raw: RawFile) -> Checkpoint:
    """Official names, the config, and every check that needs no values."""
    source = str(raw.path)
    layout, tensors = rename_to_official(raw.tensors, source)
    if both := tensors.keys() & raw.quantized.keys():
        raise CheckpointError(f"{source} holds {min(both)!r:.80} twice, dense and quantized; the file is damaged")
    shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    heads = raw.stored.config.n_head if raw.stored.config else None
    config = detect(shapes | {name: matrix.shape for name, matrix in raw.quantized.items()}, source, heads)
    _check_dtypes(tensors, source)
    if raw.stored.config is not None:
        config = _agreed(config, raw.stored.config, source)
    if raw.container == "folder":
        told = apply_hf_config(config, raw.settings, layout, source)
        if raw.stored.config is not None:
            _check_unedited(told, config, source)
        else:
            config = told
    # One order for all: other programs tell versions by it, and safetensors has none.
    shapes = get_expected_shapes(config)
    tensors = {name: tensors[name] for name in shapes if name in tensors}
    quantized = {name: raw.quantized[name] for name in shapes if name in raw.quantized}
    metadata.check_vocabulary(config, raw.stored.tokenizer_spec, source)
    kind = raw.container if raw.container != "folder" else "fla" if layout == "fla" else "hf"
    stored = raw.stored
    return Checkpoint(raw.path, kind, config, tensors, raw.files, stored.tokenizer_spec, stored.extra, quantized)


def rename_to_official(tensors: dict[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """The layout whose names these are, and the same tensors under official names."""
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
                f"{source}: {name} has dtype {str(tensor.dtype).removeprefix('torch.')}; give the checkpoint from "
                "before quantization"
            )


def _agreed(detected: ModelConfig, stored: ModelConfig, source: str) -> ModelConfig:
    """The stored config, which knows what no shape tells, once its sizes are those of the tensors."""
    epsilons = (stored.norm_eps, stored.group_norm_eps)
    if not all(0 < eps < LARGEST_NUMBER for eps in epsilons):
        raise CheckpointError(f"{source}: the config in its header has impossible epsilons {epsilons}")
    untold = {name: getattr(stored, name) for name in UNTOLD}
    try:
        same = replace(detected, **untold)
    except ConfigError as error:
        raise CheckpointError(f"{source}: the config in its header does not fit its tensors: {error}") from error
    if detected.version == "4":  # has no choice of bonus
        stored = replace(stored, bonus=same.bonus)
    differing = [name for name in vars(same) if getattr(same, name) != getattr(stored, name)]
    if differing:
        claimed, found = (", ".join(f"{name} {getattr(c, name)!r:.40}" for name in differing) for c in (stored, same))
        raise CheckpointError(f"{source}: its header says {claimed}, its tensors say {found}; the file is damaged")
    return same


def _check_unedited(told: ModelConfig, stored: ModelConfig, source: str) -> None:
    """Raise CheckpointError where a folder's config.json names another epsilon than the header of its weights."""
    for name in ("norm_eps", "group_norm_eps"):
        ours, theirs = getattr(stored, name), getattr(told, name)
        if not math.isclose(ours, theirs):
            raise CheckpointError(
                f"{source}: config.json asks for {name} {theirs:g}, the header of its weights for {ours:g}; undo the "
                "change to config.json, or save the model anew with the epsilon you want"
            )
