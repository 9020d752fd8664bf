"""Small checkpoints of every kind, and a comparison of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from random_checkpoints import random_checkpoint
from torch import Tensor

# One of each kind of file.
KINDS: dict[str, dict[str, Any]] = {
    "4": {"version": "4"},
    "5.0 with time_first": {"version": "5.0", "bonus": "time_first"},
    "5.0": {"version": "5.0"},
    "5.1": {"version": "5.1"},
    "5.2": {"version": "5.2"},
    "5.2 tuned": {"version": "5.2", "tuned_state": True},
    "6.0": {"version": "6.0"},
    "6.0 tuned": {"version": "6.0", "tuned_state": True},
    "6.0 in bfloat16": {"version": "6.0", "dtype": torch.bfloat16},
}


def make_tensors(kind: str, **sizes: Any) -> dict[str, Tensor]:
    """The tensors of one of KINDS. All sizes are different, unless `sizes` sets them."""
    return random_checkpoint(**{"n_layer": 3, "n_embd": 24, "head_size": 8, "vocab_size": 37} | KINDS[kind] | sizes)


def save_pth(folder: Path, tensors: Mapping[str, Any], name: str = "model.pth") -> Path:
    """Save `tensors` with torch.save and return the path."""
    torch.save(dict(tensors), folder / name)
    return folder / name


def are_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two dicts have the same names, shapes, dtypes and bits."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
