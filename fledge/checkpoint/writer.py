"""Write checkpoints to files: complete and valid ones only, and atomically."""

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

OVERHEAD_BYTES = 4 << 20  # of headers, names and file system blocks beside the tensors


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_spec: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    quantized: Mapping[str, QuantizedMatrix] | None = None,
) -> None:
    """Write a model as `.safetensors` (with everything) or official `.pth` (tensors only); the suffix decides.

    tensors: with official names and shapes, as in `model.state_dict()`; dtypes are kept.
    quantized: matrices that are not in `tensors`; `.safetensors` only.
    tokenizer_spec: `Vocabulary.to_spec()`. extra: plain JSON, such as training facts.
    An existing file is replaced. Raises CheckpointError if tensors and config do not agree or the disk is full,
    UsageError for another suffix or a record that a `.pth` cannot hold.
    """
    path = Path(path)
    matrices = dict(quantized or {})
    check_writable(config, tensors, tokenizer_spec, str(path), matrices)
    # The rwkv package detects versions by this order.
    stored_tensors = {**tensors, **{name: matrix.data for name, matrix in matrices.items()}}
    stored_tensors = {name: stored_tensors[name] for name in get_expected_shapes(config)}
    check_disk_space(path.parent, stored_tensors)
    if path.suffix == ".safetensors":
        specs = {name: (matrix.format, matrix.rows, matrix.columns) for name, matrix in matrices.items()}
        stored = StoredMetadata(config, dict(tokenizer_spec) if tokenizer_spec else None, dict(extra or {}), specs)
        write_safetensors(path, stored_tensors, metadata.encode(stored))
    elif path.suffix == ".pth":
        if config.version == "llama":
            raise UsageError(
                f"{path}: a .pth cannot hold the number of heads of a transformer; save it as .safetensors"
            )
        if tokenizer_spec or extra or matrices:
            raise UsageError(
                f"{path}: a .pth holds dense tensors only; save quantized ones, a tokenizer or extras as .safetensors"
            )
        write_pth(path, stored_tensors)
    else:
        raise UsageError(f"{path}: the suffix {path.suffix!r} is not a checkpoint format; use .safetensors or .pth")


def check_writable(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    spec: Mapping[str, Any] | None,
    source: str,
    quantized: Mapping[str, QuantizedMatrix],
) -> None:
    """Raise CheckpointError unless this is a complete model that the readers accept."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes({**shapes, **{name: matrix.shape for name, matrix in quantized.items()}}, config, source)
    metadata.check_vocabulary(config, spec, source)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values() or tensor.is_meta:
            kind = "no values (device meta)" if tensor.is_meta else str(tensor.dtype)
            raise CheckpointError(f"{source}: {name} has {kind}; only float tensors with values can be written")


def check_overwrite(target: Path, force: bool) -> None:
    """Raise CheckpointError if the target exists, unless it may be replaced."""
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists; to replace it give --force")


def check_disk_space(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the disk of `folder` has too little space for these tensors."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + OVERHEAD_BYTES
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed; "
            "free space or choose another disk"
        )
