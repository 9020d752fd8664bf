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
from fledge.checkpoint.pth import write_pth
from fledge.checkpoint.record import Stored
from fledge.checkpoint.shapes import expected_shapes
from fledge.checkpoint.st_file import CODES, write_safetensors
from fledge.core.errors import CheckpointError, UsageError
from fledge.models.config import ModelConfig

SLACK = 4 << 20  # bytes; headers, names and file system blocks beside the tensors


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_spec: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as `.safetensors` (with everything) or as official `.pth` (tensors only), chosen by the suffix.

    tensors: official names and shapes, as `model.state_dict()` gives them; dtypes are kept.
    tokenizer_spec: `Vocabulary.to_spec()`. extra: plain JSON, training facts say.
    An existing file is replaced. Raises CheckpointError where tensors and config do not agree or the disk is too
    full, UsageError for another suffix or for a record that a `.pth` cannot hold.
    """
    path = Path(path)
    check_writable(config, tensors, tokenizer_spec, str(path))
    check_space(path.parent, tensors)
    tensors = {name: tensors[name] for name in expected_shapes(config)}  # the rwkv package tells versions by order
    if path.suffix == ".safetensors":
        stored = Stored(config, dict(tokenizer_spec) if tokenizer_spec else None, dict(extra or {}))
        write_safetensors(path, tensors, metadata.encode(stored))
    elif path.suffix == ".pth":
        if tokenizer_spec or extra:
            raise UsageError(f"{path}: a .pth holds tensors only; save a tokenizer or extras as .safetensors")
        write_pth(path, tensors)
    else:
        raise UsageError(f"{path}: the suffix {path.suffix!r} is no checkpoint format; use .safetensors or .pth")


def check_writable(
    config: ModelConfig, tensors: Mapping[str, Tensor], spec: Mapping[str, Any] | None, source: str
) -> None:
    """Raise CheckpointError unless this is a complete model that the readers will take back."""
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, source)
    metadata.check_vocabulary(config, spec, source)
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES or tensor.is_meta:
            kind = "no values (device meta)" if tensor.is_meta else str(tensor.dtype)
            raise CheckpointError(f"{source}: {name} has {kind}; only float tensors with values can be written")


def check_space(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where the disk below `folder` has no room for these tensors."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + SLACK
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed; make room or write elsewhere"
        )
