"""AdamW with the official parameter groups of RWKV-5 and RWKV-6.

    group     what                                                       learning rate   weight decay
    fast      att.time_decay                                             2x              0
    matrices  *.weight with two axes: emb, head and the Linears          1x              wd
    rest      LoRA factors, mixes, u, norms                              1x              0

Source: the x052 and x060 training code. Appendix H of the paper has the same rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fledge.core.errors import ConfigError

MIN_EPS = 1e-30
"""Well above the smallest normal float32."""


@dataclass(frozen=True)
class AdamSettings:
    """Settings of the optimizer. An eps of 1e-18 is the published remedy for loss spikes of RWKV-6."""

    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-18
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not MIN_EPS <= self.eps <= 1:
            raise ConfigError(f"eps is {self.eps:g}; it must be at least {MIN_EPS:g}, or a step may divide 0 by 0")
        if not 0 <= self.weight_decay <= 10:
            raise ConfigError(f"weight_decay is {self.weight_decay:g}; it must be from 0 to 10")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameter groups for torch, each with `lr_scale` for the schedule and a readable `name`."""
    fast, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("att.time_decay"):
            fast.append(parameter)
        elif name.endswith(".weight") and sum(size > 1 for size in parameter.shape) >= 2:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    return [
        {"name": "fast", "params": fast, "lr_scale": 2.0, "weight_decay": 0.0},
        {"name": "matrices", "params": matrices, "lr_scale": 1.0, "weight_decay": weight_decay},
        {"name": "rest", "params": rest, "lr_scale": 1.0, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, settings: AdamSettings) -> torch.optim.AdamW:
    """AdamW with the official groups. The loop sets the learning rate of each group before every step."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
