"""L2: the models, one file for each family, and the state as a value. This package contains no file formats and no
training.

`build(config)` makes an empty model with parameters of the official names and shapes. A loader or `init_weights` sets
their values.
"""

from __future__ import annotations

import torch

from fledge.models.base import BaseModel
from fledge.models.config import ModelConfig
from fledge.models.eagle import Eagle
from fledge.models.finch import Finch
from fledge.models.init import init_weights
from fledge.models.rwkv4 import Rwkv4
from fledge.models.state import KvState, Rwkv4State, State, WkvState, zero_state
from fledge.models.transformer import Transformer

FAMILIES: dict[str, type[BaseModel]] = {"4": Rwkv4, "5": Eagle, "6": Finch, "llama": Transformer}

__all__ = [
    "BaseModel",
    "Eagle",
    "Finch",
    "KvState",
    "ModelConfig",
    "Rwkv4",
    "Rwkv4State",
    "State",
    "Transformer",
    "WkvState",
    "build",
    "init_weights",
    "zero_state",
]


def build(config: ModelConfig, device: torch.device | str = "cpu") -> BaseModel:
    """An uninitialized model of these sizes on `device`. The device "meta" needs no memory until weights are
    assigned."""
    return FAMILIES[config.generation](config, device)
