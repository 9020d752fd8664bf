"""A checkpoint in memory: what every reader gives and every writer takes.

Here: two frozen records, one as a file had it, one in official names with its config. No reading, no writing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fledge.models.config import ModelConfig


@dataclass(frozen=True)
class Stored:
    """What Fledge writes beside the tensors (see metadata.py); files of others have none of it."""

    config: ModelConfig | None = None
    tokenizer_spec: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RawFile:
    """One file or folder as it was found: the names are still those of its own layout."""

    path: Path
    container: str  # "pth", "safetensors" or "folder"
    tensors: dict[str, Tensor]  # on "meta" where only names, shapes and dtypes were read
    files: tuple[Path, ...]  # the files that hold tensors
    stored: Stored = Stored()
    settings: dict[str, Any] = field(default_factory=dict)  # the folder's config.json


@dataclass(frozen=True)
class Checkpoint:
    """A complete, checked model in official names, shapes and order: what a strict `load_state_dict` takes."""

    path: Path
    format: str  # "pth", "safetensors", "hf" or "fla"
    config: ModelConfig
    tensors: dict[str, Tensor]  # in the file's dtypes; on "meta" where the weights were not read
    files: tuple[Path, ...]
    tokenizer_spec: dict[str, Any] | None = None  # the vocabulary's JSON record, where the file carries one
    extra: dict[str, Any] = field(default_factory=dict)  # whatever the writer added, training facts say
