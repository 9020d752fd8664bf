"""Checkpoints out of memory into files: checked first, then written whole or not at all.

Here: `save`, and the room it needs. Not here: choosing what to write for another program (conversion.py).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fledge.checkpoint import metadata
from fledge.checkpoint.detection import check_shapes
from fledge.checkpoint.formats.pth import write_pth
from fledge.checkpoint.formats.safetensors import DTYPES, write_safetensors
from fledge.checkpoint.record import StoredMetadata
from fledge.checkpoint.shapes import get_expected_shapes
from fledge.core.errors import CheckpointError, UsageError
from fledge.kernels import QuantizedMatrix
from fledge.models.config import ModelConfig

SLACK = 4 << 20  # bytes; headers, names and file system blocks beside the tensors


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_spec: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    quantized: Mapping[str, QuantizedMatrix] | None = None,
) -> None:
    """Write a model as `.safetensors` (with everything) or as official `.pth` (tensors only), chosen by the suffix.

    tensors: official names and shapes, as `model.state_dict()` gives them; dtypes are kept.
    quantized: matrices that are missing in `tensors`; `.safetensors` only.
    tokenizer_spec: `Vocabulary.to_spec()`. extra: plain JSON, training facts say.
    An existing file is replaced. Raises CheckpointError where tensors and config do not agree or the disk is too
    full, UsageError for another suffix or for a record that a `.pth` cannot hold.
    """
    path = Path(path)
    matrices = dict(quantized or {})
    check_writable(config, tensors, tokenizer_spec, str(path), matrices)
    # In this order, by which the rwkv package tells versions.
    together = {**tensors, **{name: matrix.data for name, matrix in matrices.items()}}
    together = {name: together[name] for name in get_expected_shapes(config)}
    check_disk_space(path.parent, together)
    if path.suffix == ".safetensors":
        forms = {name: (matrix.format, matrix.rows, matrix.columns) for name, matrix in matrices.items()}
        stored = StoredMetadata(config, dict(tokenizer_spec) if tokenizer_spec else None, dict(extra or {}), forms)
        write_safetensors(path, together, metadata.encode(stored))
    elif path.suffix == ".pth":
        if config.version == "llama":
            raise UsageError(f"{path}: a .pth cannot hold how many heads a transformer has; save it as .safetensors")
        if tokenizer_spec or extra or matrices:
            raise UsageError(
                f"{path}: a .pth holds dense tensors only; save quantized ones, a tokenizer or extras as .safetensors"
            )
        write_pth(path, together)
    else:
        raise UsageError(f"{path}: the suffix {path.suffix!r} is no checkpoint format; use .safetensors or .pth")


def check_writable(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    spec: Mapping[str, Any] | None,
    source: str,
    quantized: Mapping[str, QuantizedMatrix],
) -> None:
    """Raise CheckpointError unless this is a complete model that the readers will take back."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes({**shapes, **{name: matrix.shape for name, matrix in quantized.items()}}, config, source)
    metadata.check_vocabulary(config, spec, source)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values() or tensor.is_meta:
            kind = "no values (device meta)" if tensor.is_meta else str(tensor.dtype)
            raise CheckpointError(f"{source}: {name} has {kind}; only float tensors with values can be written")


def check_overwrite(target: Path, force: bool) -> None:
    """Raise CheckpointError where a target exists, unless it may be replaced."""
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists; to replace it give --force")


def check_disk_space(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where the disk below `folder` has no room for these tensors."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + SLACK
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed; free space or write elsewhere"
        )
