"""Cross-entropy in float32, with L2Wrap: a gentle pull of each position's largest logit towards zero.

L2Wrap acts on the gradient only (factor 1e-4 / (B T) times the logit itself); the reported loss is the cross-entropy.
Source: the official training code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PULL = 1e-4


class _L2Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (logits,) = ctx.saved_tensors
        largest, where = logits.max(-1, keepdim=True)
        positions = logits.numel() // logits.shape[-1]
        pull = torch.zeros_like(logits).scatter_(-1, where, largest * (PULL / positions))
        return gradients[0], pull * gradients[0]


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats. logits: (B, T, vocab) float32; targets: (B, T) int64, the id that follows each token.

    The pull scales with the incoming gradient, so that a loss divided by the number of micro-batches stays right.
    """
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    wrapped: Tensor = _L2Wrap.apply(loss, logits)
    return wrapped


def masked_loss(logits: Tensor, targets: Tensor, counted: Tensor | None = None, total: int | None = None) -> Tensor:
    """The share of these targets in the mean over all that count in a step; the shares of its micro-batches add up.

    counted: (B, T) bool, None for all. total: targets that count in the whole step, None where this is all of it.
    The pull touches only positions that count. Zero, with a gradient of zero, where none does.
    """
    if counted is not None:
        logits, targets = logits[counted][None], targets[counted][None]  # (1, n, vocab), (1, n)
    here = targets.numel()
    if not here:
        return logits.sum()
    return next_token_loss(logits, targets) * (here / (total or here))
