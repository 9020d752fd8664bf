"""Checkpoints of any size with random weights: speed does not depend on what a model has learned.

Every tensor gets numbers of the scale of a trained one, those that training starts at zero too, so that nothing is
sparse, nothing overflows and two programs can be compared by their logits. What a sub-layer adds to the stream becomes
less as the model becomes deeper, as it is in trained models: or each layer would multiply the last one's rounding.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fledge.checkpoint import get_expected_shapes
from fledge.core.errors import UsageError
from fledge.models import ModelConfig

ADDS = ("att.output.weight", "ffn.value.weight")
FAMILIES = {"finch": ModelConfig.finch, "eagle": ModelConfig.eagle}


def config_of(shape: str, vocab_size: int, family: str = "finch") -> ModelConfig:
    """The model of a shape such as L12-D768 (12 layers, width 768) with the official proportions. Raises UsageError."""
    if family not in FAMILIES:
        raise UsageError(f"family is {family!r:.40}; choose from {', '.join(FAMILIES)}")
    found = re.fullmatch(r"L(\d{1,3})-D(\d{1,5})", shape, re.IGNORECASE)
    layers, width = (int(found[1]), int(found[2])) if found else (0, 0)
    if layers < 1 or width < 64 or width % 64:
        raise UsageError(f"shape {shape!r:.40} is not like L12-D768: layers, then a width that 64 divides")
    return FAMILIES[family](layers, width, vocab_size=vocab_size)


def random_tensors(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Official names and shapes, all in `dtype`, as official files have it."""
    draw = torch.Generator().manual_seed(seed)
    damping = (2 * config.n_layer) ** -0.5  # all layers together add as much as the embedding
    return {
        name: (_random(name, shape, draw) * (damping if name.endswith(ADDS) else 1)).to(dtype)
        for name, shape in get_expected_shapes(config).items()
    }


def _random(name: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    kind = name.rpartition(".")[2]
    normal = torch.randn(shape, generator=draw)
    if kind == "bias":
        return 0.1 * normal
    if kind == "weight" and len(shape) == 1:  # a norm
        return 1 + 0.1 * normal
    if kind == "time_decay":  # from exp(-exp(-6)) = 0.998 a token to exp(-exp(-1)) = 0.69
        return torch.rand(shape, generator=draw) * 5 - 6
    if kind.startswith(("time_mix", "time_maa")) and len(shape) == 3 and shape[:2] == (1, 1):
        return torch.rand(shape, generator=draw)
    if kind in ("time_faaaa", "time_first", "time_state"):
        return 0.4 * normal
    if name == "emb.weight":
        return 0.5 * normal
    inputs = shape[-1] if kind == "weight" else shape[-2]  # LoRA factors are stored (in, out)
    return normal * inputs**-0.5
