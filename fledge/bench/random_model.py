"""Checkpoints of any size with random weights. Speed does not depend on what a model has learned.

Every tensor has values of the scale of a trained one, including those that training initializes with zeros. Nothing is
sparse, nothing overflows, and the logits of two programs can be compared. As in trained models, each sub-layer of a
deeper model contributes less to the residual stream. Otherwise each layer would amplify the rounding of the one before.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fledge.checkpoint import get_expected_shapes
from fledge.core.errors import UsageError
from fledge.models import ModelConfig

RESIDUAL_OUTPUTS = ("att.output.weight", "ffn.value.weight")
FAMILIES = {"finch": ModelConfig.finch, "eagle": ModelConfig.eagle}


def config_of_shape(shape: str, vocab_size: int, family: str = "finch") -> ModelConfig:
    """Return the config of a shape such as L12-D768: 12 layers of width 768, with the official proportions.

    Raises UsageError for another shape or family.
    """
    if family not in FAMILIES:
        raise UsageError(f"family is {family!r:.40}; choose from {', '.join(FAMILIES)}")
    match = re.fullmatch(r"L(\d{1,3})-D(\d{1,5})", shape, re.IGNORECASE)
    layers, width = (int(match[1]), int(match[2])) if match else (0, 0)
    if layers < 1 or width < 64 or width % 64:
        raise UsageError(f"shape {shape!r:.40} is not of the form L12-D768: layers, then a width divisible by 64")
    return FAMILIES[family](layers, width, vocab_size=vocab_size)


def random_tensors(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Return tensors with the official names and shapes, all in `dtype`, as in official files."""
    generator = torch.Generator().manual_seed(seed)
    damping = (2 * config.n_layer) ** -0.5  # the sum of all layers is as large as the embedding
    return {
        name: (_random_tensor(name, shape, generator) * (damping if name.endswith(RESIDUAL_OUTPUTS) else 1)).to(dtype)
        for name, shape in get_expected_shapes(config).items()
    }


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    kind = name.rpartition(".")[2]
    normal = torch.randn(shape, generator=generator)
    if kind == "bias":
        return 0.1 * normal
    if kind == "weight" and len(shape) == 1:  # a norm
        return 1 + 0.1 * normal
    if kind == "time_decay":  # from exp(-exp(-6)) = 0.998 per token to exp(-exp(-1)) = 0.69
        return torch.rand(shape, generator=generator) * 5 - 6
    if kind.startswith(("time_mix", "time_maa")) and len(shape) == 3 and shape[:2] == (1, 1):
        return torch.rand(shape, generator=generator)
    if kind in ("time_faaaa", "time_first", "time_state"):
        return 0.4 * normal
    if name == "emb.weight":
        return 0.5 * normal
    inputs = shape[-1] if kind == "weight" else shape[-2]  # LoRA factors are stored (in, out)
    return normal * inputs**-0.5
