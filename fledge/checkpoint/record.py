"""A checkpoint in memory, as every reader returns and every writer takes it: as stored, and with official names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.checkpoint.shapes import get_expected_shapes
from fledge.kernels.quantized import QuantizedMatrix
from fledge.models.config import ModelConfig

MatrixSpec = tuple[str, int, int]
"""A quantized matrix: format, rows, columns."""


@dataclass(frozen=True)
class StoredMetadata:
    """What Fledge stores beside the tensors (see metadata.py); files of other programs have none of it."""

    config: ModelConfig | None = None
    tokenizer_spec: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    quantized: dict[str, MatrixSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class RawFile:
    """One file or folder as stored, with the tensor names of its own layout."""

    path: Path
    container: str  # "pth", "safetensors", "gguf" or "folder"
    tensors: dict[str, Tensor]  # on "meta" if only names, shapes and dtypes were read
    files: tuple[Path, ...]  # the files that hold tensors
    stored: StoredMetadata = StoredMetadata()
    settings: dict[str, Any] = field(default_factory=dict)  # the folder's config.json
    quantized: dict[str, QuantizedMatrix] = field(
        default_factory=dict
    )  # official names, which are then not in `tensors`


@dataclass(frozen=True)
class Checkpoint:
    """A complete, checked model with official names, shapes and order.

    Without quantized matrices, a strict `load_state_dict` takes `tensors`.
    """

    path: Path
    format: str  # "pth", "safetensors", "gguf", "hf" or "fla"
    config: ModelConfig
    tensors: dict[str, Tensor]  # in the dtypes of the file; on "meta" if the weights were not read
    files: tuple[Path, ...]
    tokenizer_spec: dict[str, Any] | None = None  # the JSON record of the vocabulary, if the file has one
    extra: dict[str, Any] = field(default_factory=dict)  # anything the writer added, such as training facts
    quantized: dict[str, QuantizedMatrix] = field(default_factory=dict)  # matrices that are not in `tensors`

    @property
    def template(self) -> str | None:
        """The chat template that the model was tuned with; None if the file does not record it."""
        template = self.extra.get("template")
        return template if isinstance(template, str) else None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return all tensors in the official order, the quantized matrices as `dtype`; float32 holds them exactly."""
        return {
            name: self.tensors[name] if name in self.tensors else self.quantized[name].dequantize(dtype)
            for name in get_expected_shapes(self.config)
        }
