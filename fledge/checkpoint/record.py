"""A checkpoint in memory: what every reader gives and every writer takes.

Here: two frozen records, one as a file had it, one in official names with its config. No reading, no writing.
"""

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
"""How a matrix is quantized: format, rows, columns."""


@dataclass(frozen=True)
class StoredMetadata:
    """What Fledge writes beside the tensors (see metadata.py); files of others have none of it."""

    config: ModelConfig | None = None
    tokenizer_spec: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    quantized: dict[str, MatrixSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class RawFile:
    """One file or folder as it was found: the names are still those of its own layout."""

    path: Path
    container: str  # "pth", "safetensors", "gguf" or "folder"
    tensors: dict[str, Tensor]  # on "meta" where only names, shapes and dtypes were read
    files: tuple[Path, ...]  # the files that hold tensors
    stored: StoredMetadata = StoredMetadata()
    settings: dict[str, Any] = field(default_factory=dict)  # the folder's config.json
    quantized: dict[str, QuantizedMatrix] = field(
        default_factory=dict
    )  # under official names, which `tensors` then lacks


@dataclass(frozen=True)
class Checkpoint:
    """A complete, checked model in official names, shapes and order.

    `tensors` alone is what a strict `load_state_dict` takes, unless some matrices are quantized: then the two together.
    """

    path: Path
    format: str  # "pth", "safetensors", "gguf", "hf" or "fla"
    config: ModelConfig
    tensors: dict[str, Tensor]  # in the file's dtypes; on "meta" where the weights were not read
    files: tuple[Path, ...]
    tokenizer_spec: dict[str, Any] | None = None  # the vocabulary's JSON record, where the file carries one
    extra: dict[str, Any] = field(default_factory=dict)  # whatever the writer added, training facts say
    quantized: dict[str, QuantizedMatrix] = field(default_factory=dict)  # matrices that `tensors` lacks

    @property
    def template(self) -> str | None:
        """The chat template of the conversations it was tuned on; None where the file does not tell."""
        told = self.extra.get("template")
        return told if isinstance(told, str) else None

    def dense(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All tensors in the official order, the quantized matrices as `dtype`; float32 holds them exactly."""
        return {
            name: self.tensors[name] if name in self.tensors else self.quantized[name].dequantize(dtype)
            for name in get_expected_shapes(self.config)
        }
